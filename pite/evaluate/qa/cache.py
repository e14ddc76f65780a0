"""Replies of the judge on disk, so that a killed or repeated run pays for no reply twice.

A file of JSON lines {"key", "model", "reply"} that only grows; the key is a checksum of the model and the messages. Each
reply is one write. A last line that a kill cut off is left out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType

from dataloaders.files import write_atomically
from pite.evaluate.qa.prompts import Prompt


def key_of(model: str, prompt: Prompt) -> str:
    """Checksum of a model's name and a prompt, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps([model, prompt.messages, prompt.schema]).encode()).hexdigest()


class Cache:
    """Replies by key, in a context; without a path in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self._replies: dict[str, str] = {}
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._load(path)
            self._file = path.open("ab")

    def _load(self, path: Path) -> None:
        content = path.read_bytes()
        *lines, cut_off = content.split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                self._replies[record["key"]] = str(record["reply"])
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(
                    f"{path}:{number}: no reply of a judge; remove the line, or give another file"
                ) from None
        if cut_off:
            write_atomically(path, content[: len(content) - len(cut_off)])

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def put(self, key: str, model: str, reply: str) -> None:
        line = json.dumps({"key": key, "model": model, "reply": reply}) + "\n"
        self._replies[key] = reply
        if self._file is not None:
            self._file.write(line.encode())
            self._file.flush()

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
