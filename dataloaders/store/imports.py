"""Import features that another program made: a file for each id, in a folder.

VTimeLLM published `{id}.npy`, each (N, channels). The form of PiTe's published features is not documented
(docs/data.md lists what is assumed): files of NumPy or PyTorch are read, and files with more frames are sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from dataloaders.failures import LEDGER, Failure, Ledger, over_budget, read_failures
from dataloaders.formats import SPLITS, Split, present_formats
from dataloaders.media import CACHE, list_media
from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest, NonFiniteError

_SUFFIXES = (".npy", ".pt", ".pth")
_LOOKED_AT = 9
"""Files whose most frequent shape is taken for that of all."""


class FeatureFolder:
    """A folder of `{id}.npy` or `{id}.pt`, each (frames, channels) of floats; axes of length one may stand around them, and
    the feature of a still may be (channels,).

    split       prefix of the keys, such as `stage2`
    num_frames  rows to take from each file, by PiTe's rule (linspace truncated); None for all, equally many in each
    It has the reading methods of a FeatureStore. Raises ValueError if the folder holds no such file.
    """

    def __init__(self, path: Path, split: str, num_frames: int | None = None) -> None:
        self.path, self._num_frames = path, num_frames
        files = [file for suffix in _SUFFIXES[::-1] for file in sorted(path.glob(f"*{suffix}"))]
        self._files = {f"{split}/{file.stem}": file for file in sorted(files, key=lambda file: file.stem)}
        if not self._files:
            raise ValueError(f"{path} holds no {' or '.join(_SUFFIXES)} file")
        self.tokens, self.channels = self._usual_shape()

    def _usual_shape(self) -> tuple[int, int]:
        shapes: Counter[tuple[int, int]] = Counter()
        error: ValueError | None = None
        keys = list(self._files)
        for key in keys[:: max(1, len(keys) // _LOOKED_AT)]:
            try:
                frames, channels = self._load(key).shape
                shapes[frames, channels] += 1
            except ValueError as caught:
                error = error or caught
        if not shapes:
            assert error is not None
            raise error
        return shapes.most_common(1)[0][0]

    @property
    def keys(self) -> Sequence[str]:
        return tuple(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, key: object) -> bool:
        return key in self._files

    def file(self, key: str) -> Path:
        return self._files[key]

    def read(self, key: str) -> np.ndarray:
        """The record (tokens, channels), in the floating-point type of the file. Raises ValueError for another shape."""
        record = self._load(key)
        if record.shape != (self.tokens, self.channels):
            raise ValueError(
                f"{self._files[key]} holds an array of shape {record.shape}, the others {self.tokens, self.channels}"
            )
        return record

    def _load(self, key: str) -> np.ndarray:
        file = self._files[key]
        record = load_array(file)
        short = record.reshape([n for n in record.shape if n != 1]) if record.ndim > 2 else record
        squeezed = np.atleast_2d(short)
        if squeezed.ndim != 2 or not squeezed.size:
            raise ValueError(f"{file} holds an array of shape {record.shape}, not (frames, channels)")
        if self._num_frames is None:
            return squeezed
        return squeezed[np.linspace(0, len(squeezed) - 1, self._num_frames, dtype=np.int64)]


def load_array(file: Path) -> np.ndarray:
    """A file's array of floats; of a `.pt` file its tensor, or the only one in a dictionary.

    Runs no code from the file. Raises ValueError for anything else.
    """
    try:
        record = np.load(file, allow_pickle=False) if file.suffix == ".npy" else _load_tensor(file)
    except MemoryError:
        raise
    except Exception as error:  # A damaged file can raise anything.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is no readable {file.suffix} file ({reason})") from None
    if not np.issubdtype(record.dtype, np.floating):
        raise ValueError(f"{file} holds {record.dtype}, not floating-point numbers")
    return cast(np.ndarray, record)


def _load_tensor(file: Path) -> np.ndarray:
    import torch

    content = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(content, dict):
        tensors = [value for value in content.values() if isinstance(value, torch.Tensor)]
        if len(tensors) != 1:
            raise ValueError(f"a dictionary with {len(tensors)} tensors where one is needed")
        (content,) = tensors
    if not isinstance(content, torch.Tensor):
        raise ValueError(f"holds a {type(content).__name__}, not a tensor")
    content = content.detach()
    return np.asarray(content.float().numpy() if content.dtype == torch.bfloat16 else content.numpy())


@dataclass(frozen=True)
class Imported:
    """The result of an import: new records, and files that could not be read."""

    copied: int
    failures: list[Failure]


def import_features(
    folder: FeatureFolder, output: Path, manifest: Manifest, shard_records: int = 1024, budget: float = 0.01
) -> Imported:
    """Copy a folder of features into a store. May be repeated after a kill.

    budget  share of the files that may be unreadable, of another shape or not finite in float16; they are logged in the
            ledger next to the store
    Raises ValueError for a manifest of another shape than the files, and if more files are bad than the budget allows.
    """
    if (manifest.tokens, manifest.channels) != (folder.tokens, folder.channels):
        raise ValueError(
            f"{folder.path} holds records of {folder.tokens, folder.channels}, the store {output} is for "
            f"{manifest.tokens, manifest.channels}"
        )
    store = FeatureStore.create_or_open(output, manifest, "give another OUTPUT")
    failures: list[Failure] = []
    copied = 0
    with FeatureWriter(store, shard_records=shard_records) as writer:
        for key in folder.keys:
            if key in store:
                continue
            try:
                writer.add({key: folder.read(key)})
                copied += 1
            except (ValueError, NonFiniteError) as error:
                failures.append(Failure(key, str(folder.file(key)), "import", str(error)))
                if (count := len(failures)) > budget * len(folder):
                    bad = f"{count:,} of {len(folder):,} files cannot be imported"
                    raise ValueError(f"{bad}, {over_budget(count, len(folder), budget)}; the last: {error}") from None
    Ledger(output.parent / LEDGER, len(folder)).log(failures)
    return Imported(copied, failures)


def check_import(data: Path | None, split: str, budget: float) -> None:
    """Check the flags of an import before anything is copied. Raises ValueError.

    data  data folder for `log_missing`, or None
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"--failure-budget is a share between 0 and 1, not {budget}")
    name = split_of_keys(split)
    if data is not None:
        present_formats(data, name)


