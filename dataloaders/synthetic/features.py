"""Random features for a world's media, for tests and throughput runs that do not depend on their contents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataloaders.formats import present_splits
from dataloaders.media import list_media
from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest


def write_random_features(data: Path, output: Path, num_frames: int, channels: int, seed: int = 0) -> None:
    """Fill OUTPUT/images and OUTPUT/videos with a (1, channels) or (num_frames, channels) record per media item."""
    rng = np.random.default_rng(seed)
    for folder, tokens, kind in (("images", 1, "image"), ("videos", num_frames, "video")):
        manifest = Manifest("none", tokens, "linspace", "none", tokens, channels)
        store = FeatureStore.create_or_open(output / folder, manifest)
        media = [m for m in list_media(data, present_splits(data)).media if m.kind == kind]
        with FeatureWriter(store) as writer:
            writer.add({m.key: rng.standard_normal((tokens, channels)) for m in media})
