"""The model families: each a record of the choices in which they differ. Decoder, packing, plan and loop are the same.

A family is chosen by its name (`--family`), and a trained model's config.json holds it. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dataloaders.decode.sampling import Sampling
from dataloaders.formats import Stage

Name = Literal["pite", "pg-video-llava"]
Extractor = Literal["image_embeds", "pooled_patches"]
Resize = Literal["crop", "squash"]
Projector = Literal["linear", "mlp2x_gelu"]


@dataclass(frozen=True)
class Family:
    """What differs between families.

    name        value of `--family`, and of `family` in config.json
    sampling    rule that chooses a video's frames
    resize      how a frame becomes a square
    clip        default of `--clip`
    extractor   features of a video: CLIP's image embedding of each frame, or patches of its last layer but one, pooled to a
                row for each frame and a row for each place in the frame
    projector   from a feature to the language model's embedding: one linear layer, or two with a GELU between them
    modules     attributes of `pite.model.PiTe` that the family adds to a language model; a recipe trains some of them
    marks       whether a video stands between two tokens of its own, whose embeddings are trained; three tokens are added to
                the language model's vocabulary: for a feature, for the start and for the end
    stages      training stages, in order; their losses and hyper-parameters are in engine/recipes.py
    files       annotation files that its stages read; None for all
    shard_records  records per shard of a feature store, unless `--shard-records` is given
    """

    name: Name
    sampling: Sampling
    resize: Resize
    clip: str
    extractor: Extractor
    projector: Projector
    modules: tuple[str, ...]
    marks: bool
    stages: tuple[Stage, ...]
    files: tuple[str, ...] | None
    shard_records: int


PITE = Family(
    name="pite",
    sampling="index",
    resize="crop",
    clip="openai/clip-vit-large-patch14",
    extractor="image_embeds",
    projector="linear",
    modules=("vision_adapter", "localization_projector", "trajectory_projector"),
    marks=False,
    stages=(1, 2, 3),
    files=None,
    shard_records=1024,
)
"""PiTe (ECCV 2024)."""

PG_VIDEO_LLAVA = Family(
    name="pg-video-llava",
    sampling="segments",
    resize="squash",
    clip="openai/clip-vit-large-patch14-336",
    extractor="pooled_patches",
    projector="mlp2x_gelu",
    modules=("mm_projector", "vid_edges"),
    marks=True,
    stages=(3,),
    files=("video_instruct.json",),
    shard_records=128,
)
"""PG-Video-LLaVA (arXiv 2311.13435). Its one stage reads VideoInstruct100K, which is in the folder of PiTe's third."""

MODULES = (*PITE.modules, *PG_VIDEO_LLAVA.modules)
"""Attributes that any family adds to a language model."""

ADDED_TOKENS = 3
"""Tokens that a family with `marks` adds at the end of the vocabulary: for a feature, for the start, for the end."""


def family(name: Name) -> Family:
    return PITE if name == "pite" else PG_VIDEO_LLAVA
