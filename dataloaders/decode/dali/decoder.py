"""DALI as a back end: many files decoded at once, resized and cropped where they are decoded, on a GPU its NVDEC.

What DALI cannot decode goes to PyAV, in processes that can be ended. So does what it turns out unable to decode: DALI says
neither which file of a batch was bad, nor does its pipeline work again afterwards, so it is built anew and halves of the
batch are tried until the culprit is alone. Where nothing comes for the time limit, the pipeline is left as it hangs, the
batch goes to PyAV, and a new pipeline goes on with the next.

Frames that a damaged file lacks come back black without a word; therefore a last frame that is black is decoded by PyAV
again. Lest another version or a GPU decodes otherwise, the first file of each codec and colour matrix is decoded by PyAV
too, and where they disagree PyAV keeps that kind.
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

from dataloaders.decode.dali.pipeline import Pipeline, require, root_cause
from dataloaders.decode.dali.request import FRAME_MEMORY, Ticket, prepare
from dataloaders.decode.decoder import TIME_LIMIT, Decoded, answer_of, decode_cropped, guarded
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.workers import Workers
from dataloaders.records import Media

if TYPE_CHECKING:
    from torch import Tensor

HOPELESS = 8
"""Failures before any success after which DALI is asked no more: its decoder does not work on this machine."""

MOST_HUNG = 3
"""Pipelines that hang after which DALI is asked no more: each keeps its threads and its memory."""

AGREEMENT = 5.0
"""Mean difference from PyAV's frames, of 255, above which the two are said to disagree. They interpolate colour otherwise."""

_IN_FLIGHT = 2
_CANNOT, _LEFT = "DALI cannot decode it", "DALI is asked no more"
_LOG = logging.getLogger(__name__)


@dataclass
class _Flight:
    """Results in the order of the media, some of them tickets whose frames are still in the pipeline."""

    entries: list[Decoded | Ticket]
    scheduled: bool = False
    tickets: list[Ticket] = field(init=False)

    def __post_init__(self) -> None:
        self.tickets = [entry for entry in self.entries if isinstance(entry, Ticket)]


