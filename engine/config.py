"""The flags of engine.train, in groups. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from dataloaders.cli import at_least, flag
from dataloaders.formats import NarrativeTiming, Stage, TurnChoice, split_of
from dataloaders.logs import LogFlags
from dataloaders.records import VideoFirst
from dataloaders.store.layout import store_of
from engine.recipes import RANDOM, Absent, Normalizer, Recipe, Size, recipe
from pite.families import Family, Name, family

Parallel = Literal["auto", "ddp", "fsdp"]


@dataclass(frozen=True)
class ModelConfig:
    """the language model, and its numbers"""

    size: Size = flag("7b", name="model")
    """size of the language model: Vicuna v1.5 7b or 13b, or the demo's tiny model"""
    family: Name = "pite"
    """model family: PiTe's three stages, or PG-Video-LLaVA's one, which reads DATA/stage3/video_instruct.json"""
    llm: str | None = None
    """directory or Hugging Face name of the language model, one of those in docs/models.md; the size's Vicuna v1.5
    unless given. `random` takes random weights of the size's shape, for throughput runs: it needs no earlier stage and
    exports nothing"""
    num_points: int = 3
    """P, key points per object"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype of the frozen weights and activations; auto is bfloat16 on CUDA and float32 elsewhere"""
    frozen_dtype: Literal["fp8"] | None = None
    """fp8 multiplies the layers' frozen weights in float8, forward and backward, and needs sm_89 or newer (H100, H200);
    a CPU emulates it. LoRA, heads and everything else stay bfloat16; what is saved does not change"""


@dataclass(frozen=True)
class DataConfig:
    """the training data, their features, and the held-out samples"""

    folder: Path = flag(Path("data"), name="data")
    """folder with stage1/, stage2/, stage3/ in the layout of docs/data.md"""
    store: Path = Path("features")
    """feature store that engine.encode made from that folder"""
    cache: Path | None = None
    """folder of tokenized samples, reused by further runs; STORE/samples unless given. Needed if STORE is read-only"""
    max_length: int = 2048
    """maximum tokens of a sample; longer samples are left out, counted and reported"""
    failure_budget: float = 0.01
    """share of a stage's records that may be malformed; they are left out and listed in OUTPUT/stageN/left_out.jsonl"""
    video_first: VideoFirst = "published"
    """PG-Video-LLaVA: put the video before the question in every second sample, as published, or always: then questions
    about one video share its rows, and --group-media is the default"""
    transcripts: Path | None = None
    """PG-Video-LLaVA: folder of transcripts, VIDEO.json of dataloaders.transcripts or VIDEO.txt, which a sample's prompt quotes as
    that of inference does; the published training has none"""
    turn: TurnChoice = "first"
    """turn of a Valley conversation to train on; `any` picks one by a hash of the text, the same in every run"""
    narrative_timing: NarrativeTiming = "words"
    """how to find a narrative's utterances in its caption: by their words, or by their relative position"""
    held_out: str | None = None
    """samples to validate on instead of training on them: a share such as 0.01, chosen by a checksum of the media's
    key, or a file of ids or media keys, one a line. With --validate-every 0.01 unless given, else none"""

    def __post_init__(self) -> None:
        if not 0 <= self.failure_budget <= 1:
            raise ValueError(f"--failure-budget is a share between 0 and 1, not {self.failure_budget}")
        at_least(self, 1, "max_length")
        if isinstance(share := self.held_out_share, float) and not 0 < share < 1:
            raise ValueError(f"--held-out as a share is more than 0 and less than 1, not {self.held_out}")

    @property
    def samples(self) -> Path:
        """The folder of tokenized samples."""
        return self.cache or self.store / "samples"

    def features(self, stage: Stage) -> Path:
        """The feature store of the stage's media (layout: dataloaders.store.layout)."""
        return store_of(self.store, split_of(stage))

    @property
    def held_out_share(self) -> float | Path | None:
        """`--held-out` as a share, or as the path of a file."""
        if self.held_out is None:
            return None
        try:
            return float(self.held_out)
        except ValueError:
            return Path(self.held_out)


def _of_recipe(name: str) -> Any:
    """A flag whose default is the stage's recipe; the help shows the values of stages 1, 2 and 3."""
    stages: tuple[Stage, ...] = (1, 2, 3)
    paper, tiny = (
        ", ".join(dict.fromkeys(str(getattr(recipe(size, s), name)) for s in stages)) for size in ("7b", "tiny")
    )
    return flag(None, shown=paper if paper == tiny else f"{paper}; tiny: {tiny}")