def split_of_keys(prefix: str) -> Split:
    """The split that keys of this prefix belong to, such as `stage1` of `stage1/coco`. Raises ValueError for none."""
    name = prefix.partition("/")[0]
    if name not in SPLITS:
        raise ValueError(f"--split must begin with {', '.join(SPLITS)}, not {name!r}")
    return cast(Split, name)


def log_missing(folder: Path, output: Path, data: Path, split: str, budget: float) -> int:
    """Log the media of a split that the store `output` lacks, in the ledger next to it, so that training leaves them
    out.

    folder  of the imported `.npy` files; each line contains the missing file
    split   a split, such as `stage2`, or a part of one, such as `stage1/coco`
    budget  share of the split's media that may be missing
    Returns the number of missing media. Media in the ledger are not logged again. Raises ValueError, and logs nothing,
    for a split without media and if more media are missing than the budget allows.
    """
    # Training counts records without media.
    named = list_media(data, [split_of_keys(split)], output.parent / CACHE).media
    media = [m for m in named if m.key.rpartition("/")[0] == split]
    if not media:
        raise ValueError(f"{data} names no media whose keys begin with {split}/")
    store = FeatureStore(output)
    missing = [m.key for m in media if m.key not in store]
    if len(missing) > budget * len(media):
        raise ValueError(
            f"{len(missing):,} of {len(media):,} media of {split} have no file in {folder}, such as {missing[0]!r}, "
            f"{over_budget(len(missing), len(media), budget)}"
        )
    ledger = Ledger(output.parent / LEDGER, len(media))
    known = {failure.id for failure in read_failures(ledger.path)}
    files = {key: folder / f"{key.rpartition('/')[2]}.npy" for key in missing if key not in known}
    ledger.log(
        Failure(key, str(file), "import", f"{file.name}: not among the imported files") for key, file in files.items()
    )
    return len(missing)
