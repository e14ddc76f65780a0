"""Many files at once: decoding on every core, results in order, and a bad file that costs itself and no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np

from dataloaders.preprocess import Preprocess
from dataloaders.records import Media
from dataloaders.video import DecodeError, decode_image, decode_video

Decode = Callable[[Media], np.ndarray]


@dataclass(frozen=True)
class Decoded:
    """What came of one file: cropped frames (n, S, S, 3) uint8, or the reason why there are none."""

    media: Media
    frames: np.ndarray | None = None
    reason: str = ""


def decode_cropped(media: Media, num_frames: int, preprocess: Preprocess) -> np.ndarray:
    """Frames of a video or the one of a still, cropped: (n, S, S, 3) uint8. Raises DecodeError."""
    if media.kind == "image":
        return preprocess.cropped(decode_image(media.path))[None]
    return decode_video(media.path, num_frames, media.split, preprocess.cropped)


class DecodePool:
    """Decodes media in `workers` processes, in order, a bounded number ahead; 0 decodes in this process.

    decode  a function that can be pickled; whatever it raises becomes the reason of a Decoded without frames, and so
            does the death of its process
    ahead   files decoded but not yet asked for, per worker: what bounds the memory
    """

    def __init__(self, decode: Decode, workers: int, ahead: int = 2) -> None:
        if workers < 0:
            raise ValueError(f"the number of workers must be 0 or more, not {workers}")
        self._decode, self._workers, self._ahead = partial(_guarded, decode), workers, ahead
        self._pool = _executor(workers) if workers else None

    def map(self, media: Iterable[Media]) -> Iterator[Decoded]:
        """Yield one result for each of `media`, in their order."""
        if self._pool is None:
            yield from map(self._decode, media)
            return
        waiting = iter(media)
        pending: deque[tuple[Media, Future[Decoded]]] = deque()
        while True:
            while len(pending) < self._workers * (1 + self._ahead) and (item := next(waiting, None)) is not None:
                pending.append((item, self._submit(item)))
            if not pending:
                return
            item, future = pending.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                # Nobody knows whose file it was, so the files in flight go one by one until the pool is whole again.
                yield from self._one_by_one([item, *(other for other, _ in pending)])
                pending.clear()
                self._pool = _executor(self._workers)

    def _submit(self, media: Media) -> Future[Decoded]:
        assert self._pool is not None
        try:
            return self._pool.submit(self._decode, media)
        except BrokenProcessPool as error:
            broken: Future[Decoded] = Future()
            broken.set_exception(error)
            return broken

    def _one_by_one(self, media: list[Media]) -> Iterator[Decoded]:
        assert self._pool is not None
        self._pool.shutdown(cancel_futures=True)
        pool = _executor(1)
        try:
            for item in media:
                try:
                    yield pool.submit(self._decode, item).result()
                except BrokenProcessPool:
                    yield Decoded(item, reason=f"{item.path}: the process that decoded it died")
                    pool = _executor(1)
        finally:
            pool.shutdown()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _executor(workers: int) -> ProcessPoolExecutor:
    # A fork would copy locks and device contexts in whatever state they are.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


def _start_worker() -> None:
    # An interrupt is for the parent, which then shuts the pool down.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End with the parent, however it ended; workers would wait for its next order for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _guarded(decode: Decode, media: Media) -> Decoded:
    try:
        return Decoded(media, decode(media))
    except DecodeError as error:
        return Decoded(media, reason=str(error))
    except Exception as error:  # A damaged file can raise anything; it must not stop a hundred thousand good ones.
        return Decoded(media, reason=f"{media.path}: {type(error).__name__}: {error}")
