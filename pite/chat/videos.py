"""Videos of a chat: decoded and encoded once, and kept for later questions, with what the language model computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from dataloaders.decode.clips import Clip
from dataloaders.decode.readable import check_readable
from dataloaders.decode.sampling import Sampling
from dataloaders.decode.video import sample_video
from pite.clip import ClipEncoder
from pite.pooled import record_of


@dataclass(frozen=True)
class Computed:
    """Token ids (n,), 0 at the frames, and each layer's keys and values (1, kv_heads, n, head_dim) of their rows."""

    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    layers: tuple[tuple[Tensor, Tensor], ...] = ()

    @staticmethod
    def of(ids: Sequence[int], cache: DynamicCache) -> Computed:
        """The rows in a cache; `ids` may be longer."""
        return Computed(
            np.array(ids[: cache.get_seq_length()]), tuple((layer.keys, layer.values) for layer in cache.layers)
        )

    def common(self, ids: np.ndarray) -> int:
        """Number of rows that a prompt shares with these; at least one row of the prompt remains to be computed."""
        length = min(len(self.ids), len(ids) - 1)
        differs = np.flatnonzero(self.ids[:length] != ids[:length])
        return int(differs[0]) if len(differs) else length

    def cache(self, rows: int) -> DynamicCache:
        """A cache that begins with the first rows; it grows without changing these."""
        cache = DynamicCache()
        for i, (keys, values) in enumerate(self.layers if rows else ()):
            cache.update(keys[:, :, :rows], values[:, :, :rows], i)
        return cache


@dataclass
class Video:
    """An encoded video.

    features  (N, C) float16, as those in a store; of a family with more rows than frames (N + P, C)
    places    P, 0 for PiTe
    duration  seconds; None for a file without times
    times     seconds at which each of the N frames is shown; empty for a file without times
    computed  the rows of the last prompt about it and its answer, which the next prompt may begin with
    """

    path: Path
    features: np.ndarray
    duration: float | None
    times: tuple[float, ...] = ()
    computed: Computed = field(default_factory=Computed)
    places: int = 0

    @property
    def num_frames(self) -> int:
        return len(self.features) - self.places

    def seconds(self, frame: int) -> float | None:
        """The time of a frame index, the inverse of how training makes an index of a time: index / N of the duration."""
        return None if self.duration is None else frame / self.num_frames * self.duration


class Videos:
    """Encodes videos, and keeps the last `most`.

    A video of a 7B model takes 0.5 MB for each row of its prompt and answer, 71 MB for head and frames (by count,
    bfloat16). A file that has changed is encoded anew.
    """

    def __init__(self, clip: ClipEncoder, num_frames: int, sampling: Sampling, most: int) -> None:
        self._clip, self._num_frames, self._sampling, self._most = clip, num_frames, sampling, most
        self._kept: OrderedDict[tuple[Path, int, int, Clip], Video] = OrderedDict()

    def get(self, path: Path, clip: Clip = None) -> Video:
        """The encoded video, or the part of it between two times in seconds.

        Raises DecodeError for a file that cannot be decoded completely.
        """
        check_readable(path)
        status = path.stat()
        key = (path.resolve(), status.st_size, status.st_mtime_ns, clip)
        video = self._kept.pop(key, None) or self._encode(path, clip)
        self._kept[key] = video
        while len(self._kept) > self._most:
            self._kept.pop(next(iter(self._kept)), None)
        return video

    def clear(self) -> None:
        """Forget all videos."""
        self._kept.clear()

    def _encode(self, path: Path, clip: Clip) -> Video:
        cropped = self._clip.preprocess.cropped
        sampled = sample_video(path, self._num_frames, clip, transform=cropped, sampling=self._sampling)
        # Half precision, as the stored features in training.
        record = record_of(self._clip, np.stack(sampled.frames), self._num_frames).half().cpu().numpy()
        return Video(path, record, sampled.duration, sampled.times, places=len(record) - self._num_frames)

    def frames(self, path: Path, width: int) -> list[np.ndarray]:
        """The N frames (h, w, 3) to draw on, `width` pixels wide where they are wider; decoded anew."""

        def shrunk(frame: np.ndarray) -> np.ndarray:
            height = max(round(frame.shape[0] * width / frame.shape[1]), 1)
            return frame if frame.shape[1] <= width else np.array(Image.fromarray(frame).resize((width, height)))

        return sample_video(path, self._num_frames, transform=shrunk, sampling=self._sampling).frames
