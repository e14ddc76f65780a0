"""Trainable modules and hyper-parameters of each stage: the paper's table, and the demo's tiny model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dataloaders.formats import Stage
from pite.families import Name

if TYPE_CHECKING:
    from pite.model import Head

Size = Literal["tiny", "7b", "13b"]
Absent = Literal["skip", "regress"]
Normalizer = Literal["present", "paper"]

LANGUAGE_MODELS: dict[Name, dict[str, str]] = {
    "pite": {"7b": "lmsys/vicuna-7b-v1.5", "13b": "lmsys/vicuna-13b-v1.5"},
    "pg-video-llava": {"7b": "liuhaotian/llava-v1.5-7b", "13b": "liuhaotian/llava-v1.5-13b"},
}
"""The bases of each family: Vicuna, and LLaVA-1.5, whose projector is a base too."""

RANDOM = "random"
"""In place of a language model's name: random weights of the size's shape, for throughput runs."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one stage. Defaults are the paper's (section 4.3, table 2) where it names them.

    trainable_modules  modules that are trained in addition to the LoRA
    lora_rank          0: no LoRA
    head               the head whose L1 is added to the cross-entropy; None for cross-entropy alone
    max_grad_norm      the global gradient norm is clipped to this; 0 for never (paper: not given; predecessors: 1)
    adapter_rate_ratio learning rate of the vision adapter or projector, as a share of `learning_rate`
    head_rate_ratio    learning rate of the coordinate heads, as a share of `learning_rate`
    warmup_ratio       share of the steps with linear warm-up of the learning rate; then a cosine to 0
    absent             "skip": (-1, -1) has no loss; "regress": every answer token has a trajectory, -1 where none is
                       known, as in the paper's text
    trajectory_normalizer  "present": the L1 sum is divided by the coordinates with a loss; "paper" (eq. 8): by P * N
                       for each supervised token
    head_init          start the trajectory head from the localization head (stage 2, eq. 9)
    group_media        keep questions about one video in one batch, where they differ by the question alone and their
                       frames are computed once
    align_adapter      start the adapter as the linear map from features to the captions' words (stage 1)
    """

    trainable_modules: tuple[str, ...]
    head: Head | None
    epochs: int
    learning_rate: float = 1e-4
    adapter_rate_ratio: float = 1.0
    head_rate_ratio: float = 1.0
    warmup_ratio: float = 0.03
    global_batch: int = 256
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_rank: int = 64
    lora_alpha: float = 128.0
    label_smoothing: float = 0.1
    trajectory_weight: float = 1.0
    absent: Absent = "skip"
    trajectory_normalizer: Normalizer = "present"
    head_init: bool = True
    group_media: bool = False
    align_adapter: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.lora_rank < 0 or (self.lora_rank == 0 and "mm_projector" not in self.trainable_modules):
            raise ValueError(f"--lora-rank must be at least 1, not {self.lora_rank}: a stage of PiTe trains a LoRA")
        for name in ("learning_rate", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}")
        for name in ("adapter_rate_ratio", "head_rate_ratio", "weight_decay", "max_grad_norm", "trajectory_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(self, name)}")
        for name in ("warmup_ratio", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 0 and below 1, not {getattr(self, name)}"
                )


PAPER: dict[Stage, Recipe] = {
    1: Recipe(trainable_modules=("vision_adapter", "localization_projector"), head="localization", epochs=1),
    2: Recipe(trainable_modules=("trajectory_projector",), head="trajectory", epochs=2),
    3: Recipe(trainable_modules=(), head=None, epochs=2),
}

# A model of a million weights needs twenty times the learning rate of a model of seven billion. But at that rate one
# step of Adam moves the output of a head, computed from 128 numbers, by up to a fifth of the frame: so heads get a
# tenth of it.
_TINY: dict[str, Any] = {
    "learning_rate": 2e-3,
    "head_rate_ratio": 0.1,
    "lora_rank": 32,
    "lora_alpha": 32.0,
    "global_batch": 32,
    "trajectory_weight": 10.0,
}
_TINY_STILLS: dict[str, Any] = {
    "learning_rate": 2e-4,
    "adapter_rate_ratio": 25.0,
    "head_rate_ratio": 5.0,
    "trajectory_weight": 25.0,
}
TINY: dict[Stage, Recipe] = {
    # The larger weight: a still has one position only, and positions are all that stage 2 needs from the adapter.
    # The smaller rate of the LoRA: stills show no motion, and at stage 2's rate the language model forgets to read it. The
    # adapter starts from random features' directions and needs the larger one.
    1: replace(PAPER[1], **{**_TINY, **_TINY_STILLS}, epochs=3, align_adapter=True),
    2: replace(PAPER[2], **_TINY, epochs=4),
    3: replace(PAPER[3], **{**_TINY, "learning_rate": 1e-3}, epochs=1, group_media=True),
}


PG_VIDEO_LLAVA = Recipe(
    trainable_modules=("mm_projector", "vid_edges"),
    head=None,
    epochs=3,
    learning_rate=2e-5,
    global_batch=32,
    lora_rank=0,
    label_smoothing=0.0,
)
"""The published training of PG-Video-LLaVA, which has one stage: no LoRA, no smoothing."""


def recipe(size: Size, stage: Stage, family: Name = "pite") -> Recipe:
    if family == "pg-video-llava":
        return replace(PG_VIDEO_LLAVA, learning_rate=2e-3, epochs=1) if size == "tiny" else PG_VIDEO_LLAVA
    return (TINY if size == "tiny" else PAPER)[stage]
