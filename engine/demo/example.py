"""The held-out video that the demo chats about and draws."""

from __future__ import annotations

from pathlib import Path

from pite.evaluate.grounding import read_truth


def example_event(captions: Path, objects: int = 2) -> tuple[str, str]:
    """A held-out video and its first sentence: the first video with this many objects, or else the first video."""
    truth = read_truth(captions)
    video = next((video for video, events in truth.items() if len(events.intervals) == objects), next(iter(truth)))
    return video, truth[video].sentences[0]
