"""The sound of a video as the models take it, and which of it is speech."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import av
import numpy as np

from dataloaders.decode.packets import open_container
from dataloaders.decode.readable import DecodeError, check_readable
from dataloaders.errors import reason

RATE = 16_000
"""Samples per second that Whisper, silero-vad and PocketSphinx take."""

LONGEST = 30.0
"""Seconds of a segment, which are what Whisper looks at."""

SPEECH = ("Speech", "Male speech, man speaking", "Female speech, woman speaking")
MUSIC = "Music"
TOP, LEAST_LOGIT, MARGIN = 3, -5.0, 1.1
"""Tags that the published filter looks at, their smallest logit, and by how much music may exceed speech."""


def read_sound(path: Path) -> np.ndarray:
    """The first audio stream as mono float32 (n,) at `RATE`, -1 to 1; empty for a file without sound.

    Raises DecodeError for a file that cannot be decoded.
    """
    check_readable(path)
    try:
        with open_container(path) as container:
            frames = container.decode(audio=0) if container.streams.audio else iter(())
            return np.concatenate([np.zeros(0, np.float32), *_resampled(frames)])
    # PyAV raises ValueError for sound that no resampler takes.
    except (av.FFmpegError, OSError, ValueError) as error:
        raise DecodeError(f"{path}: {reason(error)}") from None


def _resampled(frames: Iterable[av.AudioFrame]) -> Iterator[np.ndarray]:
    """Mono float32 at `RATE`. A resampler takes one format, so each change of it, as in a broadcast, gets a new one."""
    for _, same in groupby(frames, lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)):
        resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        for frame in chain(same, [None]):
            yield from (new.to_ndarray().ravel() for new in resampler.resample(frame))


def voice_segments(sound: np.ndarray, threshold: float = 0.5) -> list[tuple[int, int]]:
    """First sample and end of each stretch of speech, at most `LONGEST` seconds, by silero-vad.

    Raises ValueError if silero-vad is not installed.
    """
    silero, model = _silero()
    import torch

    if not len(sound):
        return []
    # It resets the model's state first, so the sounds before change nothing.
    found = silero.get_speech_timestamps(
        torch.from_numpy(sound), model, threshold=threshold, sampling_rate=RATE, max_speech_duration_s=LONGEST
    )
    return [(each["start"], each["end"]) for each in found]


@lru_cache(1)
def _silero() -> tuple[Any, Any]:
    """silero-vad and its model, loaded once per process."""
    try:
        import silero_vad
    except ImportError:
        raise ValueError("voice activity needs silero-vad: pip install silero-vad") from None
    return silero_vad, silero_vad.load_silero_vad()


def is_speech(tags: Sequence[tuple[str, float]]) -> bool:
    """The published filter: whether the tags (name, logit), most probable first, are those of speech.

    Speech, a man's or a woman's, must be one of the first three tags above the smallest logit. Where music is one of
    them too, it may exceed the first of the speech tags by 1.1 at most.
    """
    best = [tag for tag in tags[:TOP] if tag[1] > LEAST_LOGIT]
    speech = [logit for name, logit in best if name in SPEECH]
    music = [logit for name, logit in best if name == MUSIC]
    return bool(speech) and not (music and music[0] - speech[0] > MARGIN)
