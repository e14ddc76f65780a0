"""Many files at once: decoding on every core, results in order, and a bad file that costs itself and no other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.video import DecodeError, decode_image, decode_video
from dataloaders.decode.workers import TaskLost, Workers
from dataloaders.records import Media

if TYPE_CHECKING:
    from torch import Tensor

Decode = Callable[[Media], np.ndarray]
Reader = Literal["pyav", "torchcodec"]

TIME_LIMIT = 600.0
"""Seconds that one file may take. An hour of 720p takes about two minutes of a core."""


@dataclass(frozen=True)
class Decoded:
    """What came of one file: cropped frames (n, S, S, 3) uint8, or the reason why there are none.

    frames  a NumPy array, or a tensor on the GPU that decoded it
    by      what decoded it, and why that where it is not the usual
    """

    media: Media
    frames: np.ndarray | Tensor | None = None
    reason: str = ""
    by: str = "PyAV"


class Decoder(Protocol):
    """What every back end is: `with decoder: for decoded in decoder.map(media)`, in order, files failing alone."""

    def map(self, media: Iterable[Media]) -> Iterator[Decoded]:
        """Yield one result for each of `media`, in their order."""

    def __enter__(self) -> Decoder: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def decode_cropped(media: Media, num_frames: int, preprocess: Preprocess, reader: Reader = "pyav") -> np.ndarray:
    """Frames of a video or the one of a still, cropped: (n, S, S, 3) uint8. Raises DecodeError."""
    if media.kind == "image":
        return preprocess.cropped(decode_image(media.path))[None]
    if reader == "torchcodec":
        from dataloaders.decode.torchcodec import decode_video as decode_with_torchcodec

        return decode_with_torchcodec(media.path, num_frames, media.clip, preprocess.cropped)
    return decode_video(media.path, num_frames, media.clip, preprocess.cropped)


class DecodePool:
    """Decodes media in `workers` processes, in order, a bounded number ahead; 0 decodes in this process.

    decode      a function that can be pickled; whatever it raises becomes the reason of a Decoded without frames, and so
                does the death of its process
    ahead       files decoded but not yet asked for, per worker: what bounds the memory
    time_limit  seconds after which a file's process is killed, and the file counts as failed; not kept by 0 workers
    by          what the results say that they were decoded by
    """

    def __init__(
        self, decode: Decode, workers: int, ahead: int = 2, time_limit: float | None = TIME_LIMIT, by: str = "PyAV"
    ) -> None:
        if workers < 0:
            raise ValueError(f"the number of workers must be 0 or more, not {workers}")
        self._decode, self._ahead = partial(guarded, decode, by=by), workers * (1 + ahead)
        self.workers = Workers(workers, time_limit) if workers else None

    def map(self, media: Iterable[Media]) -> Iterator[Decoded]:
        """Yield one result for each of `media`, in their order."""
        if self.workers is None:
            yield from map(self._decode, media)
            return
        waiting = iter(media)
        pending: deque[tuple[Media, Future[Decoded]]] = deque()
        while True:
            while len(pending) < self._ahead and (item := next(waiting, None)) is not None:
                pending.append((item, self.workers.submit(self._decode, item)))
            if not pending:
                return
            yield answer_of(*pending.popleft())

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.workers is not None:
            self.workers.close()


def answer_of(media: Media, future: Future[Any]) -> Any:
    """Wait for a task about `media`; where its process was lost, a Decoded that says so."""
    try:
        return future.result()
    except TaskLost as error:
        return Decoded(media, reason=f"{media.path}: {error}")


def guarded(decode: Decode, media: Media, by: str = "PyAV") -> Decoded:
    """Decode, turning whatever is raised into a reason."""
    try:
        return Decoded(media, decode(media), by=by)
    except DecodeError as error:
        return Decoded(media, reason=str(error))
    except Exception as error:  # A damaged file can raise anything; it must not stop a hundred thousand good ones.
        return Decoded(media, reason=f"{media.path}: {type(error).__name__}: {error}")
