"""The flags of engine.train."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, cast

import torch

from dataloaders.formats import NarrativeTiming, TurnChoice
from engine.batches import Absent, Normalizer
from engine.build import RANDOM
from engine.layout import Parallel
from engine.recipes import Recipe, Size, Stage, recipe


@dataclass(frozen=True)
class TrainConfig:
    """Train PiTe's three stages. A flag left out takes the stage's recipe (engine/recipes.py, the paper's table)."""

    data: Path = Path("data")
    """folder of stage1/, stage2/, stage3/ in the layout of docs/data.md"""
    store: Path = Path("features")
    """feature store that engine.encode made of that folder"""
    cache: Path | None = None
    """where tokenized samples are kept for further runs; STORE/samples unless given, which a read-only store does not allow"""
    output: Path = Path("runs/pite")
    """where stage1/, stage2/, stage3/ are written; an interrupted run there is continued"""
    stage: Literal["1", "2", "3", "all"] = "all"
    """which stage to train"""
    trajectory_stage: bool = True
    """without it, stage 3 starts from stage 1 and `all` leaves stage 2 out (the paper's ablation)"""
    model: Size = "7b"
    """size of the language model: Vicuna v1.5 7b or 13b, or the miniature of the demo"""
    llm: str | None = None
    """directory or Hugging Face name of the language model, the size's Vicuna v1.5 unless given; `random` for random
    weights of the size's shape: a throughput run that needs no earlier stage and exports nothing"""
    init: Path | None = None
    """output of an earlier stage to start from, instead of OUTPUT's previous stage"""
    num_points: int = 3
    """P, key points per object"""
    max_length: int = 2048
    """tokens of the longest sample; longer ones are left out, counted and reported"""
    failure_budget: float = 0.01
    """share of a stage's records that may be malformed; they are left out and listed in OUTPUT/stageN/left_out.jsonl"""
    turn: TurnChoice = "first"
    """which turn of a Valley conversation is learned; `any` is one that its text decides, the same in every run"""
    narrative_timing: NarrativeTiming = "words"
    """find a narrative's utterances in its caption by their words, or by their relative position"""
    token_budget: int | None = None
    """most tokens of a micro-batch on one device; what its memory holds, up to 16384, unless given; 1024 a thread on a CPU"""
    epochs: int | None = None
    """passes over the data"""
    max_steps: int | None = None
    """stop after this many optimizer steps of a stage, to be continued; the schedule is that of the whole stage"""
    global_batch: int | None = None
    """samples per optimizer step, over all devices"""
    learning_rate: float | None = None
    """peak learning rate"""
    head_rate_ratio: float | None = None
    """learning rate of the coordinate heads, as a share of the peak learning rate"""
    warmup_ratio: float | None = None
    """share of the steps in which the learning rate rises"""
    weight_decay: float | None = None
    """AdamW's decoupled weight decay"""
    max_grad_norm: float | None = None
    """gradient clipping; 0 for none"""
    lora_rank: int | None = None
    """rank of the LoRA on q, k, v, o, gate, up and down"""
    lora_alpha: float | None = None
    """LoRA's alpha; its scale is alpha / rank"""
    label_smoothing: float | None = None
    """label smoothing of the cross-entropy"""
    trajectory_weight: float | None = None
    """lambda, the weight of the L1"""
    absent: Absent = "skip"
    """coordinates at (-1, -1) carry no loss, or are regressed to -1 as the paper's text says"""
    trajectory_normalizer: Normalizer = "present"
    """divide the L1 by present coordinates, or by P * N per supervised token (paper eq. 8)"""
    head_init: bool = True
    """start the trajectory head from stage 1's localization head (eq. 9)"""
    seed: int = 0
    """of the data order and of new weights"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """of the frozen weights and activations; auto is bfloat16 on CUDA and float32 elsewhere"""
    frozen_dtype: Literal["fp8"] | None = None
    """fp8 multiplies the layers' frozen weights in float8, forward and backward: sm_89 and newer (H100, H200), with
    bfloat16 elsewhere; a CPU emulates it. LoRA, heads and what is saved are unaffected"""
    device: Literal["cpu", "cuda"] | None = None
    """where to train; CUDA where there is one"""
    workers: int = 2
    """threads of each rank that prepare the next steps' batches; 0 prepares each when it is needed"""
    checkpoint_every: int = 100
    """optimizer steps between checkpoints"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay on disk"""
    start_over_if_damaged: bool = False
    """begin a stage again at step 0 where all its checkpoints are damaged; without it that is refused"""
    parallel: Parallel = "auto"
    """copy the frozen weights to every device (ddp) or shard them (fsdp); auto shards where they do not fit"""
    recompute: int | None = None
    """layers that keep no activations and compute them again in backward; as few as memory allows unless given"""
    compile: bool = False
    """have torch.compile fuse the layers' elementwise work, in a minute at the start; `python -m bench.step` times both"""
    stall_timeout: float = 600.0
    """seconds without any progress after which the ranks end and name the one that they wait for"""
    profile: tuple[int, int] | None = None
    """first and last step to profile, counted from 1: a trace, and on CUDA a memory history, in OUTPUT/stageN/profile"""
    wandb: str | None = None
    """project on Weights & Biases that gets the metrics too"""
    devices: tuple[int, ...] = (1, 8)
    """numbers of devices of which the dry run tells memory and hours"""
    dry_run: bool = False
    """print parameters, tokens, steps, memory and hours, and train nothing"""
    measured: Path = Path("bench/results")
    """with --dry-run: folder of results of bench.step, whose efficiency on a device replaces the assumed one"""

    def __post_init__(self) -> None:
        if not 0 <= self.failure_budget <= 1:
            raise ValueError(f"--failure-budget is a share between 0 and 1, not {self.failure_budget}")
        if self.workers < 0:
            raise ValueError(f"--workers must be 0 or more, not {self.workers}")
        counts = ("num_points", "max_length", "token_budget", "max_steps", "checkpoint_every", "keep_checkpoints")
        for name in counts:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if any(n < 1 for n in self.devices):
            raise ValueError(f"--devices takes numbers of at least 1, not {' '.join(map(str, self.devices))}")
        if self.recompute is not None and self.recompute < 0:
            raise ValueError(f"--recompute must be 0 or more, not {self.recompute}")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"--profile takes a first and a last step, counted from 1, not {self.profile}")
        if self.stall_timeout <= 0:
            raise ValueError(f"--stall-timeout must be positive, not {self.stall_timeout}")
        if self.stage == "2" and not self.trajectory_stage:
            raise ValueError("--stage 2 is the trajectory stage: leave --no-trajectory-stage out")
        if self.model == "tiny" and self.llm is None:
            raise ValueError("--model tiny needs --llm, the directory that `python -m engine.tiny` made")
        for stage in self.stages:
            self.recipe(stage)

    @property
    def stages(self) -> tuple[Stage, ...]:
        if self.stage == "all":
            return (1, 2, 3) if self.trajectory_stage else (1, 3)
        return (cast(Stage, int(self.stage)),)

    def start(self, stage: Stage) -> Path | None:
        """The stage's output that `stage` starts from; None for the language model."""
        if self.init is not None or stage == 1 or self.llm == RANDOM:
            return self.init
        before = stage - 1 if self.trajectory_stage else 1
        return self.output / f"stage{before}" / "final"

    @property
    def samples(self) -> Path:
        """The folder of tokenized samples."""
        return self.cache or self.store / "samples"

    def features(self, stage: Stage) -> Path:
        """The feature store of the stage's media."""
        return self.store / ("images" if stage == 1 else "videos")

    def recipe(self, stage: Stage) -> Recipe:
        """The stage's recipe with this run's flags over it."""
        own = {f.name for f in fields(Recipe)}
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in own}
        return replace(recipe(self.model, stage), **{k: v for k, v in given.items() if v is not None})

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        name = self.dtype if self.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
        return cast(torch.dtype, getattr(torch, name))
