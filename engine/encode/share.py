"""Which videos the CPU decodes while the GPU decodes the others: a share of them, chosen by a hash of their names.

Two decoders give slightly different colours. So the choice depends on nothing but the name and the share, and the share is
stored with the features: a run that was killed and resumed, on another machine or with other ranks, stores the same bytes.
Not yet run on a GPU; the default share is an estimate.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dataloaders.files import read_json_object, temporary_sibling

FILE = "decode.json"

CORE_RATE, ENGINE_RATE = 441.0, 1735.0
"""Frames/s of 720p H.264 that one core and one NVDEC engine are assumed to decode (measured with PyAV; NVIDIA's table)."""

_FOR_DECODING = 0.75
"""Share of the cores' time that is left for decoding: they also probe the GPU's files."""


def estimated_share(workers: int, engines: int) -> float:
    """Share of the videos that makes `workers` cores and as many NVDEC engines finish together, in hundredths."""
    cores = _FOR_DECODING * workers * CORE_RATE
    return round(cores / (cores + engines * ENGINE_RATE), 2)


def stored_share(store: Path) -> float | None:
    """The share of a store; None where none is stored. Raises ValueError for a damaged file."""
    path = store / FILE
    if not path.exists():
        return None
    share = read_json_object(path).get("cpu_share")
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ValueError(
            f"{path}: cpu_share is {share!r}, not a share between 0 and 1; delete the file and the videos' store"
        )
    return float(share)


def agreed_share(store: Path, wanted: float | None, estimate: float, write: bool) -> float:
    """The store's share, else `wanted` (the flag), else `estimate`; with `write` the first process stores it for all.

    Raises ValueError for a flag that differs from the stored share.
    """
    share = stored_share(store)
    if share is None:
        share = estimate if wanted is None else wanted
        if not write:
            return share
        store.mkdir(parents=True, exist_ok=True)
        temporary = temporary_sibling(store / FILE)
        temporary.write_text(json.dumps({"cpu_share": share}) + "\n")
        try:
            os.link(temporary, store / FILE)  # Unlike a rename, it fails where another process was first.
        except OSError:
            if not (store / FILE).exists():  # A file system without links.
                temporary.replace(store / FILE)
        temporary.unlink(missing_ok=True)
        share = stored_share(store)
        assert share is not None
    if wanted is not None and wanted != share:
        raise ValueError(
            f"--cpu-share is {wanted:g}, but {store} was begun with {share:g}: leave the flag out, or take another --store"
        )
    return share
