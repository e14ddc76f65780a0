"""What a session of transformers holds after each frame, and the masks that a model makes, with and without forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataloaders.annotation import video_masks
from dataloaders.annotation.steps import Masks, Phrase
from dataloaders.annotation.tracking import Moments
from tests.media import write_video

FRAMES = 25


def held(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of the tensors in an object."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if not isinstance(value, list | tuple):
        value = (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
    return sum(held(each, seen) for each in value)


def check_forgetting(
    tracker: video_masks.VideoTracker,
    model: torch.nn.Module,
    folder: Path,
    masks: Masks,
    monkeypatch: pytest.MonkeyPatch,
) -> list[int]:
    """Bytes of a session after each frame. Asserts that the masks' logits are those of a session that forgets nothing.

    model  the one that has the memory
    """
    write_video(folder / "v.mp4", FRAMES)
    phrases = [[Phrase("a red circle", 0) for _ in event] for event in masks]
    forget, logits, sizes = video_masks.forget, [], []

    def run(forgets: bool) -> dict[int, list[np.ndarray]]:
        def spy(session: Any, model: torch.nn.Module) -> None:
            if forgets:
                forget(session, model)
            sizes[-1].append(held(session))

        for module in ("video_masks", "sam3"):
            monkeypatch.setattr(f"dataloaders.annotation.{module}.forget", spy)
        logits.append([])
        sizes.append([])
        (event,) = tracker.carry(folder / "v.mp4", [Moments(np.arange(FRAMES))], masks, phrases)
        assert event.session is None, "a finished event holds nothing"
        return event.carried

    hook = model.register_forward_hook(lambda _, given, output: logits[-1].append(output.pred_masks.clone()))
    all_kept, forgotten = run(False), run(True)
    hook.remove()
    assert len(logits[0]) >= FRAMES - 1
    assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))
    for j, own in all_kept.items():
        assert all((a == b).all() for a, b in zip(own, forgotten[j], strict=True))
    assert sizes[0][-1] > sizes[1][-1]
    return sizes[1]