class DaliDecoder:
    """Decodes media of one kind with DALI, in order; on a GPU the frames stay there.

    device      "cpu" or "cuda", whose current device is used
    workers     processes that look at files, and decode what DALI cannot
    batch       files decoded at once
    time_limit  seconds that DALI may take for a batch, and that such a process may take for a file
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
    ) -> None:
        require()
        self._prepare = partial(prepare, num_frames=num_frames, preprocess=preprocess, device=device)
        self._decode = partial(guarded, partial(decode_cropped, num_frames=num_frames, preprocess=preprocess))
        self._failed, self._succeeded, self._hung = 0, False, 0
        self._agree: dict[tuple[str, int], bool] = {}
        self._device, self._batch, self._time_limit = device, batch, time_limit
        self._build = partial(Pipeline, kind, preprocess, device, batch)
        try:
            self._pipeline = self._build()
        except RuntimeError as error:
            raise ValueError(f"DALI cannot decode on {device} here ({root_cause(error)}); take pyav") from None
        self.workers = Workers(max(1, workers), time_limit)
        self._flights: deque[_Flight] = deque()

    def map(self, media: Iterable[Media]) -> Iterator[Decoded]:
        """Yield one result for each of `media`, in their order. GPU frames are the reader's own."""
        waiting = iter(media)
        pending: deque[tuple[Media, Future[Any]]] = deque()
        ahead = 2 * (self._batch + self.workers.count)
        while True:
            while len(pending) < ahead and (item := next(waiting, None)) is not None:
                pending.append((item, self.workers.submit(self._prepare, item)))
            if pending and len(self._flights) < _IN_FLIGHT:
                self._start(self._board(pending))
            elif self._flights:
                yield from self._land(self._flights.popleft())
            else:
                return

    def _board(self, pending: deque[tuple[Media, Future[Any]]]) -> _Flight:
        """As many of the files that come next as fit one batch."""
        entries: list[Decoded | Ticket] = []
        tickets = memory = 0
        while pending and len(entries) < 2 * self._batch and tickets < self._batch:
            entry = answer_of(*pending[0])
            if isinstance(entry, Ticket):
                if tickets and memory + entry.memory > FRAME_MEMORY[self._device]:
                    break
                tickets, memory = tickets + 1, memory + entry.memory
            entries.append(entry)
            pending.popleft()
        return _Flight(entries)

    @property
    def _hopeless(self) -> bool:
        return self._hung >= MOST_HUNG or (self._failed >= HOPELESS and not self._succeeded)

    def _start(self, flight: _Flight) -> None:
        """Begin to decode, unless an earlier flight waits for a new start: the pipeline answers in order."""
        if not self._hopeless and all(other.scheduled for other in self._flights):
            try:
                self._pipeline.start(flight.tickets)
                flight.scheduled = True
            except RuntimeError:
                self._start_anew()
        self._flights.append(flight)

    def _start_anew(self) -> None:
        if not self._hopeless:
            self._pipeline = self._build()
        for flight in self._flights:
            flight.scheduled = False

    def _land(self, flight: _Flight) -> Iterator[Decoded]:
        results = iter([self._result(*pair) for pair in zip(flight.tickets, self._frames(flight))])
        for entry in flight.entries:
            if isinstance(entry, Decoded):
                yield entry
            else:
                result = next(results)
                yield result if isinstance(result, Decoded) else answer_of(entry.media, result)

    def _frames(self, flight: _Flight) -> list[np.ndarray | Tensor | str]:
        """Frames of each of a flight's tickets, or why PyAV must look at it."""
        try:
            frames = self._finish(flight.tickets) if flight.scheduled else self._search(flight.tickets)
        except RuntimeError as error:
            _LOG.info("DALI's pipeline is built anew: %s", root_cause(error))
            self._start_anew()
            frames = self._search(flight.tickets)
        self._failed += sum(isinstance(f, str) and f == _CANNOT for f in frames)
        self._succeeded |= any(not isinstance(f, str) for f in frames)
        return frames

    def _finish(self, tickets: list[Ticket]) -> list[np.ndarray | Tensor | str]:
        """What the pipeline gives for the batch that was started first. Raises RuntimeError where any of it is bad."""
        try:
            return [*self._pipeline.finish(tickets, self._time_limit)]
        except TimeoutError as error:
            why = str(error)
            names = ", ".join(str(ticket.media.path) for ticket in tickets)
            _LOG.warning(
                "%s: PyAV decodes what DALI had, and a new pipeline goes on. One of these hangs: %s", why, names
            )
            self._hung += 1
            if self._hopeless:
                _LOG.warning("DALI is asked no more: PyAV decodes the rest")
            self._start_anew()
            return [why] * len(tickets)

    def _search(self, tickets: list[Ticket]) -> list[np.ndarray | Tensor | str]:
        """Decode in ever smaller parts, until those that fail are alone. Nothing where there is no hope."""
        parts = [tickets] if len(tickets) < 2 else [tickets[: len(tickets) // 2], tickets[len(tickets) // 2 :]]
        frames: list[np.ndarray | Tensor | str] = []
        for part in parts:
            if self._hopeless:
                frames += [_LEFT] * len(part)
                continue
            try:
                self._pipeline.start(part)
                frames += self._finish(part)
            except RuntimeError:
                self._start_anew()
                frames += self._search(part) if len(part) > 1 else [_CANNOT]
            else:
                self._succeeded |= any(not isinstance(f, str) for f in frames)
        return frames

    def _result(self, ticket: Ticket, frames: np.ndarray | Tensor | str) -> Decoded | Future[Any]:
        """A ticket's frames, or what PyAV will say of it."""
        why = self._doubt(ticket, frames)
        if isinstance(frames, str) or why:
            _LOG.info("%s: %s; PyAV looks at it", ticket.media.path, why)
            return self.workers.submit(self._decode, ticket.media, f"PyAV ({why})")
        repeated = ticket.media.kind == "video" and len(ticket.places) != len(ticket.indices)
        return Decoded(ticket.media, frames[ticket.places] if repeated else frames, by=f"DALI ({ticket.codec})")

    def _doubt(self, ticket: Ticket, frames: np.ndarray | Tensor | str) -> str:
        """Why PyAV must look at a file; empty where its frames are good."""
        if isinstance(frames, str):
            return frames
        if ticket.media.kind == "video" and not frames[-1].any():
            return "its last frame is black"
        if not self._agrees(ticket, frames):
            return f"DALI decodes {ticket.codec} of matrix {ticket.matrix} otherwise"
        return ""

    def _agrees(self, ticket: Ticket, frames: np.ndarray | Tensor) -> bool:
        """Whether PyAV gives the same of files of this kind; looked at with the first that it can decode."""
        kind = ticket.codec, ticket.matrix
        if kind not in self._agree:
            theirs = answer_of(ticket.media, self.workers.submit(self._decode, ticket.media)).frames
            if theirs is None:
                return False
            ours = frames if isinstance(frames, np.ndarray) else frames.cpu().numpy()
            if ticket.media.kind == "video":
                ours = ours[ticket.places]
            difference = float(np.abs(ours.astype(np.int16) - theirs).mean())
            self._agree[kind] = difference <= AGREEMENT
            if not self._agree[kind]:
                _LOG.warning(
                    "DALI decodes %s of colour matrix %d otherwise than PyAV, by %.1f of 255: PyAV keeps that kind",
                    *(*kind, difference),
                )
        return self._agree[kind]

    def __enter__(self) -> DaliDecoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.workers.close()
