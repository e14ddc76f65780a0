"""Finds models by local path or Hugging Face name, and reads their weights.

Only safetensors and `torch.load(weights_only=True)` are read.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dataloaders.errors import reason
from dataloaders.files import check_model_name, read_json_object, require_file

_SUBFOLDERS = "*/*"
"""The hub's patterns match across slashes, so `*.safetensors` alone would also match files in subfolders."""

_CONNECTION = {"TransportError", "ConnectionError", "Timeout"}
"""Base classes of what requests and httpx raise without a connection."""


def resolve(path_or_name: str | Path, files: Sequence[str]) -> Path:
    """Local directory of a model. For a Hugging Face name, files that are not cached are downloaded.

    Downloaded are the files that match `files` (glob patterns) and the weights: safetensors, or torch files if there
    are none. Subfolders are left out. Raises ValueError when `path_or_name` is not a directory and the hub has no such
    model or does not give access to it.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_name)
    # The snapshot shows which weights exist; the hub's file list would need a network.
    directory = fetch(name, [*files, *_patterns("model", ".safetensors")])
    with _downloading(name):
        if not standard_files(directory) and not standard_files(directory, "adapter_model"):
            # The snapshot's folder is named after its commit: take the weights from the same commit.
            patterns = _patterns("pytorch_model", ".bin")
            try:
                snapshot_download(name, revision=directory.name, allow_patterns=patterns, ignore_patterns=_SUBFOLDERS)
            except OSError:
                # Offline, huggingface_hub 1 requests the commit's file list even if the files are cached.
                if not standard_files(directory, "pytorch_model", ".bin"):
                    raise
    return directory


def fetch(name: str, files: Sequence[str]) -> Path:
    """Local directory of the files of a Hugging Face name that match `files`, downloaded unless cached.

    Raises ValueError as `resolve`. Without a network it fails after one request: the hub's client repeats requests for
    single files, but not the one for a snapshot.
    """
    check_model_name(name)
    with _downloading(name):
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=_SUBFOLDERS))


class DownloadError(ValueError):
    """A model that is given by name cannot be downloaded. The message has the reason and the name."""


@contextmanager
def _downloading(name: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(
            f"{name} could not be downloaded from the Hugging Face hub: {why_not(error)}, and there is no folder {name} here"
        ) from None


def why_not(error: BaseException) -> str:
    """Why a request to the hub failed, with a remedy for what a user can mend."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, and the files are not in the cache"
        if isinstance(found, LocalTokenNotFoundError):
            return "it needs a token: log in with `hf auth login`"
        status = getattr(getattr(found, "response", None), "status_code", None)
        if status in (401, 403):
            return f"it gives no access ({status}): check the name, and log in with `hf auth login`"
        if status == 404:
            return "it has no model of this name"
        # Its client is requests, httpx or httpx2, depending on the version.
        if _CONNECTION & {kind.__name__ for kind in type(found).__mro__}:
            return f"it cannot be reached ({reason(found)})"
        found = found.__cause__ or found.__context__
    return reason(error)


def _patterns(stem: str, suffix: str) -> list[str]:
    """Patterns of one kind of weights: the single file, the shards and their index; not EMA weights and the like."""
    return [f"{stem}{suffix}", f"{stem}{suffix}.index.json", f"{stem}-?????-of-?????{suffix}"]


