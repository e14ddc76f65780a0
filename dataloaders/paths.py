"""Checks of the paths on a command line, before anything slow is imported. Each error names the flag and the path."""

from __future__ import annotations

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
