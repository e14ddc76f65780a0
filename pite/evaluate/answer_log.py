"""The file in which a run writes its answers, continued after a kill.

    P.jsonl            the answers, appended batch by batch; in the questions' order when all are there
    P.jsonl.run.json   what the answers of each task depend on: model, features, questions
    P.jsonl.rank1      the answers of one process of several, until all have finished

A file whose answers come from another model, other features or other questions is refused, so that no score mixes two.
Answers of other tasks in the file stay. A line with an `error` in its info is removed when a run continues, which answers its
question again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dataloaders.files import read_json_object, write_atomically
from dataloaders.locks import Lock, lock
from dataloaders.ranks import ALONE, Ranks
from pite.evaluate.predictions import Prediction, PredictionWriter, read_predictions
from pite.evaluate.processes import barrier
from pite.evaluate.questions import Key, Question

Settings = Mapping[str, str | int | float | None]
"""What answers depend on, by name."""


class AnswerLog:
    """The answers of one task, in a file or in memory.

    path       the prediction file; None keeps the answers in memory
    settings   what the answers depend on
    overwrite  remove answers of other settings instead of refusing them
    All processes of a job construct it, append their own answers, and call `finish`.
    """

    def __init__(
        self, path: Path | None, task: str, settings: Settings, ranks: Ranks = ALONE, overwrite: bool = False
    ) -> None:
        self._path, self._task, self._ranks = path, task, ranks
        self.answers: dict[Key, Prediction] = {}
        self._writer: PredictionWriter | None = None
        self._lock: Lock | None = None
        if path is None:
            return
        if ranks.rank == 0:
            self._lock = _lock(path)
            self._check(path, settings, overwrite)
        barrier(ranks)
        for file in (path, *_parts(path)):
            if file.exists():
                self.answers |= {each.key: each for each in read_predictions(file, task)}
        barrier(ranks)  # no process reads a file while another one appends to it
        self._writer = PredictionWriter(path if ranks.size == 1 else _part(path, ranks.rank))

    def append(self, predictions: Sequence[Prediction]) -> None:
        """Add answers, and write those that are new."""
        new = [prediction for prediction in predictions if prediction.key not in self.answers]
        if self._writer is not None and new:
            self._writer.append(new)
        self.answers |= {prediction.key: prediction for prediction in new}

    def finish(self, questions: Sequence[Question]) -> list[Prediction] | None:
        """The answers to all questions of the task, in order; the file of predictions is complete then.

        Processes other than the first return None.
        """
        if self._writer is not None:
            self._writer.close()
        barrier(self._ranks)
        if self._ranks.rank:
            return None
        if self._path is not None:
            self._merge(self._path, questions)
        if self._lock is not None and self._path is not None:
            _lock_path(self._path).unlink(missing_ok=True)
            self._lock.close()
        return [self.answers[question.key] for question in questions]

    def _merge(self, path: Path, questions: Sequence[Question]) -> None:
        """Write the file in the questions' order, and remove the files of the processes."""
        parts = _parts(path)
        for part in parts:
            self.answers |= {each.key: each for each in read_predictions(part, self._task)}
        others = [each for each in read_predictions(path) if each.task != self._task] if path.exists() else []
        # Answers to events that were left out this time are kept, after the others.
        order = dict.fromkeys([*(question.key for question in questions), *self.answers])
        content = "".join(each.line() for each in [*others, *(self.answers[key] for key in order)])
        if not path.exists() or path.read_bytes() != content.encode():
            write_atomically(path, content)
        for part in parts:
            part.unlink()

    def _check(self, path: Path, settings: Settings, overwrite: bool) -> None:
        """Raise ValueError if the file holds answers of the task with other settings; store the settings."""
        if path.exists():
            read_predictions(path)  # a malformed line of another task would end the run at its end
        record = path.with_name(f"{path.name}.run.json")
        known = read_json_object(record) if record.exists() else {}
        files = [file for file in (path, *_parts(path)) if file.exists()]
        if any(read_predictions(file, self._task) for file in files) and (
            reason := _difference(known.get(self._task), settings)
        ):
            if not overwrite:
                raise ValueError(
                    f"{path} holds answers {reason}: give another --predictions, or replace these with --overwrite"
                )
            self._remove(files)
        self._remove(files, failed_only=True)
        write_atomically(record, json.dumps({**known, self._task: dict(settings)}, indent=1) + "\n")

    def _remove(self, files: Sequence[Path], failed_only: bool = False) -> None:
        """Remove the answers of the task from files, or those of them that have an error."""
        for file in files:
            found = read_predictions(file)
            kept = [each for each in found if each.task != self._task or (failed_only and "error" not in each.info)]
            if len(kept) < len(found):
                write_atomically(file, "".join(each.line() for each in kept))


def _lock(path: Path) -> Lock:
    """Acquire the lock of a prediction file. Raises ValueError if another job answers into it."""
    try:
        return lock(_lock_path(path), "a second job that writes the same file is not refused")
    except BlockingIOError:
        raise ValueError(f"another process writes its answers into {path}: wait for it, or give another file") from None


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.rank{rank}")


def _parts(path: Path) -> list[Path]:
    """The files of the processes of a job, also of one with another number of processes, in order of the ranks."""
    ranks = [file.name.removeprefix(f"{path.name}.rank") for file in path.parent.glob("*.rank*")]
    return [_part(path, rank) for rank in sorted(int(text) for text in ranks if text.isdecimal())]


def _difference(known: object, settings: Settings) -> str | None:
    """Why answers were not made with `settings`, or None if they were."""
    if not isinstance(known, dict):
        return "that no run of this command wrote"
    names = [name for name in settings if known.get(name) != settings[name]]
    return f"that were made with {_named(names, known)}, not {_named(names, settings)}" if names else None


def _named(names: Sequence[str], values: Mapping[str, object]) -> str:
    return " and ".join(f"{name} {values.get(name)}" for name in names)
