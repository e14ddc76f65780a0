"""The prediction log: JSON lines in the form of the predecessor's (VTimeLLM's) evaluation.

    {"video_id": "v_x", "task": "grounding", "query_id": 0, "answer": "From 05 to 31.", "info": {"sentence_id": 2}}

One file may hold the lines of several tasks; each program reads its own. Lines are appended while a model answers. A
kill can cut the last line off: it is left out when the file is read, and removed before more lines are appended.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from dataloaders.formats import lone_surrogate
from pite.evaluate.questions import Key, Question, key_of

log = logging.getLogger(__name__)

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Prediction:
    """A model's answer to one question. Fields as in `Question`."""

    video: str
    task: str
    query_id: int | str
    answer: str
    info: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(question: Question, answer: str, **info: Any) -> Prediction:
        """The answer to a question; `info` is added to the question's own."""
        return Prediction(question.video, question.task, question.query_id, answer, {**question.info, **info})

    @property
    def key(self) -> Key:
        return key_of(self.video, self.task, self.query_id, self.info)

    def line(self) -> str:
        """The line of a prediction log, with its line break."""
        record = {"video_id": self.video, "task": self.task, "query_id": self.query_id, "answer": self.answer}
        return json.dumps({**record, "info": dict(self.info)}) + "\n"


@dataclass(frozen=True)
class Line:
    """A prediction and its place, printed as FILE:NUMBER in messages."""

    path: Path
    number: int
    prediction: Prediction

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


def read_lines(path: Path, task: str | None = None) -> list[Line]:
    """The predictions in a log, of one task or of all, in the file's order.

    A byte order mark is skipped, lines end at line feeds only, and a last line that a kill cut off is left out with a
    warning. Raises ValueError with file, line and field for other malformed lines, and for two answers to one question.
    """
    lines, cut_off = _read(path, task)
    if lines and cut_off:
        log.warning("%s: the last line is cut off and left out; the command that wrote the file completes it", path)
    return lines


def read_predictions(path: Path, task: str | None = None) -> list[Prediction]:
    """The predictions of `read_lines`, without their places, for the command that completes a cut-off line."""
    return [line.prediction for line in _read(path, task)[0]]


def _read(path: Path, task: str | None) -> tuple[list[Line], bool]:
    """The complete lines, and whether the last line is cut off."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    content = path.read_bytes()
    end = _complete(content)
    lines: list[Line] = []
    seen: dict[Key, int] = {}
    for number, text in enumerate(content[:end].removeprefix(_BOM).split(b"\n"), start=1):
        if not text.strip():
            continue
        prediction = _parse(text, f"{path}:{number}", task)
        if prediction is None:
            continue
        if (first := seen.setdefault(prediction.key, number)) != number:
            raise ValueError(f"{path}:{number}: answers the same question as line {first}; keep one of the two")
        lines.append(Line(path, number, prediction))
    return lines, bool(content[end:].strip())


class PredictionWriter:
    """Appends predictions to a log, in a context; each call of `append` is one write that reaches the system at once.

    A last line that a kill cut off is removed when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        end = _complete(content)
        self._file = path.open("ab", buffering=0)
        if end < len(content):
            self._file.truncate(end)
        if end and content[end - 1 : end] != b"\n":
            self._file.write(b"\n")

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Write predictions. Raises OSError, with the file's path, when the disk is full."""
        rest = "".join(prediction.line() for prediction in predictions).encode()
        try:
            while rest:
                # On a disk that fills up, the first write is short and the second one fails.
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()


def _complete(content: bytes) -> int:
    """Bytes up to the end of the last complete line. A last line without line break is complete if it is valid JSON."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:].removeprefix(_BOM))
    except (ValueError, RecursionError):
        return end
    return len(content)


def _parse(text: bytes, where: str, task: str | None) -> Prediction | None:
    """The prediction in a line, or None for a line of another task than `task`."""
    record = _load(text, where)
    if task is not None and _field(record, "task", where) != task:
        return None
    video, name, query_id, answer, info = (_field(record, field, where) for field in _FIELDS)
    return Prediction(video, name, query_id, answer, info or {})


def _load(text: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with video_id, task, query_id, answer and info")
    if fault := lone_surrogate(record):
        raise ValueError(f"{where}: {fault}")
    return record


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_id(value: object) -> bool:
    return isinstance(value, str) or type(value) is int


def _is_info(value: object) -> bool:
    """An object whose `sentence_id`, which is a part of the key, is a number or a text; or null."""
    if value is None:
        return True
    return isinstance(value, dict) and (value.get("sentence_id") is None or _is_id(value["sentence_id"]))


_FIELDS: dict[str, tuple[Callable[[object], bool], str, object]] = {
    "video_id": (_is_text, "a string", None),
    "task": (_is_text, "a string", None),
    "query_id": (_is_id, "a whole number or a string", 0),
    "answer": (_is_text, "a string", None),
    "info": (_is_info, "an object whose sentence_id is a number or a string", {}),
}
"""Name -> check, what is expected, and the value where the field is missing; None for a field that must be given."""


def _field(record: Mapping[str, Any], name: str, where: str) -> Any:
    valid, expected, default = _FIELDS[name]
    if name not in record and default is None:
        raise ValueError(f"{where}: field {name!r} is missing")
    value = record.get(name, default)
    if not valid(value):
        raise ValueError(f"{where}: field {name!r} must be {expected}, not {value!r}")
    return value
