"""DALI as a decoder: many files at once, resized and cropped on the device that decodes them (NVDEC on a GPU).

PyAV is the fallback, in worker processes that can be killed:

- Files that DALI does not support, or would count differently, go to PyAV at once (`request`).
- When a batch fails, DALI does not report which file was bad, and its pipeline cannot be used again. The decoder builds
  a new pipeline and bisects the batch until each bad file is alone; those files go to PyAV.
- When DALI gives no result within the time limit, its pipeline is abandoned, because it cannot be interrupted. The
  batch goes to PyAV, and a new pipeline decodes the next one.
- DALI returns black frames, without an error, for frames that a damaged file lacks. So PyAV decodes a file again whose
  last frame is black.
- Another version of DALI or another GPU may decode differently. So PyAV also decodes the first file of each codec and
  colour matrix, and one of every COMPARED_EVERY; if any frame differs, or is that of a neighbour, PyAV decodes all other
  files of that kind (`agreement`).

Which decoder a file gets depends on the file alone, as long as DALI neither hangs nor differs from PyAV: not on the files
before it, which a resumed run does not see. So DALI is tried on a file of its own first (`trial`), and a run of damaged files
does not disable it. `Decoded.by` names the reason of each fallback, and the store keeps it.

Files are put into batches by codec, size and length within a window, so that decoders are used again and the files of a
batch end together. Results are in the order of the media.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataloaders.decode import TIME_LIMIT
from dataloaders.decode.dali.agreement import compare, surroundings
from dataloaders.decode.dali.pipeline import Pipeline, require, root_cause
from dataloaders.decode.dali.request import BATCH_MEMORY, DecodeRequest, prepare
from dataloaders.decode.dali.sessions import ON_CPU, Sessions
from dataloaders.decode.dali.share import is_compared
from dataloaders.decode.dali.torchcodec import TorchcodecPipeline
from dataloaders.decode.dali.trial import check
from dataloaders.decode.decoder import Decoded, decode_file, guarded, result_of
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.sampling import Sampling
from dataloaders.decode.workers import Workers
from dataloaders.records import Media

if TYPE_CHECKING:
    from torch import Tensor

    Frames = np.ndarray | Tensor | str

MAX_HANGS = 3
"""Pipelines that hang after which DALI is disabled: each keeps its threads and its memory."""

_CANNOT_DECODE, _DISABLED = "DALI cannot decode it", "DALI is disabled"
_LOG = logging.getLogger(__name__)

Placed = tuple[int, DecodeRequest]


@dataclass
class _InFlightBatch:
    """Requests with their places among the media, and the pipeline that decodes them.

    scheduled  the pipeline is decoding the requests
    """

    placed: list[Placed]
    slot: int
    scheduled: bool = False

    @property
    def requests(self) -> list[DecodeRequest]:
        return [request for _, request in self.placed]


class DaliDecoder:
    """Decodes media of one kind with DALI, in order; on a GPU the frames stay there.

    device      "cpu" or "cuda", whose current device is used
    workers     processes that probe files, and decode those that DALI cannot
    time_limit  seconds that DALI may take for a batch, and a worker process for a file
    sessions    how many pipelines decode how many files at a time
    engine      what decodes; torchcodec decodes videos only
    cpu_share   share of the videos that the processes decode with PyAV while DALI decodes the others (`share`)
    """

    def __init__(
        self,
        kind: Literal["video", "image"],
        num_frames: int,
        preprocess: Preprocess,
        device: str,
        workers: int,
        time_limit: float | None = TIME_LIMIT,
        sampling: Sampling = "index",
        sessions: Sessions = ON_CPU,
        cpu_share: float = 0.0,
        engine: Literal["DALI", "torchcodec"] = "DALI",
    ) -> None:
        if engine == "DALI":
            require()
        make: Callable[..., Pipeline | TorchcodecPipeline] = Pipeline if engine == "DALI" else TorchcodecPipeline
        self._engine = engine
        settings: dict[str, Any] = {"num_frames": num_frames, "preprocess": preprocess, "sampling": sampling}
        probe = partial(prepare, device=device, by_dali=engine == "DALI", **settings)
        self._prepare = partial(probe, cpu_share=cpu_share)
        self._decode = partial(guarded, partial(decode_file, **settings))
        self._surroundings = partial(guarded, partial(surroundings, **settings))
        self._hung = 0
        self._disagree: set[tuple[str, int]] = set()
        self._of_kind: Counter[tuple[str, int]] = Counter()
        self._sessions, self._time_limit = sessions, time_limit
        self._memory = BATCH_MEMORY[device] // sessions.in_flight
        self._build = partial(make, kind, preprocess, device, sessions.batch, sessions.threads)
        try:
            self._pipelines = [self._build() for _ in range(sessions.pipelines)]
            check(self._pipelines[0], kind, device, probe, time_limit)
        except RuntimeError as error:
            raise ValueError(f"{engine} cannot decode on {device} here ({root_cause(error)}); use pyav") from None
        self.workers = Workers(max(1, workers), time_limit)
        self._in_flight: deque[_InFlightBatch] = deque()
        self._started = 0

    def map(self, media: Iterable[Media]) -> Iterator[Decoded]:
        """Yield one result for each of `media`, in their order. Frames on a GPU belong to the caller."""
        results: dict[int, tuple[Media, Decoded | Future[Any]]] = {}
        batches, done = self._batches(media, results), 0
        batch: list[Placed] | None = []
        while batch is not None or self._in_flight:
            if batch is not None and len(self._in_flight) < self._sessions.in_flight:
                batch = next(batches, None)
                if batch:
                    self._start(batch)
            else:
                self._collect(self._in_flight.popleft(), results)
            while done in results:
                item, result = results.pop(done)
                done += 1
                yield result if isinstance(result, Decoded) else result_of(item, result)

    def _batches(
        self, media: Iterable[Media], results: dict[int, tuple[Media, Decoded | Future[Any]]]
    ) -> Iterator[list[Placed]]:
        """Batches of requests. Adds the results of other files; an empty batch means that there are only such."""
        waiting = iter(media)
        pending: deque[tuple[Media, Future[Any]]] = deque()
        ahead, place = self._sessions.window + 2 * self.workers.count, 0
        while True:
            while len(pending) < ahead and (item := next(waiting, None)) is not None:
                pending.append((item, self.workers.submit(self._prepare, item)))
            if not pending:
                return
            window: list[Placed] = []
            for _ in range(min(self._sessions.window, len(pending))):
                item, future = pending.popleft()
                entry = result_of(item, future)
                if isinstance(entry, DecodeRequest):
                    window.append((place, entry))
                else:
                    results[place] = item, entry
                place += 1
            yield from self._divided(window) or [[]]

    def _divided(self, window: list[Placed]) -> list[list[Placed]]:
        """The requests of a window in batches, those of similar size and length together."""
        batches: list[list[Placed]] = []
        memory = 0
        for placed in sorted(window, key=lambda placed: placed[1].sort_key):
            memory += placed[1].memory
            if not batches or len(batches[-1]) == self._sessions.batch or memory > self._memory:
                batches.append([])
                memory = placed[1].memory
            batches[-1].append(placed)
        return batches

    @property
    def _disabled(self) -> bool:
        return self._hung >= MAX_HANGS

    def _start(self, placed: list[Placed]) -> None:
        """Schedule a batch on the next pipeline, unless an earlier one of it must be scheduled again."""
        batch = _InFlightBatch(placed, self._started % self._sessions.pipelines)
        self._started += 1
        if not self._disabled and all(other.scheduled for other in self._in_flight if other.slot == batch.slot):
            try:
                self._pipelines[batch.slot].start(batch.requests)
                batch.scheduled = True
            except RuntimeError:
                self._rebuild(batch.slot)
        self._in_flight.append(batch)

    def _rebuild(self, slot: int) -> None:
        """Replace a pipeline. The batches that the old one was decoding are no longer scheduled."""
        if not self._disabled:
            self._pipelines[slot] = self._build()
        for batch in self._in_flight:
            batch.scheduled &= batch.slot != slot

    def _collect(self, batch: _InFlightBatch, results: dict[int, tuple[Media, Decoded | Future[Any]]]) -> None:
        """Wait for a batch and add its results."""
        for (place, request), frames in zip(batch.placed, self._frames(batch)):
            results[place] = request.media, self._result(request, frames)

    def _frames(self, batch: _InFlightBatch) -> list[Frames]:
        """Frames of each request of a batch, or the reason why PyAV must decode it."""
        try:
            return (self._finish if batch.scheduled else self._bisect)(batch.requests, batch.slot)
        except RuntimeError as error:
            _LOG.info("rebuilding DALI's pipeline: %s", root_cause(error))
            self._rebuild(batch.slot)
            return self._bisect(batch.requests, batch.slot)

    def _finish(self, requests: list[DecodeRequest], slot: int) -> list[Frames]:
        """Wait for the oldest batch: frames, or the reason after a timeout. Raises RuntimeError if a file is bad."""
        try:
            return [*self._pipelines[slot].finish(requests, self._time_limit)]
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
            self._rebuild(slot)
            return [why] * len(requests)

    def _bisect(self, requests: list[DecodeRequest], slot: int) -> list[Frames]:
        """Decode by halves, and failed halves by halves again, until each bad file is alone or DALI is disabled."""
        middle = len(requests) // 2
        parts = [requests] if len(requests) < 2 else [requests[:middle], requests[middle:]]
        frames: list[Frames] = []
        for part in parts:
            if self._disabled:
                frames += [_DISABLED] * len(part)
                continue
            try:
                self._pipelines[slot].start(part)
                frames += self._finish(part, slot)
            except RuntimeError as error:
                _LOG.debug("%s", root_cause(error))
                self._rebuild(slot)
                frames += self._bisect(part, slot) if len(part) > 1 else [_CANNOT_DECODE]
        return frames

    def _with_pyav(self, request: DecodeRequest, why: str) -> Future[Any]:
        _LOG.debug("%s: %s; falling back to PyAV", request.media.path, why)
        return self.workers.submit(self._decode, request.media, f"PyAV ({why})")

    def _result(self, request: DecodeRequest, frames: Frames) -> Decoded | Future[Any]:
        """A request's frames, or PyAV's future result."""
        why = self._fallback_reason(request, frames)
        if isinstance(frames, str) or why:
            return self._with_pyav(request, why)
        repeated = request.media.kind == "video" and len(request.places) != len(request.indices)
        frames = frames[request.places] if repeated else frames
        return Decoded(request.media, frames, by=f"{self._engine} ({request.codec})", facts=request.facts)

    def _fallback_reason(self, request: DecodeRequest, frames: Frames) -> str:
        """Why PyAV must decode a file; empty where DALI's frames are good."""
        if isinstance(frames, str):
            return frames
        if request.media.kind == "video" and not frames[-1].any():
            return "its last frame is black"
        if not self._agrees(request, frames):
            return f"{self._engine} decodes {request.codec} with colour matrix {request.matrix} differently"
        return ""

    def _agrees(self, request: DecodeRequest, frames: np.ndarray | Tensor) -> bool:
        """Whether PyAV gives the same frames: of this file if it is compared, else of the earlier ones of its kind."""
        kind = request.codec, request.matrix
        if kind in self._disagree:
            return False
        compared = is_compared(request.media)
        if compared or not self._of_kind[kind]:
            around = result_of(request.media, self.workers.submit(self._surroundings, request.media)).frames
            if around is None:
                # The next file is compared. This one keeps its frames, as it does where it is not the first of its kind.
                return not compared
            ours = frames if isinstance(frames, np.ndarray) else frames.cpu().numpy()
            agreement = compare(ours[request.places] if request.media.kind == "video" else ours, around)
            if not agreement:
                self._disagree.add(kind)
                before = f"; check the {self._of_kind[kind]:,} before it with --verify" * bool(self._of_kind[kind])
                message = f"{self._engine}'s %s with colour matrix %d %s in %s: falling back to PyAV for it%s"
                _LOG.warning(message, *kind, agreement, request.media.path, before)
                return False
        self._of_kind[kind] += 1
        return True

    def __enter__(self) -> DaliDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.workers.close()
