"""DALI as a back end: many files decoded at once, resized and cropped where they are decoded, on a GPU its NVDEC.

Each file is looked at in a process first, where it may hang or crash: which frames are wanted, and can DALI decode it?
What it cannot is decoded there, by PyAV. So is what it turns out unable to decode: DALI says neither which file of a
batch was bad, nor does its pipeline work again afterwards, so it is built anew and halves of the batch are tried until
the culprit is alone. Frames that a damaged file lacks come back black without a word; therefore a last frame that is
black is decoded by PyAV again.

DALI takes every picture for one in BT.601's colours, as videos of low resolution are; those tagged BT.709 are converted
afterwards. Lest another version or a GPU does otherwise, the first file of each codec and matrix is decoded by PyAV too,
and where they disagree PyAV keeps that kind.

Resizing goes across first and then down, with whole numbers between: as Pillow does, whose numbers CLIP was taught on.
One pass differs from it by up to 21/255, two by 1/255 on pictures and 9/255 on noise.
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
from PIL import Image

from dataloaders.decode import TIME_LIMIT, Decoded, answer_of, decode_cropped, guarded
from dataloaders.preprocess import Preprocess
from dataloaders.records import Media
from dataloaders.video import DecodeError, frame_indices, probe
from dataloaders.workers import Workers

if TYPE_CHECKING:
    from torch import Tensor

CODECS: dict[str, frozenset[str]] = {
    "cuda": frozenset({"h264", "hevc", "vp8", "vp9"}),
    "cpu": frozenset({"vp8", "vp9", "mjpeg"}),
}
"""Video codecs that DALI is given, by device. NVDEC of A100, H100 and H200 lacks AV1; the CPU variant is built with three."""

PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
MAX_FILE = 512 * 2**20
"""Bytes of a file that are read into memory; PyAV takes longer ones, seeking in them."""

FRAME_MEMORY = {"cuda": 6 * 2**30, "cpu": 512 * 2**20}
"""Bytes of whole frames in a batch: they are all held before they are resized, 276 MB for 100 of 720p."""

HOPELESS = 8
"""Failures before any success after which DALI is asked no more: its decoder does not work on this machine."""

_EXIF_ORIENTATION = 0x0112
_IN_FLIGHT = 2
_BT709, _BT601 = (1,), (2, 5, 6)
"""FFmpeg's numbers of colour matrices; 2 is none named, which all take for BT.601."""

AGREEMENT = 5.0
"""Mean difference from PyAV's frames, of 255, above which the two are said to disagree. They interpolate colour otherwise."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ticket:
    """A file that DALI is given.

    indices     (u,) frames to decode, ascending, each once; empty for a still
    places      (N,) where each wanted frame is among them
    height, width  in pixels, upright
    matrix      FFmpeg's number of the colour matrix
    """

    media: Media
    codec: str
    indices: np.ndarray
    places: np.ndarray
    height: int
    width: int
    matrix: int = 2

    @property
    def memory(self) -> int:
        return max(1, len(self.indices)) * self.height * self.width * 3


@dataclass
class _Flight:
    """Results in the order of the media, some of them tickets whose frames are still in the pipeline."""

    entries: list[Decoded | Ticket]
    scheduled: bool = False
    tickets: list[Ticket] = field(init=False)

    def __post_init__(self) -> None:
        self.tickets = [entry for entry in self.entries if isinstance(entry, Ticket)]


def require() -> None:
    """Raise ValueError where DALI cannot be used."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        raise ValueError(f"DALI cannot be used here ({error}); install nvidia-dali-cuda130, or take pyav") from None


def prepare(media: Media, num_frames: int, preprocess: Preprocess, device: str) -> Decoded | Ticket:
    """A ticket where DALI can decode a file on `device`, otherwise its frames or why there are none."""
    try:
        ticket, why = _still(media) if media.kind == "image" else _video(media, num_frames, device)
    except DecodeError as error:
        return Decoded(media, reason=str(error))
    except Exception as error:  # Whatever it is, PyAV will name it.
        ticket, why = None, f"{type(error).__name__}: {error}"
    if ticket is not None:
        return ticket
    return guarded(partial(decode_cropped, num_frames=num_frames, preprocess=preprocess), media, by=f"PyAV ({why})")


