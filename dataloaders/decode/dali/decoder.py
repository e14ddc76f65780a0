"""DALI as a decoder: many files at once, resized and cropped on the device that decodes them (NVDEC on a GPU).

PyAV is the fallback, in worker processes that can be killed:

- Files that DALI does not support go to PyAV at once.
- When a batch fails, DALI does not report which file was bad, and its pipeline cannot be used again. The decoder builds
  a new pipeline and bisects the batch until each bad file is alone; those files go to PyAV.
- When DALI gives no result within the time limit, its pipeline is abandoned, because it cannot be interrupted. The
  batch goes to PyAV, and a new pipeline decodes the next one.
- DALI returns black frames, without an error, for frames that a damaged file lacks. So PyAV decodes a file again whose
  last frame is black.
- Another version of DALI or another GPU may decode differently. So PyAV also decodes the first file of each codec and
  colour matrix; if the frames differ, PyAV decodes all files of that kind.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataloaders.decode import TIME_LIMIT
from dataloaders.decode.dali.pipeline import Pipeline, require, root_cause
from dataloaders.decode.dali.request import FRAME_MEMORY, DecodeRequest, prepare
from dataloaders.decode.decoder import Decoded, decode_file, guarded, result_of
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.sampling import Sampling
from dataloaders.decode.workers import Workers
from dataloaders.records import Media

if TYPE_CHECKING:
    from torch import Tensor

MAX_FAILURES = 8
"""Failures without any success after which DALI is disabled: its decoder does not work on this machine."""

MAX_HANGS = 3
"""Pipelines that hang after which DALI is disabled: each keeps its threads and its memory."""

MAX_DIFFERENCE = 5.0
"""Largest mean difference from PyAV's frames, of 255. The two interpolate colour differently, so it is not 0."""

_MAX_IN_FLIGHT = 2
_CANNOT_DECODE, _DISABLED = "DALI cannot decode it", "DALI is disabled"
_LOG = logging.getLogger(__name__)


@dataclass
class _InFlightBatch:
    """Results of PyAV and requests to DALI, in the order of the media.

    scheduled  the pipeline is decoding the requests
    """

    entries: list[Decoded | DecodeRequest]
    scheduled: bool = False
    requests: list[DecodeRequest] = field(init=False)

    def __post_init__(self) -> None:
        self.requests = [entry for entry in self.entries if isinstance(entry, DecodeRequest)]


