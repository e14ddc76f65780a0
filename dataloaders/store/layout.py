"""Where the features of each split are in a folder of feature stores.

    FEATURES/images       stage1, encoded by engine.encode
    FEATURES/videos       stage2, stage3 and evaluation, encoded by engine.encode
    FEATURES/{split}      a split's own store, such as FEATURES/stage2 with imported features

A store holds the features of one encoder. So features of another origin get a store of their own, and engine.encode
leaves that split alone and encodes the others.
"""

from __future__ import annotations

from pathlib import Path

from dataloaders.formats import Split

MANIFEST = "manifest.json"
"""Name of the file that makes a folder a store."""


def has_own_store(features: Path, split: Split) -> bool:
    """Whether a split has a store of its own, which engine.encode does not fill."""
    return (features / split / MANIFEST).is_file()


def store_of(features: Path, split: Split) -> Path:
    """The store of a split's features: its own one if that exists, else the one that engine.encode fills."""
    if has_own_store(features, split):
        return features / split
    return features / ("images" if split == "stage1" else "videos")