class Weights(Mapping[str, Tensor]):
    """Every tensor of a directory's `weight_files`, read lazily from mapped memory.

    Raises ValueError as `weight_files` does, and for a file that cannot be read, naming it.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        files, index = _choose_files(directory, stem)
        self._tensors: dict[str, tuple[Path, Callable[[], Tensor]]] = {}
        for file in files:
            with _readable(file):
                found = _safetensors(file) if file.suffix == ".safetensors" else torch_file(file)
            for name, read in found.items():
                if index.get(name, file.name) != file.name:
                    continue  # the index names another file for this tensor
                if name in self._tensors:
                    raise ValueError(f"{directory}: {name} is both in {self._tensors[name][0].name} and in {file.name}")
                self._tensors[name] = (file, read)

    def __getitem__(self, name: str) -> Tensor:
        file, read = self._tensors[name]
        with _readable(file):
            return read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def weight_files(directory: Path, stem: str = "model") -> list[Path]:
    """The files that hold a directory's weights, sorted by name; all other files are ignored.

    stem  "model", or "adapter_model" for a PEFT adapter
    Safetensors have priority over torch files. For each kind: the files that the index names, else the standard single
    file (`model.safetensors`, `pytorch_model.bin`), else a complete set `model-00001-of-00003.safetensors` and so on.
    Raises ValueError if there are none, if one is missing or is a git-lfs pointer, and if an index and a single file,
    or two sets of shards, contradict each other.
    """
    return _choose_files(directory, stem)[0]


def standard_files(directory: Path, stem: str = "model", suffix: str = ".safetensors") -> list[Path]:
    """The weight files of one kind in a directory that have a standard name, single or sharded, without the index."""
    pattern = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?{re.escape(suffix)}")
    return sorted(path for path in directory.iterdir() if pattern.fullmatch(path.name)) if directory.is_dir() else []


def index_file(directory: Path, stem: str = "model", suffix: str = ".safetensors") -> Path:
    """Path of the index of sharded weights of one kind: JSON, whose `weight_map` is {tensor: file}."""
    return directory / f"{stem}{suffix}.index.json"


def _choose_files(directory: Path, stem: str) -> tuple[list[Path], dict[str, str]]:
    """`weight_files`, and the index's map from tensor to file (empty without an index)."""
    torch_stem = "pytorch_model" if stem == "model" else stem
    for name, suffix in ((stem, ".safetensors"), (torch_stem, ".bin")):
        index, present = index_file(directory, name, suffix), standard_files(directory, name, suffix)
        weight_map = _weight_map(index) if index.exists() else {}
        if weight_map:
            files = [directory / file for file in sorted(set(weight_map.values()))]
            single = directory / f"{name}{suffix}"
            if single in present and single not in files:
                raise ValueError(f"{directory} holds both {single.name} and {index.name}: remove the one that is stale")
        else:
            files = _without_index(directory, name, suffix, present)
        for file in files:
            if not file.exists() and len(files) > 1:
                why = f"though {index.name} names it" if weight_map else "and the other shards of its set are there"
                raise ValueError(f"{file} is missing, {why}")
            require_file(file)
        if files:
            return files, weight_map
    raise ValueError(
        f"{directory} holds no {stem}*.safetensors and no *.bin weights of a standard name ({stem}.safetensors, "
        f"{torch_stem}.bin, or shards of either)"
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} holds no weight_map of tensors and their files")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(f"{index} names {file!r} for a tensor, which is not a file of its folder")
    return weight_map


def _without_index(directory: Path, stem: str, suffix: str, present: Sequence[Path]) -> list[Path]:
    """The single file, or every member of the one set of shards, missing ones included."""
    single = directory / f"{stem}{suffix}"
    totals = {path.name[-len(suffix) - 5 : -len(suffix)] for path in present if path != single}
    if single in present or not totals:
        return [single] if single in present else []
    if len(totals) > 1:
        raise ValueError(
            f"{directory} holds shards of {' and of '.join(sorted(totals))} files and no {stem}{suffix}.index.json to "
            "choose between them: remove the stale ones"
        )
    (total,) = totals
    return [directory / f"{stem}-{i + 1:05d}-of-{total}{suffix}" for i in range(int(total))]


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {reason(error)}") from None


def _safetensors(file: Path) -> dict[str, Callable[[], Tensor]]:
    shard = safe_open(file, framework="pt")
    return {name: partial(shard.get_tensor, name) for name in shard.keys()}  # noqa: SIM118 (safe_open is no mapping)


def torch_file(file: Path) -> dict[str, Callable[[], Tensor]]:
    """Functions that return the tensors of a torch file, by name. Raises ValueError for one that holds more than tensors."""
    try:
        # Files from torch before 1.6 are not zip archives and cannot be mapped.
        content = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception:  # A damaged or foreign pickle can raise anything, and torch's message advises to trust the file.
        raise ValueError(
            f"{file} cannot be read: it is cut off or damaged, or holds more than tensors; fetch it again, or use safetensors"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be read: it holds no tensors by name, but {type(content).__name__}")
    return {name: partial(content.__getitem__, name) for name in content}
