"""Models by path or by name: a local directory as it is, a Hugging Face name as the snapshot of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


def resolve(path_or_name: str | Path, files: Sequence[str]) -> Path:
    """The directory of a model; only what `files` (glob patterns) names is downloaded, where it is not cached.

    Raises ValueError when it is neither a directory nor a name that the hub knows and gives.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name} is neither a directory nor a Hugging Face model name (owner/name)")
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} could not be had from the Hugging Face hub: {reason}") from None
