"""Tokenized samples on disk: flat arrays in one mapped safetensors file. A sample is a slice of each array.

Reading and tokenizing an annotation takes 1 to 2 ms, reading it here some microseconds. A mention's trajectory is
stored once, even if many tokens share it: a PiTe-143k sample takes about 20 kB.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dataloaders.files import sync, temporary_directory
from dataloaders.records import TokenizedSample

Columns = Mapping[str, np.ndarray]

_FEATURES = "num_features"
"""Note that holds the number of rows of each sample's record."""

_TYPES: dict[str, tuple[str, type[np.generic]]] = {
    "token_ids": ("I32", np.int32),
    "target_positions": ("I32", np.int32),
    "trajectory_positions": ("I32", np.int32),
    "trajectory_owners": ("I32", np.int32),
    "trajectories": ("F32", np.float32),
    "lengths": ("I32", np.int32),
    "frame_starts": ("I32", np.int32),
    "coordinates": ("I32", np.int32),
    "largest_tokens": ("I32", np.int32),
    "texts": ("U8", np.uint8),
    "digests": ("U8", np.uint8),
}
"""Columns and their types in safetensors and NumPy. Byte columns come last, so that the numbers are aligned.

Concatenated over samples: token_ids, target_positions, trajectory_positions, trajectory_owners (index of the position's
trajectory among those of the sample), trajectories (K, P, N, 2) and texts (id and media, UTF-8). With one row per
sample: lengths (n, 6), which are tokens, targets, positions, trajectories, bytes of the id, bytes of the media;
frame_starts, coordinates and largest_tokens (n,); digests (n, 16).
"""