class DaliDecoder:
    """Decodes media of one kind with DALI, in order; on a GPU the frames stay there.

    device      "cpu" or "cuda", whose current device is used
    workers     processes that probe files, and decode those that DALI cannot
    batch       files decoded at once
    time_limit  seconds that DALI may take for a batch, and a worker process for a file
    """

    def __init__(
        self,
        kind: Literal["video", "image"],
        num_frames: int,
        preprocess: Preprocess,
        device: str,
        workers: int,
        batch: int = 16,
        time_limit: float | None = TIME_LIMIT,
        sampling: Sampling = "index",
    ) -> None:
        require()
        settings: dict[str, Any] = {"num_frames": num_frames, "preprocess": preprocess, "sampling": sampling}
        self._prepare = partial(prepare, device=device, **settings)
        self._decode = partial(guarded, partial(decode_file, **settings))
        self._failed, self._succeeded, self._hung = 0, False, 0
        self._agree: dict[tuple[str, int], bool] = {}
        self._device, self._batch, self._time_limit = device, batch, time_limit
        self._build = partial(Pipeline, kind, preprocess, device, batch)
        try:
            self._pipeline = self._build()
        except RuntimeError as error:
            raise ValueError(f"DALI cannot decode on {device} here ({root_cause(error)}); use pyav") from None
        self.workers = Workers(max(1, workers), time_limit)
        self._in_flight: deque[_InFlightBatch] = deque()

    def map(self, media: Iterable[Media]) -> Iterator[Decoded]:
        """Yield one result for each of `media`, in their order. Frames on a GPU belong to the caller."""
        waiting = iter(media)
        pending: deque[tuple[Media, Future[Any]]] = deque()
        ahead = 2 * (self._batch + self.workers.count)
        while True:
            while len(pending) < ahead and (item := next(waiting, None)) is not None:
                pending.append((item, self.workers.submit(self._prepare, item)))
            if pending and len(self._in_flight) < _MAX_IN_FLIGHT:
                self._start(self._next_batch(pending))
            elif self._in_flight:
                yield from self._collect(self._in_flight.popleft())
            else:
                return

    def _next_batch(self, pending: deque[tuple[Media, Future[Any]]]) -> _InFlightBatch:
        """Take as many of the pending files as fit one batch."""
        entries: list[Decoded | DecodeRequest] = []
        requests = memory = 0
        while pending and len(entries) < 2 * self._batch and requests < self._batch:
            entry = result_of(*pending[0])
            if isinstance(entry, DecodeRequest):
                if requests and memory + entry.memory > FRAME_MEMORY[self._device]:
                    break
                requests, memory = requests + 1, memory + entry.memory
            entries.append(entry)
            pending.popleft()
        return _InFlightBatch(entries)

    @property
    def _disabled(self) -> bool:
        return self._hung >= MAX_HANGS or (self._failed >= MAX_FAILURES and not self._succeeded)

    def _start(self, batch: _InFlightBatch) -> None:
        """Schedule a batch, unless an earlier one must be scheduled again: the pipeline returns batches in order."""
        if not self._disabled and all(other.scheduled for other in self._in_flight):
            try:
                self._pipeline.start(batch.requests)
                batch.scheduled = True
            except RuntimeError:
                self._rebuild()
        self._in_flight.append(batch)

    def _rebuild(self) -> None:
        """Replace the pipeline. The batches that the old one was decoding are no longer scheduled."""
        if not self._disabled:
            self._pipeline = self._build()
        for batch in self._in_flight:
            batch.scheduled = False

    def _collect(self, batch: _InFlightBatch) -> Iterator[Decoded]:
        """Wait for a batch and yield its results, in order."""
        results = iter([self._result(*pair) for pair in zip(batch.requests, self._frames(batch))])
        for entry in batch.entries:
            if isinstance(entry, Decoded):
                yield entry
            else:
                result = next(results)
                yield result if isinstance(result, Decoded) else result_of(entry.media, result)

    def _frames(self, batch: _InFlightBatch) -> list[np.ndarray | Tensor | str]:
        """Frames of each request of a batch, or the reason why PyAV must decode it."""
        try:
            frames = self._finish(batch.requests) if batch.scheduled else self._bisect(batch.requests)
        except RuntimeError as error:
            _LOG.info("rebuilding DALI's pipeline: %s", root_cause(error))
            self._rebuild()
            frames = self._bisect(batch.requests)
        self._failed += sum(isinstance(f, str) and f == _CANNOT_DECODE for f in frames)
        self._succeeded |= any(not isinstance(f, str) for f in frames)
        return frames

    def _finish(self, requests: list[DecodeRequest]) -> list[np.ndarray | Tensor | str]:
        """Wait for the oldest batch: frames, or the reason after a timeout. Raises RuntimeError if a file is bad."""
        try:
            return [*self._pipeline.finish(requests, self._time_limit)]
        except TimeoutError as error:
            why = str(error)
            names = ", ".join(str(request.media.path) for request in requests)
            _LOG.warning(
                "%s: falling back to PyAV for this batch, and starting a new pipeline. One of these files hangs: %s",
                why,
                names,
            )
            self._hung += 1
            if self._disabled:
                _LOG.warning("disabling DALI after %d hangs: falling back to PyAV for all other files", self._hung)
            self._rebuild()
            return [why] * len(requests)

    def _bisect(self, requests: list[DecodeRequest]) -> list[np.ndarray | Tensor | str]:
        """Decode by halves, and failed halves by halves again, until each bad file is alone or DALI is disabled."""
        middle = len(requests) // 2
        parts = [requests] if len(requests) < 2 else [requests[:middle], requests[middle:]]
        frames: list[np.ndarray | Tensor | str] = []
        for part in parts:
            if self._disabled:
                frames += [_DISABLED] * len(part)
                continue
            try:
                self._pipeline.start(part)
                frames += self._finish(part)
            except RuntimeError:
                self._rebuild()
                frames += self._bisect(part) if len(part) > 1 else [_CANNOT_DECODE]
            else:
                self._succeeded |= any(not isinstance(f, str) for f in frames)
        return frames

    def _result(self, request: DecodeRequest, frames: np.ndarray | Tensor | str) -> Decoded | Future[Any]:
        """A request's frames, or PyAV's future result."""
        why = self._fallback_reason(request, frames)
        if isinstance(frames, str) or why:
            _LOG.debug("%s: %s; falling back to PyAV", request.media.path, why)
            return self.workers.submit(self._decode, request.media, f"PyAV ({why})")
        repeated = request.media.kind == "video" and len(request.places) != len(request.indices)
        frames = frames[request.places] if repeated else frames
        return Decoded(request.media, frames, by=f"DALI ({request.codec})", facts=request.facts)

    def _fallback_reason(self, request: DecodeRequest, frames: np.ndarray | Tensor | str) -> str:
        """Why PyAV must decode a file; empty where DALI's frames are good."""
        if isinstance(frames, str):
            return frames
        if request.media.kind == "video" and not frames[-1].any():
            return "its last frame is black"
        if not self._agrees(request, frames):
            return f"DALI decodes {request.codec} with colour matrix {request.matrix} differently"
        return ""

    def _agrees(self, request: DecodeRequest, frames: np.ndarray | Tensor) -> bool:
        """Whether PyAV gives the same frames, measured on the first file of each kind that PyAV can decode."""
        kind = request.codec, request.matrix
        if kind not in self._agree:
            theirs = result_of(request.media, self.workers.submit(self._decode, request.media)).frames
            if theirs is None:
                return False
            ours = frames if isinstance(frames, np.ndarray) else frames.cpu().numpy()
            if request.media.kind == "video":
                ours = ours[request.places]
            difference = float(np.abs(ours.astype(np.int16) - theirs).mean())
            self._agree[kind] = difference <= MAX_DIFFERENCE
            if not self._agree[kind]:
                _LOG.warning(
                    "DALI's %s with colour matrix %d differs from PyAV's by %.1f of 255: falling back to PyAV for it",
                    *kind,
                    difference,
                )
        return self._agree[kind]

    def __enter__(self) -> DaliDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.workers.close()
