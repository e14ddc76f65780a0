"""`pite.evaluate qa`: with a server as the judge, with a local model, and its one-sentence errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dataloaders.cli import parse
from pite.evaluate.__main__ import main
from pite.evaluate.qa.command import check_judge
from pite.evaluate.qa.flags import QaFlags
from tests import SOURCE_PATH
from tests.commands import status_of
from tests.pite.evaluate.qa.server import Handler, in_turn, running

TRUTH = [{"answer": "dog", "id": i, "question": f"question {i}?", "video_id": 7} for i in range(6)]
ANSWERS = ("dog", "cat", "dog", "a dog", "cow", "dog")


def files(folder: Path) -> list[str]:
    """The flags of a prediction file and its ground truth."""
    lines = [{"video_id": "vid7", "task": "msvd_qa", "query_id": i, "answer": text} for i, text in enumerate(ANSWERS)]
    (folder / "p.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "test_qa.json").write_text(json.dumps(TRUTH))
    return ["--predictions", f"{folder}/p.jsonl", "--ground-truth", f"{folder}/test_qa.json"]


def qa(folder: Path, *more: str) -> int:
    argv = ["qa", "--benchmark", "msvd_qa", *files(folder), "--metrics", f"{folder}/m.json", *more]
    return status_of(main, argv)


def grade(handler: Handler, body: dict) -> None:
    dog = "dog" in body["messages"][1]["content"].partition("Candidate: ")[2]
    handler.complete(json.dumps({"pred": "yes" if dog else "no", "score": 4.5 if dog else 1}))


def test_a_judge_at_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", " secret\n")
    flags = ["--judge-model", "m", "--judge-key", "MY_KEY", "--concurrency", "3", "--price-per-million", "1", "2"]
    with running(grade) as server:
        assert qa(tmp_path, "--judge-url", server.url, *flags) == 0
        first = capsys.readouterr()
        assert {h["Authorization"] for h in server.headers} == {"Bearer secret"}
        assert len(server.bodies) == 6 and {body["model"] for body in server.bodies} == {"m"}
        assert qa(tmp_path, "--judge-url", server.url, *flags) == 0
        assert len(server.bodies) == 6
    second = capsys.readouterr()
    numbers = json.loads((tmp_path / "m.json").read_text())["msvd_qa"]
    assert numbers["accuracy"] == pytest.approx(400 / 6) and numbers["score"] == pytest.approx((4 * 4.5 + 2) / 6)
    assert first.out.splitlines()[:3] == ["exact match   66.67", "accuracy      66.67", "score          3.33"]
    assert "judge m: 6 calls, 0 replies are in the cache; estimated" in first.err and "cost 0.00" in first.err
    assert "judge m: 0 calls, 6 replies are in the cache" in second.err and "secret" not in first.err + second.err
    assert len((tmp_path / "p.judge.jsonl").read_text().splitlines()) == 6
    assert second.out == first.out.replace("6 calls", "0 calls")


def test_a_server_that_misbehaves_gives_the_same_scores(tmp_path: Path) -> None:
    with running(grade) as server:
        assert qa(tmp_path, "--judge-url", server.url, "--judge-model", "m") == 0
    expected = json.loads((tmp_path / "m.json").read_text())["msvd_qa"]
    (tmp_path / "p.judge.jsonl").unlink()
    mishaps = in_turn(
        lambda h: h.status(429, Retry_After="0"),
        Handler.truncated,
        lambda h: h.complete("I cannot grade this."),
        lambda h: grade(h, {"messages": [{}, {"content": "Candidate: dog"}]}),
        Handler.closed,
    )
    seen: list[int] = []

    def behave(handler: Handler, body: dict) -> None:
        seen.append(1)
        mishaps(handler, body) if len(seen) in (1, 2, 3, 5) else grade(handler, body)

    with running(behave) as server:
        assert qa(tmp_path, "--judge-url", server.url, "--judge-model", "m", "--concurrency", "1") == 0
    found = json.loads((tmp_path / "m.json").read_text())["msvd_qa"]
    assert found == {**expected, "calls": 7, "malformed replies": 1}


def test_errors_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(lambda handler, _: handler.status(401)) as server:
        assert qa(tmp_path, "--judge-url", server.url, "--judge-model", "m") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pite.evaluate: ")]
    assert len(error) == 1 and "answers 401 Unauthorized: check --judge-url" in error[0]
    monkeypatch.setenv("OPENAI_API_KEY", "sécret")
    assert qa(tmp_path, "--judge-url", server.url, "--judge-model", "m") == 1
    error = capsys.readouterr().err
    assert "OPENAI_API_KEY has characters that no header may hold" in error and "cret" not in error


def wait_until(condition: Callable[[], bool], seconds: float = 100.0) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)


def test_a_process_that_is_killed_pays_for_no_reply_twice(tmp_path: Path) -> None:
    judge = ["--judge-model", "m", "--concurrency", "1"]
    stuck, cache = threading.Event(), tmp_path / "p.judge.jsonl"

    def behave(handler: Handler, body: dict) -> None:
        if len(server.bodies) == 4:
            # The process stores a reply while its next request is under way.
            wait_until(lambda: cache.exists() and cache.read_text().count("\n") == 3)
            stuck.set()
            never.wait(60)
        else:
            grade(handler, body)

    never = threading.Event()
    with running(behave) as server:
        argv = ["qa", "--benchmark", "msvd_qa", *files(tmp_path), "--judge-url", server.url, *judge]
        process = subprocess.Popen(
            [sys.executable, "-m", "pite.evaluate", *argv], env={**os.environ, "PYTHONPATH": SOURCE_PATH}
        )
        try:
            assert stuck.wait(120)
        finally:
            process.kill()
            process.wait()
            never.set()
        assert qa(tmp_path, "--judge-url", server.url, *judge) == 0
        first, second = server.prompts[:3], server.prompts[4:]
    assert len(second) == 3 and not set(first) & set(second)
    assert json.loads((tmp_path / "m.json").read_text())["msvd_qa"]["accuracy"] == pytest.approx(400 / 6)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--judge-url", "http://x/v1"], 2, "--judge-url needs --judge-model"),
        (["--judge-url", "x/v1", "--judge-model", "m"], 2, "--judge-url must start with http:// or https://"),
        (["--judge-model", "m", "--concurrency", "0"], 2, "--concurrency must be at least 1"),
        (["--judge-model", "nowhere"], 1, "--judge-model nowhere: no such folder"),
        (["--benchmark", "video_chatgpt"], 2, "video_chatgpt is scored by a judge: give --judge-model"),
        (["--video-names", "none.txt"], 1, "--video-names none.txt: no such file"),
        (["--benchmark", "msrvtt_qa"], 1, "p.jsonl: holds no line whose task is 'msrvtt_qa'"),
    ],
)
def test_wrong_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], status: int, message: str
) -> None:
    assert qa(tmp_path, *flags) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_prediction_without_its_question_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["qa", "--benchmark", "msvd_qa", *files(tmp_path)]
    (tmp_path / "test_qa.json").write_text(json.dumps(TRUTH[:2]))
    assert main(argv) == 1
    assert "p.jsonl:3: the ground truth has no question 2 about video 'vid7'" in capsys.readouterr().err


def test_query_ids_may_be_texts(tmp_path: Path) -> None:
    argv = ["qa", "--benchmark", "msvd_qa", *files(tmp_path), "--metrics", f"{tmp_path}/m.json"]
    path = tmp_path / "p.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**line, "query_id": str(line["query_id"])}) + "\n" for line in lines))
    assert main(argv) == 0
    assert json.loads((tmp_path / "m.json").read_text())["msvd_qa"]["exact match"] == pytest.approx(400 / 6)


def test_a_judge_is_contacted_until_it_has_replied(tmp_path: Path) -> None:
    with running(grade) as server:
        flags = parse(
            QaFlags,
            ["--benchmark", "msvd_qa", *files(tmp_path), "--judge-url", server.url, "--judge-model", "m"],
        )
        check_judge(flags)
        flags.cache.touch()
        check_judge(flags)
        assert len(server.bodies) == 2, "the run before ended without a reply"
        flags.cache.write_text("{}\n")
        check_judge(flags)
        assert len(server.bodies) == 2
