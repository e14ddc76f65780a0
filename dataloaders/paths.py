"""Checks of the paths on a command line, before anything slow is imported. Each error names the flag and the path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dataloaders.files import check_model_name, temporary_sibling


def model(flag: str, path_or_name: Path | str | None) -> None:
    """Raise ValueError unless it is a folder or can be a name on Hugging Face's hub; None is accepted."""
    try:
        if path_or_name is not None:
            check_model_name(str(path_or_name))
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None


def input_file(flag: str, path: Path | None) -> None:
    """Raise ValueError unless `path` is a file; None is accepted."""
    if path is not None and not path.is_file():
        raise ValueError(f"{flag} {path}: {'this is a folder, not a file' if path.is_dir() else 'no such file'}")


def input_folder(flag: str, path: Path | None) -> None:
    """Raise ValueError unless `path` is a folder; None is accepted."""
    if path is not None and not path.is_dir():
        raise ValueError(f"{flag} {path}: {'this is a file, not a folder' if path.exists() else 'no such folder'}")


def output_file(flag: str, path: Path | None) -> None:
    """Make the folder of a file that will be written, and raise ValueError if the file could not be.

    None and a device are accepted. A file that exists is left as it is.
    """
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
        return
    if path.is_dir():
        raise ValueError(f"{flag} {path}: this is a folder, not a file")
    if fault := _under_a_file(path.parent):
        raise ValueError(f"{flag} {path} cannot be written: {fault}")
    trial = temporary_sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from None


def distinct_files(written: Mapping[str, Path | None], read: Mapping[str, Path | None]) -> None:
    """Raise ValueError if a file that will be written is one that is read, or another one that is written.

    written, read  flag -> file, or None
    """
    named = [(flag, path) for flag, path in written.items() if path is not None]
    for i, (flag, path) in enumerate(named):
        others = [*named[:i], *((other, file) for other, file in read.items() if file is not None)]
        for other, file in others:
            if path.resolve() == file.resolve() or (path.exists() and file.exists() and path.samefile(file)):
                raise ValueError(f"{flag} {path}: {other} names the same file, which would be lost; give another file")


def output_folder(flag: str, path: Path) -> None:
    """Raise ValueError if the folder `path` does not exist and cannot be made, or nothing can be written to it.

    A trial folder is made and removed: permissions do not show that a file system is read-only, or is none, as /proc.
    """
    if fault := _under_a_file(path):
        raise ValueError(f"{flag} {path}: {'this is a file, not a folder' if path.exists() else fault}")
    existing = _existing(path)
    trial = temporary_sibling(existing / path.name)
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {existing}: {error.strerror}") from None


def _existing(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _under_a_file(folder: Path) -> str:
    """Why a folder cannot be made because of a file at its place or above it; empty if there is none."""
    existing = _existing(folder)
    return "" if existing.is_dir() else f"{existing} is a file, not a folder"
