"""CLIP at its real shape on a CPU: frames per second, and the gain from a last layer for the CLS token only."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.clip import EVERY_TOKEN, OURS, measure, save_vit_l
from pite.clip import ClipEncoder


def test_vit_l(tmp_path: Path) -> None:
    encoder = ClipEncoder(str(save_vit_l(tmp_path)))
    rows = measure(encoder, frames=1, rounds=2, only=(OURS, EVERY_TOKEN))
    print(f"\nViT-L/14, {torch.get_num_threads()} threads, {encoder.flops_per_frame:.3g} FLOPs a frame")
    for row in rows:
        assert row.problem is None and row.frames_per_second is not None, row.problem
        useful = row.frames_per_second * encoder.flops_per_frame / 1e9
        print(f"  {row.implementation:18} {row.slow:.3f} to {row.fast:.3f} frames/s, {useful:.0f} useful GFLOP/s")
