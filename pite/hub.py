"""Models by path or by name: a local directory as it is, a Hugging Face name as the snapshot of it; and their weights.

Only safetensors and `torch.load(weights_only=True)` are read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

_SUBFOLDERS = "*/*"
"""The hub's patterns match across slashes, so `*.safetensors` alone would take whatever lies deeper."""


def resolve(path_or_name: str | Path, files: Sequence[str]) -> Path:
    """The directory of a model; of a name, only what is not cached is downloaded.

    That is what `files` (glob patterns) names and the weights: safetensors, torch files only where there are none, and
    nothing out of subfolders. Raises ValueError when it is neither a directory nor a name that the hub knows and gives.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name} is neither a directory nor a Hugging Face model name (owner/name)")
    try:
        # Where weights are, the snapshot shows; a list of the hub's would not be there offline.
        directory = Path(
            snapshot_download(name, allow_patterns=[*files, "model*.safetensors"], ignore_patterns=_SUBFOLDERS)
        )
        if not any(directory.glob("model*.safetensors")):
            # The snapshot is named after its commit: the weights are of the same one.
            try:
                snapshot_download(
                    name, revision=directory.name, allow_patterns="pytorch_model*.bin", ignore_patterns=_SUBFOLDERS
                )
            except OSError:
                # Offline, huggingface_hub 1 asks for a list of the commit's files even where they are.
                if not any(directory.glob("pytorch_model*.bin")):
                    raise
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{name} could not be had from the Hugging Face hub: {_first_line(error)}") from None
    return directory


class Weights(Mapping[str, Tensor]):
    """Every tensor of a directory's safetensors (preferred) or torch files, read from mapped memory when it is asked for.

    Raises ValueError where there is neither, and naming a file that cannot be read.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        files = sorted(directory.glob(f"{stem}*.safetensors"))
        files = files or sorted(directory.glob(f"{stem}*.bin")) or sorted(directory.glob(f"pytorch_{stem}*.bin"))
        if not files:
            raise ValueError(f"{directory} holds no {stem}*.safetensors and no *.bin weights")
        self._tensors: dict[str, tuple[Path, Callable[[], Tensor]]] = {}
        for file in files:
            with _readable(file):
                found = _safetensors(file) if file.suffix == ".safetensors" else _torch_file(file)
            self._tensors |= {name: (file, read) for name, read in found.items()}

    def __getitem__(self, name: str) -> Tensor:
        file, read = self._tensors[name]
        with _readable(file):
            return read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {_first_line(error)}") from None


def _safetensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    shard = safe_open(file, framework="pt")
    return {name: partial(shard.get_tensor, name) for name in shard.keys()}  # noqa: SIM118 (safe_open is no mapping)


def _torch_file(file: Path) -> dict[str, Callable[[], Tensor]]:
    try:
        # What torch wrote before 1.6 is no archive and cannot be mapped.
        content = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # A damaged or foreign pickle ends in whatever its bytes lead to.
        raise ValueError(f"{file} cannot be read: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be read: it holds no tensors by name, but {type(content).__name__}")
    return {name: partial(content.__getitem__, name) for name in content}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
