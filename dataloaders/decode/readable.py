"""The error of files without frames, and the checks before a file is opened."""

from __future__ import annotations

import stat
from pathlib import Path

from dataloaders.decode.containers import truncation

MAX_PIXELS = 8192 * 8192
"""Most pixels of a frame, twice those of 8K video. With a damaged header, FFmpeg could allocate terabytes."""


class DecodeError(ValueError):
    """A file that gives no frames. The message starts with the file and gives the reason."""


def check_readable(path: Path, video: bool = True) -> None:
    """Raise DecodeError for a path that is not a file, for an empty file, and for a truncated video.

    Stills are not checked for truncation, since their decoders detect it.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise DecodeError(f"{path}: a pipe or a device, not a file; reading it may never end")
        if status.st_size == 0:
            raise DecodeError(f"{path}: the file is empty")
        if stat.S_ISDIR(status.st_mode):
            raise DecodeError(f"{path}: Is a directory")
        cut = truncation(path) if video else None
    except OSError as error:
        raise DecodeError(f"{path}: {error.strerror}") from None
    if cut:
        raise DecodeError(f"{path}: the file is cut off: {cut}")