def _video(media: Media, num_frames: int, device: str) -> tuple[Ticket | None, str]:
    known = probe(media.path, media.split)
    problems = {
        f"{known.codec} is not for DALI on {device}": known.codec not in CODECS[device],
        f"{known.pixel_format} pixels": known.pixel_format not in PIXEL_FORMATS,
        "rotated": known.rotation % 360 != 0,
        f"colour matrix {known.matrix}": known.matrix not in _BT709 + _BT601,
        "full range": known.full_range != (known.codec == "mjpeg"),
        "packets that are no frames": not known.regular,
        "a long file": media.path.stat().st_size > MAX_FILE,
    }
    why = next((name for name, is_so in problems.items() if is_so), None)
    if why is not None:
        return None, why
    wanted = known.first + frame_indices(known.total, num_frames)
    indices, places = np.unique(wanted, return_inverse=True)
    return Ticket(media, known.codec, indices, places, known.height, known.width, known.matrix), ""


def _still(media: Media) -> tuple[Ticket | None, str]:
    with Image.open(media.path) as image:
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
        width, height = reversed(image.size) if turned else image.size
        kind = f"{image.format} {image.mode}"
    if kind not in ("JPEG RGB", "JPEG L"):
        return None, kind
    with media.path.open("rb") as file:
        file.seek(-2, 2)
        if file.read() != b"\xff\xd9":
            return None, "no end mark"
    return Ticket(media, "jpeg", np.zeros(0, np.int64), np.zeros(1, np.int64), height, width), ""


