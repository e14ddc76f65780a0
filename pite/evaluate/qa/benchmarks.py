"""The published files of the benchmarks as items: questions about a video and the correct answer.

    msvd_qa         test_qa.json: [{"id", "video_id": 1301, "question", "answer"}]; the videos are vid1301.avi, ...
    msrvtt_qa       test_qa.json: the same, with "category_id"; video6513.mp4, ...
    activitynet_qa  test_q.json: [{"question_id", "video_name", "question"}]; test_a.json: [{"question_id", "answer"}]
    tgif_qa         Test_frameqa_question.csv: gif_name, question, answer, ..., separated by tabs
    video_chatgpt   generic_qa.json, temporal_qa.json: [{"video_name", "Q", "A"}]; consistency_qa.json: Q1, Q2, A

MSVD-QA, MSRVTT-QA and TGIF-QA are in use in the form of ActivityNet-QA too, which two files make known.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dataloaders.formats import Record, iter_json
from dataloaders.formats.fields import field
from dataloaders.formats.questions import activitynet_video, msrvtt_video, msvd_video, named_video
from dataloaders.formats.stream import Where

Benchmark = Literal["msvd_qa", "msrvtt_qa", "activitynet_qa", "tgif_qa", "video_chatgpt"]
BENCHMARKS: tuple[Benchmark, ...] = get_args(Benchmark)

FILES: Mapping[Benchmark, tuple[str, ...]] = {
    "msvd_qa": ("msvd_qa.json",),
    "msrvtt_qa": ("msrvtt_qa.json",),
    "activitynet_qa": ("activitynet_qa_q.json", "activitynet_qa_a.json"),
    "tgif_qa": ("tgif_qa_q.json", "tgif_qa_a.json"),
    "video_chatgpt": ("generic_qa.json", "temporal_qa.json", "consistency_qa.json"),
}
"""Names of the files in the evaluation folder of a data folder (`dataloaders.formats.questions`)."""

Kind = Literal["short", "generic", "temporal", "consistency"]
"""What an item is judged for: a short answer's match, or one of Video-ChatGPT's three files."""


@dataclass(frozen=True)
class Item:
    """Questions about one video that have one correct answer: one question, or two for consistency."""

    id: int | str
    video: str
    questions: tuple[str, ...]
    answer: str
    kind: Kind = "short"

    @property
    def query_ids(self) -> tuple[int | str, ...]:
        """The query id of each question in the prediction log."""
        return (
            (self.id,) if len(self.questions) == 1 else tuple(f"{self.id}/{i + 1}" for i in range(len(self.questions)))
        )


def read_items(benchmark: Benchmark, paths: Sequence[Path], video_names: Path | None = None) -> list[Item]:
    """The items of a benchmark's published files, in their order.

    video_names  MSVD's youtube_mapping.txt, whose lines are `NAME vid1301`: the videos are named NAME
    Raises ValueError, naming file, line and field, also for two items with one id.
    """
    items = list(_reader(benchmark, paths))
    if not items:
        raise ValueError(f"{paths[0]}: holds no question")
    seen: set[tuple[str, int | str]] = set()
    for item in items:
        if (item.video, item.id) in seen:
            raise ValueError(f"{paths[0]}: question {item.id!r} about video {item.video!r} is there twice")
        seen.add((item.video, item.id))
    return items if video_names is None else list(_renamed(items, video_names))


def _reader(benchmark: Benchmark, paths: Sequence[Path]) -> Iterator[Item]:
    if benchmark == "video_chatgpt":
        return (item for path in paths for item in _read_video_chatgpt(path))
    if len(paths) == 2:
        return _read_pair(paths[0], paths[1], activitynet_video if benchmark == "activitynet_qa" else named_video)
    if benchmark == "activitynet_qa":
        raise ValueError("activitynet_qa has two files: give test_q.json and test_a.json to --ground-truth")
    if len(paths) != 1:
        raise ValueError(f"{benchmark} has one file, or one of questions and one of answers, not {len(paths)}")
    if benchmark == "tgif_qa":
        return _read_tgif(paths[0])
    return _read_numbered(paths[0], msvd_video if benchmark == "msvd_qa" else msrvtt_video)


def _records(path: Path) -> Iterator[tuple[Where, Record]]:
    for offset, _, record in iter_json(path):
        yield Where(path, offset), record


def _text(record: Record, name: str, where: Where) -> str:
    """The text of a field; a number counts as its digits."""
    return " ".join(str(field(record, name, (str, int), where)).split())


def _read_numbered(path: Path, video: Callable[[Record, Where], str]) -> Iterator[Item]:
    for where, record in _records(path):
        identity, question = field(record, "id", (int, str), where), _text(record, "question", where)
        yield Item(identity, video(record, where), (question,), _text(record, "answer", where))


def _read_pair(questions: Path, answers: Path, video: Callable[[Record, Where], str]) -> Iterator[Item]:
    of = {_text(record, "question_id", where): _text(record, "answer", where) for where, record in _records(answers)}
    for where, record in _records(questions):
        question = _text(record, "question_id", where)
        if question not in of:
            raise ValueError(f"{where}: {answers} has no answer to question {question!r}")
        yield Item(question, video(record, where), (_text(record, "question", where),), of[question])


def _read_tgif(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        missing = [name for name in ("gif_name", "question", "answer") if name not in (rows.fieldnames or ())]
        if missing or "a1" in (rows.fieldnames or ()):
            fault = f"lacks the column {missing[0]!r}" if missing else "has multiple choices"
            raise ValueError(f"{path}: {fault}; TGIF-QA's open questions are in Test_frameqa_question.csv")
        for number, row in enumerate(rows):
            if not all(row[name] for name in ("gif_name", "question", "answer")):
                raise ValueError(f"{path}:{rows.line_num}: gif_name, question and answer must not be empty")
            yield Item(number, row["gif_name"], (row["question"].strip(),), row["answer"].strip())


_VIDEO_CHATGPT: Mapping[str, tuple[Kind, tuple[str, ...]]] = {
    "generic_qa": ("generic", ("Q",)),
    "temporal_qa": ("temporal", ("Q",)),
    "consistency_qa": ("consistency", ("Q1", "Q2")),
}
"""Name of a file -> what its items are judged for, and the fields of their questions."""


def _read_video_chatgpt(path: Path) -> Iterator[Item]:
    if path.stem not in _VIDEO_CHATGPT:
        expected = ", ".join(f"{name}.json" for name in _VIDEO_CHATGPT)
        raise ValueError(f"{path}: the name must be one of {expected}, which decides what is judged")
    kind, fields = _VIDEO_CHATGPT[path.stem]
    for number, (where, record) in enumerate(_records(path)):
        questions = tuple(_text(record, name, where) for name in fields)
        yield Item(f"{kind}/{number}", named_video(record, where), questions, _text(record, "A", where), kind)


def _renamed(items: Sequence[Item], path: Path) -> Iterator[Item]:
    names: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        words = line.split()
        if words and len(words) != 2:
            raise ValueError(f"{path}:{number}: expected a name and vidNUMBER")
        names |= {words[1]: words[0]} if words else {}
    for item in items:
        if item.video not in names:
            raise ValueError(f"{path}: has no name for {item.video!r}")
        yield Item(item.id, names[item.video], item.questions, item.answer, item.kind)
