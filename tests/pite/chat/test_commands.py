"""`python -m pite.chat`: one question, several turns, a folder, lines of stdin; JSON, drawings, Ctrl-C."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image

from pite.chat.__main__ import main
from pite.chat.session import Session
from pite.generate import Generator
from tests.commands import status_of
from tests.held_out import FRAMES
from tests.pite.chat.test_session import forced, ids_of

MOST = ["--max-new-tokens", "8"]
TEXT = "From 02 to 05, a red circle moves right."


@pytest.fixture
def where(made: Path) -> list[str]:
    return ["--model", f"{made}/model", "--clip", f"{made}/clip", "--device", "cpu", *MOST]


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model answers TEXT to each question."""

    def written(self: Generator, *given: object) -> Iterator[object]:
        return forced(self, ids_of(self, TEXT))(*given)

    monkeypatch.setattr(Generator, "tokens", written)


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_seconds_are_printed_next_to_frame_indices(
    made: Path, where: list[str], videos: list[Path], fixed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(main, [*where, "--video", str(videos[0]), "--query", "What happens?"]) == 0
    text, seconds = capsys.readouterr().out.splitlines()
    assert text == TEXT
    # Eight frames; the annotation of the video gives 9.5 s.
    assert (
        json.loads((made / "data/evaluation/activitynet_captions.json").read_text())[videos[0].stem]["duration"] == 9.5
    )
    assert seconds == "  from 02 to 05: 2.4 to 5.9 s of 9.5 s"


def test_json_holds_what_the_session_returns(
    where: list[str], videos: list[Path], fixed: None, session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = ["What happens?", "And then?"]
    flags = ["--video", str(videos[0]), "--query", questions[0], "--query", questions[1], "--json"]
    assert status_of(main, [*where, *flags]) == 0
    printed = lines_of(capsys)
    for question, line in zip(questions, printed, strict=True):
        expected = {"video": str(videos[0]), "question": question, **session.answer(videos[0], question).as_dict()}
        assert line == json.loads(json.dumps(expected))
    assert printed[0]["events"] == [{"frames": [2, 5], "seconds": [2.375, 5.938], "text": TEXT[:-1]}]
    (track,) = printed[0]["tracks"]
    assert (track["phrase"], track["frames"]) == ("a red circle", [2, 5])
    assert [len(track["points"]), len(track["points"][0]), len(track["points"][0][0])] == [3, FRAMES, 2]


def test_a_folder_gives_one_line_per_video_and_question(
    where: list[str], videos: list[Path], session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for video in videos[:2]:
        shutil.copy(video, tmp_path)
    (tmp_path / "broken.mp4").write_bytes(videos[0].read_bytes()[:900])
    (tmp_path / "notes.txt").write_text("no video")
    flags = ["--video", str(tmp_path), "--query", "What happens?", "When?"]
    assert status_of(main, [*where, *flags]) == 1
    broken, *printed = lines_of(capsys)
    assert broken["video"] == f"{tmp_path}/broken.mp4" and "cut off" in broken["error"]
    assert [(line["video"], line["question"]) for line in printed] == [
        (f"{tmp_path}/{video.name}", question) for video in videos[:2] for question in ("What happens?", "When?")
    ]
    alone = session.answer(videos[1], "What happens?", max_new_tokens=8)
    assert printed[2]["token_ids"] == list(alone.token_ids)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "this is a folder: give --query, the question about each video"),
        (["--query", "What?", "--trajectory", "out.mp4"], "this is a folder, and --trajectory draws one video"),
        (["--query", "What?"], "this folder holds no video (.mp4"),
    ],
)
def test_a_folder_that_cannot_be_answered_is_refused(
    where: list[str], tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(main, [*where, "--video", str(tmp_path), *flags]) == 1
    assert f"--video {tmp_path}: {message}" in capsys.readouterr().err


def test_questions_come_from_lines_of_stdin(
    where: list[str],
    videos: list[Path],
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An impossible question is one sentence, and the next one is answered as if it had not been given."""
    monkeypatch.setattr("sys.stdin", io.StringIO("What happens?\n\n</s>\nWhen?"))
    assert status_of(main, [*where, "--video", str(videos[0])]) == 0
    printed = capsys.readouterr()
    expected = [session.answer(videos[0], question, max_new_tokens=8).text for question in ("What happens?", "When?")]
    assert [line for line in printed.out.splitlines() if not line.startswith("  from ")] == expected
    assert printed.err.splitlines()[-1] == (
        "pite.chat: the question '</s>' holds no text: give a question about the video"
    )


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a terminal; processes that a shell starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_answer_and_not_the_chat(
    where: list[str],
    videos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens, started = Generator.tokens, []

    def interrupted(self: Generator, *given: object) -> Iterator[object]:
        started.append(1)
        for i, found in enumerate(tokens(self, *given)):
            if len(started) == 1 and i == 3:
                signal.raise_signal(signal.SIGINT)
            yield found

    prompt, prompts = Generator.prompt, []

    def recorded(
        self: Generator, question: str, num_frames: int, earlier: Sequence[object] = (), *rest: object
    ) -> object:
        prompts.append((question, len(earlier)))
        return prompt(self, question, num_frames, earlier, *rest)

    monkeypatch.setattr(Generator, "tokens", interrupted)
    monkeypatch.setattr(Generator, "prompt", recorded)
    monkeypatch.setattr("sys.stdin", io.StringIO("What happens?\nWhen?\n"))
    assert status_of(main, [*where, "--video", str(videos[0])]) == 0
    printed = capsys.readouterr()
    assert prompts == [("What happens?", 0), ("When?", 0)], "the stopped answer is no turn of the conversation"
    assert len(printed.out.splitlines()) >= 2
    assert "stopped; Ctrl-C again or Ctrl-D ends the chat" in printed.err


class Terminal(io.StringIO):
    """Lines that a user types; Ctrl-C at the prompt after them."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int = -1, /) -> str:
        line = super().readline(size)
        if not line:
            raise KeyboardInterrupt
        return line


def test_a_terminal_has_a_prompt_where_ctrl_c_ends_the_chat(
    where: list[str],
    videos: list[Path],
    session: Session,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("What happens?\n"))
    assert status_of(main, [*where, "--video", str(videos[0])]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("> " + session.answer(videos[0], "What happens?", max_new_tokens=8).text)
    assert printed.count("> ") == 2


def test_a_strip_is_drawn_as_png(
    where: list[str], videos: list[Path], fixed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "where.png"
    flags = ["--video", str(videos[0]), "--query", "What happens?", "--trajectory", str(path)]
    assert status_of(main, [*where, *flags]) == 0
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 6 * 332 + 12
    assert "a red circle" in capsys.readouterr().err