class DaliDecoder:
    """Decodes media of one kind with DALI, in order; on a GPU the frames stay there.

    device      "cpu" or "cuda", whose current device is used
    workers     processes that look at files, and decode what DALI cannot
    batch       files decoded at once
    time_limit  seconds that a file may take in such a process. DALI itself cannot be interrupted.
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
        self._failed, self._succeeded = 0, False
        self._agree: dict[tuple[str, int], bool] = {}
        self._device, self._batch = device, batch
        self._build = partial(Pipeline, kind, preprocess, device, batch)
        try:
            self._pipeline = self._build()
        except RuntimeError as error:
            raise ValueError(f"DALI cannot decode on {device} here ({_gist(error)}); take pyav") from None
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

    def _start(self, flight: _Flight) -> None:
        """Begin to decode, unless an earlier flight waits for a new start: the pipeline answers in order."""
        hopeless = self._failed >= HOPELESS and not self._succeeded
        if not hopeless and all(other.scheduled for other in self._flights):
            flight.scheduled = self._schedule(flight.tickets)
        self._flights.append(flight)

    def _schedule(self, tickets: list[Ticket]) -> bool:
        try:
            self._pipeline.start(tickets)
        except RuntimeError:
            self._start_anew()
            return False
        return True

    def _start_anew(self) -> None:
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

    def _frames(self, flight: _Flight) -> list[np.ndarray | Tensor | None]:
        """Frames of each of a flight's tickets; None for those that DALI cannot decode."""
        if flight.scheduled:
            try:
                frames = self._pipeline.finish(flight.tickets)
            except RuntimeError as error:
                _LOG.info("DALI's pipeline is built anew: %s", _gist(error))
                self._start_anew()
                frames = self._search(flight.tickets)
        else:
            frames = self._search(flight.tickets)
        self._failed += sum(f is None for f in frames)
        self._succeeded |= any(f is not None for f in frames)
        return frames

    def _search(self, tickets: list[Ticket]) -> list[np.ndarray | Tensor | None]:
        """Decode in ever smaller parts, until those that fail are alone. Nothing where nothing ever succeeded."""
        if self._failed >= HOPELESS and not self._succeeded:
            return [None] * len(tickets)
        parts = [tickets] if len(tickets) < 2 else [tickets[: len(tickets) // 2], tickets[len(tickets) // 2 :]]
        frames: list[np.ndarray | Tensor | None] = []
        for part in parts:
            try:
                self._pipeline.start(part)
                frames += self._pipeline.finish(part)
            except RuntimeError:
                self._pipeline = self._build()
                frames += self._search(part) if len(part) > 1 else [None]
            else:
                self._succeeded |= bool(part)
        return frames

    def _result(self, ticket: Ticket, frames: np.ndarray | Tensor | None) -> Decoded | Future[Any]:
        """A ticket's frames, or what PyAV will say of it."""
        why = ""
        if frames is None:
            why = "DALI cannot decode it"
        elif ticket.media.kind == "video" and not frames[-1].any():
            why = "its last frame is black"
        elif not self._agrees(ticket, frames):
            why = f"DALI decodes {ticket.codec} of matrix {ticket.matrix} otherwise"
        if frames is None or why:
            _LOG.info("%s: %s; PyAV looks at it", ticket.media.path, why)
            return self.workers.submit(self._decode, ticket.media, f"PyAV ({why})")
        repeated = ticket.media.kind == "video" and len(ticket.places) != len(ticket.indices)
        return Decoded(ticket.media, frames[ticket.places] if repeated else frames, by=f"DALI ({ticket.codec})")

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


class Pipeline:
    """DALI's graph: read, decode, resize across and down, crop. Batches go in and come out in order."""

    def __init__(self, kind: Literal["video", "image"], preprocess: Preprocess, device: str, batch: int) -> None:
        from nvidia.dali import Pipeline as Graph
        from nvidia.dali import fn, types

        self._kind, self._preprocess, self._on_gpu = kind, preprocess, device == "cuda"
        if self._on_gpu:
            import torch

            device_id, placement = torch.cuda.current_device(), "mixed"
        else:
            device_id, placement = None, "cpu"
        # Of depth 1, for a first run would otherwise wait for more input: `start` is what works ahead. The dynamic executor
        # leaves outputs to their reader.
        graph = Graph(batch, _THREADS, device_id, exec_dynamic=True, prefetch_queue_depth=1, set_affinity=False)
        with graph:
            encoded = fn.io.file.read(fn.external_source(name="path", dtype=types.UINT8, ndim=1))
            if kind == "video":
                indices = fn.external_source(name="indices", dtype=types.INT32, ndim=1)
                frames = fn.decoders.video(encoded, device=placement, frames=indices)
            else:
                frames = fn.decoders.image(encoded, device=placement, output_type=types.RGB, jpeg_fancy_upsampling=True)
            for name in ("across", "down"):
                size = fn.external_source(name=name, dtype=types.FLOAT, ndim=1)
                frames = fn.resize(frames, size=size, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8)
            side = preprocess.crop
            frames = fn.crop(frames, crop=(side, side), rounding="truncate")
            if kind == "video":
                colors = fn.external_source(name="colors", dtype=types.FLOAT, ndim=2)
                frames = fn.coord_transform(frames, M=colors, dtype=types.UINT8)
            graph.set_outputs(frames)
        graph.build()
        self._graph = graph

    def start(self, tickets: list[Ticket]) -> None:
        """Decode in the background. Raises RuntimeError where the pipeline is spoiled."""
        if not tickets:
            return
        sizes = [self._preprocess.resized(t.height, t.width) for t in tickets]
        feeds: dict[str, list[np.ndarray]] = {
            "path": [np.frombuffer(bytes(t.media.path), np.uint8) for t in tickets],
            "across": [np.array([t.height, width], np.float32) for t, (_, width) in zip(tickets, sizes)],
            "down": [np.array(size, np.float32) for size in sizes],
        }
        if self._kind == "video":
            feeds["indices"] = [t.indices.astype(np.int32) for t in tickets]
            feeds["colors"] = [_FROM_601_TO_709 if t.matrix in _BT709 else _SAME for t in tickets]
        for name, values in feeds.items():
            self._graph.feed_input(name, values)
        self._graph.schedule_run()

    def finish(self, tickets: list[Ticket]) -> list[np.ndarray | Tensor | None]:
        """Frames (u, S, S, 3) of the batch that was started first. Raises RuntimeError where any of it is bad."""
        if not tickets:
            return []
        (output,) = self._graph.share_outputs()
        frames: list[np.ndarray | Tensor]
        if self._on_gpu:
            import torch

            frames = [torch.from_dlpack(output[i]) for i in range(len(tickets))]
        else:
            frames = [np.array(output.at(i)) for i in range(len(tickets))]
        self._graph.release_outputs()
        return [f if f.ndim == 4 else f[None] for f in frames]


_THREADS = 4


def _to_rgb(red: float, blue: float) -> np.ndarray:
    """(3, 3) from Y, Cb, Cr to R, G, B, for the shares of red and blue in luma."""
    green = 1 - red - blue
    to_red, to_blue = 2 * (1 - red), 2 * (1 - blue)
    return np.array([[1, 0, to_red], [1, -to_blue * blue / green, -to_red * red / green], [1, to_blue, 0]])


_SAME = np.eye(3, dtype=np.float32)
_FROM_601_TO_709 = (_to_rgb(0.2126, 0.0722) @ np.linalg.inv(_to_rgb(0.299, 0.114))).astype(np.float32)


def _gist(error: Exception) -> str:
    """DALI's own words, out of a message that starts with where its operators were defined."""
    return " ".join(str(error).rpartition("encountered:")[2].split())[:200]
