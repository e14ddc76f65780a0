"""Reduce dense tracks in archives to key points, as a stream: one archive after another, nothing is unpacked.

python -m dataloaders.annotation.dense ARCHIVE... --records stage2.json --work DATA/stage2/pite_143k.steps

PiTe's authors published 6.4 TB of dense tracks in 48 or 49 archives and did not document their form. So that they need
not lie on one disk, an archive may be removed once it is read, and `-` reads a tar from standard input. The result is
the `tracks` step of `dataloaders.annotation`, which then makes the records. These forms of a member are assumed:

    {id}.npy or {id}.pt, one array (T, H, W, C) or (T, M, C)   points over T frames of the clip, evenly spaced; the points
                                                               in a phrase's mask at its event's first frame are taken
    {id}.npz, .pt or .safetensors, "{event}.{phrase}": (T, M, C)   the points of each phrase over its event

C is 2 for x and y, or 3 with a visibility, above 0.5 where a point is visible. x and y are fractions of the frame, or
pixels with --pixels.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from safetensors.numpy import load as load_safetensors

from dataloaders import cli, logs, paths
from dataloaders.annotation import steps
from dataloaders.annotation.key_points import key_points
from dataloaders.annotation.pipeline import Video
from dataloaders.annotation.sources import read_captions, read_records
from dataloaders.annotation.steps import Phrases, Tracks, step_path
from dataloaders.annotation.tracking import Moments
from dataloaders.cli import at_least, flag
from dataloaders.failures import LEDGER, Failure, Ledger
from dataloaders.logs import LogFlags
from dataloaders.records import ABSENT, RecordError

log = logging.getLogger(__name__)

_SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")
_MOST_POINTS = 1024
"""Tracks of an object that k-means takes; of more, evenly spaced ones."""

_NAME = re.compile(r"(\d+)\.(\d+)")
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class DenseFlags(LogFlags):
    """Reduce dense tracks in archives to the key points of each phrase, one archive after another."""

    archives: tuple[Path, ...] = flag(positional=True)
    """tar (also compressed) or zip files, in any order; - for a tar on standard input"""
    records: Path | None = None
    """the records that the tracks belong to, such as VTimeLLM's stage2.json; or give --captions"""
    captions: Path | None = None
    """ActivityNet Captions or InternVid's lines; or give --records"""
    work: Path
    """folder of the annotation's steps, with phrases/ and, for tracks of whole frames, masks/; gets tracks/"""
    pixels: tuple[int, int] | None = None
    """width and height of the frames that x and y are pixels of; fractions of the frame unless given"""
    num_frames: int = 100
    """N frames that PiTe will see"""
    num_points: int = 3
    """P key points of a trajectory"""
    failure_budget: float = 0.01
    """share of the videos whose tracks may be unreadable"""

    def __post_init__(self) -> None:
        if (self.captions is None) == (self.records is None):
            raise ValueError("give one of --records and --captions: what the tracks belong to")
        at_least(self, 1, "num_points")
        at_least(self, 2, "num_frames")
        if self.pixels is not None and min(self.pixels) < 1:
            raise ValueError(f"--pixels takes a width and a height of at least 1, not {self.pixels}")

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written."""
        for archive in self.archives:
            if str(archive) != "-":
                paths.input_file("ARCHIVE", archive)
        paths.input_file("--records", self.records)
        paths.input_file("--captions", self.captions)
        paths.output_folder("--work", self.work)


def run(flags: DenseFlags) -> None:
    """Reduce the tracks of all archives. Videos whose tracks exist are skipped, so a killed run can be resumed."""
    source = flags.records or flags.captions
    assert source is not None, "DenseFlags requires one of the two"
    found = (read_records if flags.records else read_captions)(source, flags.work)
    videos: dict[str, list[Video]] = defaultdict(list)
    for video in found:
        if isinstance(video, Video):
            videos[video.name if video.record is None else str(video.record.record["id"])].append(video)
    if not videos:
        raise ValueError(f"{source}: holds no video")
    ledger = Ledger(flags.work / LEDGER, len(videos), flags.failure_budget)
    flags.work.mkdir(parents=True, exist_ok=True)
    for archive in flags.archives:
        counts: Counter[str] = Counter()
        for name, read in members(archive):
            identifier = PurePosixPath(name).stem
            waiting = [v for v in videos.get(identifier, ()) if not step_path(flags.work, "tracks", v.name).exists()]
            if not waiting:
                counts["there before" if identifier in videos else "of no record"] += 1
                continue
            content = read()
            try:
                arrays = load(name, content)
                for video in waiting:
                    _reduce(video, arrays, flags)
                counts["reduced"] += 1
            except (ValueError, KeyError) as error:
                counts["unreadable"] += 1
                ledger.add(Failure(identifier, str(archive), "import", f"{archive}: {name}: {error}"))
        print(f"{archive}: " + (", ".join(f"{n:,} {what}" for what, n in counts.items()) or "holds no tracks"))


def members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """(name, function that reads it) of each file with tracks, in the archive's order; read it before the next one.

    Both raise ValueError for a file that is no archive, or that ends early.
    """
    with _whole(archive):
        if str(archive) != "-" and zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for name in opened.namelist():
                    if PurePosixPath(name).suffix in _SUFFIXES:
                        yield name, partial(_read, archive, partial(opened.read, name))
            return
        source = sys.stdin.buffer if str(archive) == "-" else None
        with tarfile.open(None if source else archive, "r|*", source) as tar:
            for member in tar:
                if member.isfile() and PurePosixPath(member.name).suffix in _SUFFIXES:
                    file = tar.extractfile(member)
                    assert file is not None, "a regular file"
                    yield member.name, partial(_read, archive, file.read)


def _read(archive: Path, read: Callable[[], bytes]) -> bytes:
    with _whole(archive):
        return read()


@contextmanager
def _whole(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{archive} is no whole tar or zip archive ({error})") from None


def load(name: str, content: bytes) -> Arrays:
    """The arrays of a member by their names; a single one under an empty name. Runs no code. Raises ValueError."""
    suffix = PurePosixPath(name).suffix
    try:
        if suffix == ".safetensors":
            return load_safetensors(content)
        if suffix in (".pt", ".pth"):
            return _load_tensors(content)
        opened = np.load(io.BytesIO(content), allow_pickle=False)
        return {"": opened} if isinstance(opened, np.ndarray) else dict(opened)
    except MemoryError:
        raise
    except Exception as error:  # A damaged file can raise anything.
        raise ValueError(f"no readable {suffix} file ({str(error).partition(chr(10))[0]})") from None


def _load_tensors(content: bytes) -> Arrays:
    import torch

    found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    tensors = found if isinstance(found, dict) else {"": found}
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError("holds something else than tensors")
    return {str(name): tensor.detach().float().numpy() for name, tensor in tensors.items()}


def _reduce(video: Video, arrays: Arrays, flags: DenseFlags) -> None:
    """Write the tracks of a video: P key points of each phrase."""
    phrases = steps.read_phrases(_existing(flags.work, "phrases", video), video.captions)
    if set(arrays) == {""}:
        masks = steps.read_masks(_existing(flags.work, "masks", video), phrases)
        tracks = of_masks(points_of(arrays[""], flags.pixels), video, masks, flags.num_frames)
    else:
        tracks = of_phrases(arrays, phrases, flags.pixels)
    reduced = {key: key_points(_thinned(track), flags.num_points) for key, track in tracks.items()}
    kept = {key: points.astype(np.float32) for key, points in reduced.items() if points is not None}
    steps.write_tracks(step_path(flags.work, "tracks", video.name), kept)


def _existing(work: Path, step: str, video: Video) -> Path:
    path = step_path(work, step, video.name)
    if not path.exists():
        raise RecordError(f"{path}: no such file; make it with dataloaders.annotation --until {step}")
    return path


def points_of(array: np.ndarray, pixels: tuple[int, int] | None) -> np.ndarray:
    """An array of the published kind, with time first -> (M, T, 2) float32, (-1, -1) where a point is not visible."""
    if array.ndim not in (3, 4) or array.shape[-1] not in (2, 3) or array.dtype.kind != "f":
        raise ValueError(
            f"tracks must be (T, H, W, C) or (T, M, C) of floats with C 2 or 3, not {array.dtype} {array.shape}"
        )
    flat = array.reshape(len(array), -1, array.shape[-1]).astype(np.float32).transpose(1, 0, 2)
    points = flat[..., :2] / np.array(pixels or (1, 1), np.float32)
    visible = np.asarray(np.isfinite(points).all(-1) & (points >= 0).all(-1) & (points <= 1).all(-1))
    if flat.shape[-1] == 3:
        visible &= flat[..., 2] > 0.5
    if visible.any() or not flat.size:
        return np.where(visible[..., None], points, np.float32(ABSENT))
    raise ValueError("no point is inside the frame; if x and y are pixels, give --pixels WIDTH HEIGHT")


def of_masks(points: np.ndarray, video: Video, masks: steps.Masks, num_frames: int) -> Tracks:
    """The tracks (M, K, 2) that are in a phrase's mask at its event's first frame, of points (M, T, 2) of the clip."""
    tracks: Tracks = {}
    for i, (event, found) in enumerate(zip(video.captions.events, masks)):
        moments = Moments.of(event, video.captions.duration, points.shape[1], num_frames)
        during = points[:, moments.frames]
        here = (during[:, 0] != ABSENT).all(-1)
        for j, mask in enumerate(found):
            if mask is not None:
                height, width = mask.shape
                x, y = (during[:, 0] * (width, height)).astype(int).clip(0, (width - 1, height - 1)).T
                tracks[i, j] = during[here & mask[y, x]]
    return {key: track for key, track in tracks.items() if len(track)}


def of_phrases(arrays: Arrays, phrases: Phrases, pixels: tuple[int, int] | None) -> Tracks:
    """The tracks of arrays that are named "{event}.{phrase}". Raises ValueError for other names."""
    tracks: Tracks = {}
    for name, array in arrays.items():
        found = _NAME.fullmatch(name)
        i, j = (int(found[1]), int(found[2])) if found else (len(phrases), 0)
        if i >= len(phrases) or j >= len(phrases[i]):
            raise ValueError(f"array {name!r} is not an '{{event}}.{{phrase}}' of this video")
        tracks[i, j] = points_of(array, pixels)
    return tracks


def _thinned(track: np.ndarray) -> np.ndarray:
    return track[:: -(-len(track) // _MOST_POINTS)] if len(track) else track


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = cli.parse(DenseFlags, argv, prog="python -m dataloaders.annotation.dense")
    logs.configure(flags.log_level)

    def reduce() -> None:
        flags.check_paths()
        run(flags)

    return cli.run("dataloaders.annotation.dense", reduce)


if __name__ == "__main__":
    sys.exit(main())
