"""Decode many files on all cores, with results in order. A bad file fails alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from dataloaders.decode import TIME_LIMIT
from dataloaders.decode.facts import Facts
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.sampling import Sampling
from dataloaders.decode.stills import decode_image
from dataloaders.decode.video import sample_video
from dataloaders.decode.workers import TaskLost, Workers
from dataloaders.records import Media

if TYPE_CHECKING:
    from torch import Tensor

Reader = Literal["pyav", "torchcodec"]


@dataclass(frozen=True)
class Decoded:
    """The result of decoding one file: cropped frames (n, S, S, 3) uint8, or the reason why there are none.

    frames  a NumPy array, or a tensor on the GPU that decoded it
    by      the decoder, and after a fallback the reason for it
    """

    media: Media
    frames: np.ndarray | Tensor | None = None
    reason: str = ""
    by: str = "PyAV"
    facts: Facts = field(default_factory=Facts)


@dataclass(frozen=True)
class Cropped:
    """Cropped frames (n, S, S, 3) uint8 of a file, and what is reported of it."""

    frames: np.ndarray
    facts: Facts = field(default_factory=Facts)


Decode = Callable[[Media], np.ndarray | Cropped]


def is_fallback(by: str) -> bool:
    """Whether the `by` of a Decoded names the reason of a fallback to PyAV, as in "PyAV (rotated)"."""
    return by.startswith("PyAV (")


class Decoder(Protocol):
    """Interface of decoders: `with decoder: for decoded in decoder.map(media)`. In order; a bad file fails alone."""

    def map(self, media: Iterable[Media]) -> Iterator[Decoded]:
        """Yield one result for each of `media`, in their order."""

    def __enter__(self) -> Decoder: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def decode_file(
    media: Media, num_frames: int, preprocess: Preprocess, reader: Reader = "pyav", sampling: Sampling = "index"
) -> Cropped:
    """Cropped frames of a video, or the one frame of a still. Raises DecodeError."""
    if media.kind == "image":
        return Cropped(preprocess.cropped(decode_image(media.path))[None])
    if reader == "torchcodec":
        from dataloaders.decode.torchcodec import sample_video as sample_with_torchcodec

        sampled = sample_with_torchcodec(media.path, num_frames, media.clip, preprocess.cropped, sampling)
    else:
        sampled = sample_video(media.path, num_frames, media.clip, preprocess.cropped, sampling)
    return Cropped(np.stack(sampled.frames), sampled.facts)


def decode_cropped(media: Media, num_frames: int, preprocess: Preprocess, reader: Reader = "pyav") -> np.ndarray:
    """The frames (n, S, S, 3) uint8 of `decode_file`."""
    return decode_file(media, num_frames, preprocess, reader).frames


class DecodePool:
    """Decodes media in `workers` processes, in order, with bounded prefetch; 0 decodes in this process.

    decode      a function that can be pickled. An exception that it raises, and the death of its process, become the
                reason of a Decoded without frames
    ahead       files to prefetch per worker, which bounds the memory
    time_limit  seconds after which a file's process is killed and the file counts as failed; not applied with 0 workers
    by          name of the decoder in the results
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
            yield result_of(*pending.popleft())

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.workers is not None:
            self.workers.close()


def result_of(media: Media, future: Future[Any]) -> Any:
    """Wait for a task about `media`. Where its process was lost, returns a Decoded with that reason."""
    try:
        return future.result()
    except TaskLost as error:
        return Decoded(media, reason=f"{media.path}: {error}")


def guarded(decode: Decode, media: Media, by: str = "PyAV") -> Decoded:
    """Decode, and turn any exception into a reason."""
    try:
        found = decode(media)
        found = found if isinstance(found, Cropped) else Cropped(found)
        return Decoded(media, found.frames, by=by, facts=found.facts)
    except DecodeError as error:
        return Decoded(media, reason=str(error))
    except Exception as error:  # A damaged file can raise anything, and must not stop the others.
        return Decoded(media, reason=f"{media.path}: {type(error).__name__}: {error}")