@dataclass(frozen=True)
class OptimizationConfig:
    """the recipe; a flag that is not given has the value of the stage's recipe (engine/recipes.py)"""

    epochs: int | None = _of_recipe("epochs")
    """passes over the data"""
    global_batch: int | None = _of_recipe("global_batch")
    """samples per optimizer step, over all devices"""
    learning_rate: float | None = _of_recipe("learning_rate")
    """peak learning rate"""
    adapter_rate_ratio: float | None = _of_recipe("adapter_rate_ratio")
    """learning rate of the vision adapter or projector, as a share of the peak learning rate"""
    head_rate_ratio: float | None = _of_recipe("head_rate_ratio")
    """learning rate of the coordinate heads, as a share of the peak learning rate"""
    warmup_ratio: float | None = _of_recipe("warmup_ratio")
    """share of the steps used for learning-rate warm-up"""
    weight_decay: float | None = _of_recipe("weight_decay")
    """AdamW's decoupled weight decay"""
    max_grad_norm: float | None = _of_recipe("max_grad_norm")
    """clip the global gradient norm to this; 0 for no clipping"""
    lora_rank: int | None = _of_recipe("lora_rank")
    """rank of the LoRA on q, k, v, o, gate, up and down; PG-Video-LLaVA has none unless this is given"""
    lora_alpha: float | None = _of_recipe("lora_alpha")
    """LoRA's alpha; its scale is alpha / rank"""
    label_smoothing: float | None = _of_recipe("label_smoothing")
    """label smoothing of the cross-entropy"""
    trajectory_weight: float | None = _of_recipe("trajectory_weight")
    """lambda, the weight of the L1 loss"""
    absent: Absent = "skip"
    """coordinates at (-1, -1) have no loss (skip), or are regressed to -1 as in the paper's text (regress)"""
    trajectory_normalizer: Normalizer = "present"
    """divide the L1 by the present coordinates, or by P * N per supervised token (paper, eq. 8)"""
    head_init: bool = True
    """start the trajectory head from stage 1's localization head (eq. 9)"""
    group_media: bool | None = _of_recipe("group_media")
    """keep questions about one video in one batch: their frames are computed once, and other samples meet in a step"""
    seed: int = 0
    """seed of the data order and of new weights"""


@dataclass(frozen=True)
class ParallelConfig:
    """devices, memory and speed; none of these flags changes a loss by more than rounding"""

    device: Literal["cpu", "cuda"] | None = None
    """device to train on; CUDA if there is one. Without one, 7b and 13b train on a CPU only with --device cpu"""
    token_budget: int | None = None
    """maximum computed rows of a micro-batch on one device; unless given, what its memory holds, up to 16384, and on a
    CPU 1024 a thread"""
    parallel: Parallel = "auto"
    """copy the frozen weights to every device (ddp) or shard them (fsdp); auto shards if they do not fit"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which the ranks sum the gradients; bfloat16 halves what crosses the network (docs/cluster.md)"""
    recompute: int | None = None
    """number of layers with activation checkpointing; unless given, as few as the memory allows"""
    compile: bool = False
    """fuse the layers' elementwise operations with torch.compile: a minute at the start; bench.step times both ways"""
    deterministic: bool = False
    """repeat gradients bitwise on a GPU too (torch.use_deterministic_algorithms); attention's backward pass gets slower"""
    workers: int = 2
    """threads of each rank that prepare the next steps' batches; with 0 each is prepared when it is needed"""
    stall_timeout: float = 600.0
    """seconds without any progress after which the ranks end and name the rank that they wait for"""

    def __post_init__(self) -> None:
        at_least(self, 1, "token_budget")
        at_least(self, 0, "workers", "recompute")
        if self.stall_timeout <= 0:
            raise ValueError(f"--stall-timeout must be positive, not {self.stall_timeout}")