def pack(samples: Sequence[TokenizedSample], texts: Sequence[bytes], digests: Sequence[bytes]) -> Columns:
    """The columns of some samples. `texts` are their ids and media, two per sample; `digests` are 16 bytes each."""
    owners, trajectories = [], []
    for sample in samples:
        # Tokens of one mention are next to each other and have equal trajectories.
        first = np.ones(len(sample.trajectory), dtype=bool)
        first[1:] = (sample.trajectory[1:] != sample.trajectory[:-1]).any((1, 2, 3))
        owners.append(np.cumsum(first) - 1)
        trajectories.append(sample.trajectory[first])
    flat = {
        "token_ids": [s.token_ids for s in samples],
        "target_positions": [s.target_positions for s in samples],
        "trajectory_positions": [s.trajectory_positions for s in samples],
        "trajectory_owners": owners,
        "trajectories": trajectories,
        "texts": [np.frombuffer(t, np.uint8) for t in texts],
    }
    columns = {name: np.concatenate(parts).astype(_TYPES[name][1], copy=False) for name, parts in flat.items()}
    names = ("token_ids", "target_positions", "trajectory_positions", "trajectories")
    lengths = [[len(part) for part in flat[name]] for name in names]
    lengths += [[len(t) for t in texts[0::2]], [len(t) for t in texts[1::2]]]
    columns["lengths"] = np.array(lengths, dtype=np.int32).T
    columns["frame_starts"] = np.array([s.frame_start for s in samples], dtype=np.int32)
    columns["coordinates"] = np.array([s.num_coordinates for s in samples], dtype=np.int32)
    columns["largest_tokens"] = np.array([s.token_ids.max() for s in samples], dtype=np.int32)
    columns["digests"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    return columns


def write(
    path: Path, parts: Iterable[Columns], num_features: int, trajectory: tuple[int, int], notes: Mapping[str, str]
) -> None:
    """Write the columns of all `parts` as one file, atomically. Needs the memory of one part.

    num_features  rows of each sample's record
    trajectory    P and N of the trajectories
    notes  texts to store with the samples; they may be filled until the last part was taken
    """
    with temporary_directory(path) as temporary, ExitStack() as stack:
        files = {name: stack.enter_context((temporary / name).open("w+b")) for name in _TYPES}
        for part in parts:
            for name, file in files.items():
                file.write(part[name].tobytes())
        rows = {"trajectories": (*trajectory, 2), "lengths": (6,), "digests": (16,)}
        header: dict[str, object] = {"__metadata__": {**notes, _FEATURES: str(num_features)}}
        end = 0
        for name, file in files.items():
            size, row = file.seek(0, os.SEEK_END), rows.get(name, ())
            count = size // (int(np.prod(row)) * np.dtype(_TYPES[name][1]).itemsize)
            header[name] = {"dtype": _TYPES[name][0], "shape": [count, *row], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        whole = temporary / "whole"
        with whole.open("wb") as target:
            target.write(struct.pack("<Q", len(text)) + text)
            for file in files.values():
                file.seek(0)
                shutil.copyfileobj(file, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        whole.replace(path)
    sync(path.parent)


class TokenizedFile:
    """A file of `write`, mapped. Samples are read on demand, ids and media once. Raises ValueError if it is damaged.

    num_features                  rows of each sample's record
    tokens, targets, coordinates  (n,) int32 of each sample: length, supervised tokens, present coordinates
    mentions                      (n,) int32, mentions with different trajectories
    largest_tokens, frame_starts  (n,) int32 of each sample: the largest token id, the position of the first frame
    digests                       (n, 16) uint8, checksum of each record's bytes
    """

    def __init__(self, path: Path, content: bytes | None = None) -> None:
        mapped: mmap.mmap | bytes
        try:
            if content is None:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                mapped = content
            (size,) = struct.unpack("<Q", mapped[:8])
            header = json.loads(mapped[8 : 8 + size])
            self.notes: dict[str, str] = header.pop("__metadata__")
            self.num_features = int(self.notes.pop(_FEATURES))
            columns = {}
            for name, (_, dtype) in _TYPES.items():
                shape, (begin, _) = header[name]["shape"], header[name]["data_offsets"]
                values = np.frombuffer(mapped, dtype, int(np.prod(shape)), 8 + size + begin)
                columns[name] = values.reshape(shape)
        except (ValueError, KeyError, struct.error) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and it will be made again") from None
        self._path, self._mapped, self._columns = path, mapped, columns
        lengths = columns["lengths"]
        self._starts = np.zeros((len(lengths) + 1, 6), dtype=np.int64)
        np.cumsum(lengths, axis=0, out=self._starts[1:])
        self.tokens, self.targets, self.mentions = lengths[:, 0], lengths[:, 1], lengths[:, 3]
        self.coordinates, self.digests = columns["coordinates"], columns["digests"]
        self.largest_tokens, self.frame_starts = columns["largest_tokens"], columns["frame_starts"]
        joined = columns["texts"].tobytes()
        ends = np.cumsum(lengths[:, 4:].reshape(-1)).tolist()
        texts = [joined[a:b].decode() for a, b in zip([0, *ends], ends)]
        self.ids, self.media = texts[0::2], texts[1::2]

    def __reduce__(self) -> tuple[type[TokenizedFile], tuple[Path, bytes]]:
        return TokenizedFile, (self._path, self._mapped[:])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> TokenizedSample:
        columns, starts, ends = self._columns, self._starts[index], self._starts[index + 1]
        tokens, targets, positions, trajectories = (slice(a, b) for a, b in zip(starts[:4], ends[:4]))
        own = columns["trajectories"][trajectories]
        return TokenizedSample(
            id=self.ids[index],
            media=self.media[index],
            token_ids=columns["token_ids"][tokens].astype(np.int64),
            frame_start=int(columns["frame_starts"][index]),
            num_features=self.num_features,
            target_positions=columns["target_positions"][targets].astype(np.int64),
            trajectory_positions=columns["trajectory_positions"][positions].astype(np.int64),
            trajectory=own[columns["trajectory_owners"][positions]],
        )
