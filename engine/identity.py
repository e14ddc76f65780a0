"""The identity of a stage's training: all that its result depends on.

It is saved in checkpoints and in the lineage of a finished stage. The same command continues or reports a finished
stage only if nothing in it has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataloaders.files import sha256
from engine.recipes import Recipe
from pite import checkpoint
from pite.config import PiTeConfig


@dataclass(frozen=True)
class ModelIdentity:
    """What is the same in all stages of a run.

    language_model  checksums of its weights, or the size and seed of random ones
    encoder         of the features: a checksum, or for imported features the name they were imported with
    arithmetic      `PiTeConfig.arithmetic`
    """

    language_model: str
    encoder: str
    num_frames: int
    num_points: int
    arithmetic: dict[str, Any]

    @staticmethod
    def of(config: PiTeConfig, language_model: str, encoder: str) -> ModelIdentity:
        return ModelIdentity(language_model, encoder, config.num_frames, config.num_points, config.arithmetic)


@dataclass(frozen=True)
class Identity:
    """The inputs and settings of one stage.

    earlier_stages   checksums of the adapter and heads of each stage that is merged, in order
    features         the manifest of the feature store
    data             checksum of the training samples
    feature_records  checksum of their features
    left_out         counts and a checksum of the samples that are left out, or None
    held_out         checksum of the samples to validate on, or None
    """

    model: ModelIdentity
    earlier_stages: list[str]
    recipe: Recipe
    dtype: str
    frozen_dtype: str | None
    seed: int
    features: dict[str, Any]
    data: str
    feature_records: str
    left_out: dict[str, Any] | None
    held_out: str | None

    def as_dict(self) -> dict[str, Any]:
        """The identity as JSON gives it back: lists instead of tuples."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def stage_checksums(merged: list[str]) -> list[str]:
    """Checksums of adapter and heads of earlier stages' outputs, in order."""
    return [sha256(Path(path) / file) for path in merged for file in (checkpoint.ADAPTER_FILE, checkpoint.HEADS_FILE)]


def first_difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs, such as ("recipe.epochs", 1, 2); None if the two are equal."""
    flat, other = _flat(one), _flat(two)
    for name in sorted({*flat, *other}):
        if flat.get(name) != other.get(name):
            return name, flat.get(name), other.get(name)
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