@dataclass(frozen=True)
class RunConfig(LogFlags):
    """what to run, where to write, what to log"""

    stage: Literal["1", "2", "3", "all"] = "all"
    """which stage to train"""
    trajectory_stage: bool = True
    """if no, stage 3 starts from stage 1 and `all` leaves stage 2 out (the paper's ablation)"""
    output: Path = Path("runs/pite")
    """folder to write stage1/, stage2/, stage3/ to; an interrupted run in it is resumed"""
    init: Path | None = None
    """output of an earlier stage to start from, instead of the previous stage in OUTPUT"""
    max_steps: int | None = None
    """stop after this many optimizer steps of a stage and save; the schedule stays that of the whole stage"""
    checkpoint_every: int = 100
    """optimizer steps between checkpoints"""
    keep_checkpoints: int = 2
    """number of the newest whole checkpoints to keep on disk"""
    start_over_if_damaged: bool = False
    """restart a stage at step 0 if all its checkpoints are damaged; without it that is an error"""
    validate_every: int | None = None
    """optimizer steps between validations: losses of the held-out samples, at the last step too"""
    profile: tuple[int, int] | None = None
    """first and last step to profile, from 1: a trace, and on CUDA a memory history, in OUTPUT/stageN/profile"""
    wandb: str | None = None
    """log the metrics to this project on Weights & Biases too"""
    dry_run: bool = False
    """print parameters, tokens, steps, memory and hours without training"""
    devices: tuple[int, ...] = (1, 8)
    """with --dry-run: numbers of devices to print memory and hours for"""
    measured: Path = Path("bench/results")
    """with --dry-run: folder of bench.step's results; a device's measured efficiency replaces the assumed one"""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_steps", "checkpoint_every", "keep_checkpoints", "validate_every")
        if any(n < 1 for n in self.devices):
            raise ValueError(f"--devices takes numbers of at least 1, not {' '.join(map(str, self.devices))}")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"--profile takes a first and a last step, counted from 1, not {self.profile}")
        if self.stage == "2" and not self.trajectory_stage:
            raise ValueError("--stage 2 is the trajectory stage: leave --no-trajectory-stage out")

    @property
    def stages(self) -> tuple[Stage, ...]:
        if self.stage == "all":
            return (1, 2, 3) if self.trajectory_stage else (1, 3)
        return (cast(Stage, int(self.stage)),)

    def directory(self, stage: Stage) -> Path:
        """The folder of a stage: checkpoints, metrics, and its result in `final`."""
        return self.output / f"stage{stage}"


@dataclass(frozen=True)
class TrainConfig:
    """Train PiTe's three stages, or another family's. A flag that is not given has the value of the stage's recipe (engine/recipes.py)."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        at_least(self.model, 1, "num_points")
        if self.model.size == "tiny" and self.model.llm is None:
            raise ValueError(
                "--model tiny needs --llm, engine/tiny/parts/vicuna or one that `python -m engine.tiny` made"
            )
        if self.run.stage != "all" and int(self.run.stage) not in self.choices.stages:
            raise ValueError(f"--family {self.model.family} has no stage {self.run.stage}: leave --stage out")
        if self.data.transcripts is not None and not self.choices.marks:
            raise ValueError(f"--transcripts: --family {self.model.family} reads none; leave the flag out")
        for stage in self.stages:
            self.recipe(stage)

    @property
    def choices(self) -> Family:
        """The choices of the model family."""
        return family(self.model.family)

    @property
    def video_features(self) -> Path:
        """The feature store whose videos give the model's numbers of frames and channels."""
        return self.data.features(max(2, self.choices.stages[0]))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages to train, in order."""
        return tuple(stage for stage in self.run.stages if stage in self.choices.stages)

    @property
    def held_out(self) -> float | Path | None:
        """The samples to validate on: a share, a file, or None."""
        return self.data.held_out_share or (0.01 if self.run.validate_every else None)

    def start(self, stage: Stage) -> Path | None:
        """Output of the earlier stage that `stage` starts from; None to start from the language model."""
        before = self.before(stage)
        if self.run.init is not None or before is None or self.model.llm == RANDOM:
            return self.run.init
        return self.run.directory(before) / "final"

    def before(self, stage: Stage) -> Stage | None:
        """The stage that `stage` builds on."""
        if stage == self.choices.stages[0]:
            return None
        return 2 if stage == 3 and self.run.trajectory_stage else 1

    def recipe(self, stage: Stage) -> Recipe:
        """The stage's recipe, with the flags that were given in place of its values."""
        given = {f.name: getattr(self.optimization, f.name) for f in fields(self.optimization) if f.name != "seed"}
        base = recipe(self.model.size, stage, self.model.family)
        if self.choices.marks and self.data.video_first == "always":
            base = replace(base, group_media=True)
        return replace(base, **{k: v for k, v in given.items() if v is not None})
