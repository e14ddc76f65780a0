"""Answers of a model: what is left out, continued after a kill, shared between processes, and computed once."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataloaders.failures import LEDGER, Failure, Ledger
from dataloaders.locks import lock
from dataloaders.ranks import ALONE
from dataloaders.samples.prompts import prompt_ids
from dataloaders.store.features import FeatureStore, FeatureWriter
from pite.evaluate import answering, grounding
from pite.evaluate.__main__ import main
from pite.evaluate.inputs import find_features, open_store
from pite.evaluate.predictions import PredictionWriter, read_predictions
from pite.generate import Generator
from pite.prefixes import Rows, SharedPrefixes, VideoPrefixes
from tests.commands import status_of
from tests.engine.distributed.ranks import launch
from tests.held_out import FRAMES, make_held_out, save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_held_out(tmp_path_factory.mktemp("made"))


def arguments(made: Path, *more: str) -> list[str]:
    where = ["--model", f"{made}/model", "--data", f"{made}/data", "--store", f"{made}/store"]
    return ["grounding", *where, "--device", "cpu", "--batch-size", "2", *more]


def evaluated(made: Path, *more: str) -> int:
    return status_of(main, arguments(made, *more))


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the predictions and metrics of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert evaluated(made, "--predictions", f"{folder}/p.jsonl", "--metrics", f"{folder}/m.json") == 0
    return folder


def same(folder: Path, whole: Path) -> bool:
    """Whether a folder has the predictions and metrics of the whole run, and no file of a process."""
    assert not list(folder.glob("*.rank*")) + list(folder.glob(".*"))
    return all((folder / name).read_bytes() == (whole / name).read_bytes() for name in ("p.jsonl", "m.json"))


def test_the_answers_are_those_of_each_question_alone_in_the_order_of_the_truth(made: Path, whole: Path) -> None:
    generator = Generator.from_pretrained(made / "model")
    store = FeatureStore(made / "store" / "videos")
    truth = grounding.read_truth(made / "data/evaluation/activitynet_captions.json")
    questions = grounding.questions(truth)
    alone = [
        generator.answer([question.text], [store.read(f"evaluation/{question.video}").copy()], max_new_tokens=64)[
            0
        ].text
        for question in questions
    ]
    found = read_predictions(whole / "p.jsonl")
    assert [each.key for each in found] == [question.key for question in questions]
    assert [each.answer for each in found] == alone
    assert {each.info["num_frames"] for each in found} == {FRAMES}


def test_prefix_rows_are_computed_once_for_a_video_and_the_head_once_a_run(made: Path) -> None:
    model = answering.Model(made / "model", "cpu", 2, ALONE)
    truth = grounding.read_truth(made / "data/evaluation/activitynet_captions.json")
    questions = grounding.questions(truth)
    rows: list[int] = []
    for _ in range(2):  # two benchmarks with one model
        inputs = find_features(questions, open_store(made / "store"), made / "store")
        hook = model.generator.llama.model.layers[0].register_forward_pre_hook(
            lambda _, given: rows.append(given[0].shape[:2].numel()) if given[0].shape[1] == FRAMES else None
        )
        model.answer(inputs, None, 2)
        hook.remove()
    prompts = [prompt_ids(question.text, model.generator.tokenizer, FRAMES) for question in questions]
    own = sum(len(ids) - head - FRAMES for ids, head in prompts)
    assert model.prefixes.rows == Rows(prompts[0][1], 2 * len(truth) * FRAMES, 2 * own)
    assert rows == [2 * FRAMES] * 4, "in windows of two videos"


def test_the_frames_of_one_window_are_in_memory(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, alive = SharedPrefixes.videos, []

    def videos(self: SharedPrefixes, features: list) -> VideoPrefixes:  # type: ignore[type-arg]
        gc.collect()
        assert not [each for each in alive if each() is not None] and len(features) <= 2
        found = compute(self, features)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(SharedPrefixes, "videos", videos)
    assert evaluated(made) == 0
    assert len(alive) == 2


def _die_in(argv: list[str], appends: int) -> int:
    """Evaluate, and be killed in the middle of the write after `appends` batches."""
    write, done = PredictionWriter.append, []

    def append(self: PredictionWriter, predictions: list) -> None:  # type: ignore[type-arg]
        if len(done) == appends:
            self._file.write(predictions[0].line()[:-20].encode())
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(len(predictions))
        write(self, predictions)

    PredictionWriter.append = append  # type: ignore[method-assign]
    return main(argv)


@pytest.mark.parametrize("appends", [0, 1, 3])
def test_a_killed_run_continues_and_ends_with_the_same_file(
    made: Path, whole: Path, tmp_path: Path, appends: int, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--predictions", f"{tmp_path}/p.jsonl", "--metrics", f"{tmp_path}/m.json"]
    codes = launch(1, tmp_path / "logs", _die_in, arguments(made, *given), appends).wait()
    assert codes == [-signal.SIGKILL]
    count = len(read_predictions(tmp_path / "p.jsonl"))
    assert appends <= count < 8
    assert evaluated(made, *given) == 0
    assert same(tmp_path, whole)
    assert f" {count}/8 " in capsys.readouterr().err, "progress begins where the first run ended"


def test_a_finished_run_is_only_scored_again(made: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(answering, "SharedPrefixes")
    before = (whole / "p.jsonl").stat().st_mtime_ns
    assert evaluated(made, "--predictions", f"{whole}/p.jsonl") == 0
    assert (whole / "p.jsonl").stat().st_mtime_ns == before


def _evaluate(argv: list[str]) -> int:
    return main(argv)


def test_two_processes_write_the_same_file_and_metrics(made: Path, whole: Path, tmp_path: Path) -> None:
    given = ["--predictions", f"{tmp_path}/p.jsonl", "--metrics", f"{tmp_path}/m.json"]
    ranks = launch(2, tmp_path / "logs", _evaluate, arguments(made, *given))
    assert ranks.wait() == [0, 0], ranks.stderr(0) + ranks.stderr(1)
    assert same(tmp_path, whole)


def test_two_processes_continue_what_one_began_and_one_what_two_began(made: Path, whole: Path, tmp_path: Path) -> None:
    given = ["--predictions", f"{tmp_path}/p.jsonl", "--metrics", f"{tmp_path}/m.json"]
    assert launch(1, tmp_path / "logs", _die_in, arguments(made, *given), 1).wait() == [-signal.SIGKILL]
    codes = launch(2, tmp_path / "logs", _die_in, arguments(made, *given), 1).wait_like_torchrun()
    assert -signal.SIGKILL in codes
    assert list(tmp_path.glob("p.jsonl.rank*"))
    assert evaluated(made, *given) == 0
    assert same(tmp_path, whole)


def test_several_processes_need_a_file(made: Path, tmp_path: Path) -> None:
    ranks = launch(2, tmp_path, _evaluate, arguments(made))
    assert 1 in ranks.wait_like_torchrun()
    assert "several processes write their answers into one file: give --predictions" in ranks.stderr(0)


@pytest.fixture
def partial(made: Path, tmp_path: Path) -> Iterator[Path]:
    """The held-out videos with a store that lacks the first and the last one."""
    (tmp_path / "held").mkdir()
    for name in ("data", "model"):
        (tmp_path / "held" / name).symlink_to(made / name)
    full = FeatureStore(made / "store" / "videos")
    store = FeatureStore.create_or_open(tmp_path / "held" / "store" / "videos", full.manifest)
    with FeatureWriter(store) as writer:
        for key in sorted(full.keys)[1:-1]:
            writer.add({key: full.read(key)})
    yield tmp_path / "held"


def test_videos_without_features_are_one_sentence_before_the_weights_are_read(
    partial: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(answering, "SharedPrefixes")
    assert evaluated(partial) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"pite.evaluate: the feature store {partial}/store/videos lacks 2 of 4 videos, the first is 'e000000': run "
        "engine.encode for them, or leave them out with --skip-missing"
    )


def test_videos_that_could_not_be_encoded_are_left_out_and_counted(
    partial: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(partial / "store" / LEDGER, 4, 1.0)
    ledger.log([Failure("evaluation/e000000", "x/e000000.mp4", "decode", "x/e000000.mp4: no video stream")])
    assert evaluated(partial) == 1
    assert "lacks 1 of 4 videos, the first is 'e000003'" in capsys.readouterr().err
    given = ["--skip-missing", "--predictions", f"{tmp_path}/p.jsonl", "--metrics", f"{tmp_path}/m.json"]
    for command in ("grounding", "trajectories"):
        more = (
            given
            if command == "grounding"
            else [each for each in given if "p.jsonl" not in each and each != "--predictions"]
        )
        argv = [
            each for each in arguments(partial, *more) if command == "grounding" or each not in ("--batch-size", "2")
        ]
        assert status_of(main, [command, *argv[1:]]) == 0
        printed = capsys.readouterr().out
        assert (
            "1 video is left out that could not be encoded, such as e000000: x/e000000.mp4: no video stream" in printed
        )
        assert "1 video is left out without features, such as e000003" in printed
        numbers = json.loads((tmp_path / "m.json").read_text())[command]
        assert numbers["videos left out, not encoded"] == numbers["videos left out, missing"] == 1
    answered = read_predictions(tmp_path / "p.jsonl")
    assert answered == [each for each in read_predictions(whole / "p.jsonl") if each.video in ("e000001", "e000002")]


def test_no_video_with_features_is_refused(partial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (partial / "store" / "videos").glob("*.parquet"):
        file.unlink()
    assert evaluated(partial, "--skip-missing") == 1
    assert "holds none of the 4 videos: run engine.encode" in capsys.readouterr().err


def test_answers_of_another_model_or_other_questions_are_refused(
    made: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    other = tmp_path / "other"
    other.mkdir()
    for name in ("data", "store"):
        (other / name).symlink_to(made / name)
    save_model(other / "model", seed=1)
    assert evaluated(made, "--predictions", str(path)) == 0
    answers = path.read_bytes()
    for folder, more, reason in (
        (other, (), f"that were made with model {made}/model ("),
        (made, ("--question", "When is {} there?"), "that were made with questions "),
    ):
        assert evaluated(folder, "--predictions", str(path), *more) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"pite.evaluate: {path} holds answers {reason}")
        assert error.endswith("give another --predictions, or replace these with --overwrite")
        assert path.read_bytes() == answers
    (tmp_path / "p.jsonl.run.json").unlink()
    assert evaluated(made, "--predictions", str(path)) == 1
    assert "holds answers that no run of this command wrote" in capsys.readouterr().err
    assert evaluated(other, "--predictions", str(path), "--overwrite") == 0
    assert path.read_bytes() != answers
    assert evaluated(made, "--predictions", str(path), "--overwrite") == 0
    assert path.read_bytes() == answers == (whole / "p.jsonl").read_bytes()


def test_answers_of_other_tasks_in_the_file_stay(made: Path, whole: Path, tmp_path: Path) -> None:
    line = '{"video_id": "v", "task": "captioning", "query_id": 0, "answer": "[]", "info": {}}\n'
    (tmp_path / "p.jsonl").write_text(line)
    assert evaluated(made, "--predictions", f"{tmp_path}/p.jsonl") == 0
    assert (tmp_path / "p.jsonl").read_text() == line + (whole / "p.jsonl").read_text()


def test_a_second_job_that_writes_the_same_file_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    with lock(tmp_path / ".p.jsonl.lock", ""):
        assert evaluated(made, "--predictions", str(path)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"pite.evaluate: another process writes its answers into {path}: wait for it, or give another file"
    assert evaluated(made, "--predictions", str(path)) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"video_id": "v", "task": "captioning"}\n', r"p\.jsonl:1: field 'query_id'|field 'answer' is missing"),
        ("[]\n", "expected an object"),
    ],
)
def test_a_malformed_file_is_named_before_the_weights_are_read(
    made: Path,
    tmp_path: Path,
    content: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(answering, "SharedPrefixes")
    (tmp_path / "p.jsonl").write_text(content)
    assert evaluated(made, "--predictions", f"{tmp_path}/p.jsonl") == 1
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert evaluated(made, "--predictions", "/dev/null") == 1
    assert "--predictions /dev/null: this is no regular file" in capsys.readouterr().err


def test_videos_that_are_encoded_later_are_answered_by_the_same_command(
    partial: Path, made: Path, whole: Path, tmp_path: Path
) -> None:
    given = ["--predictions", f"{tmp_path}/p.jsonl", "--metrics", f"{tmp_path}/m.json", "--skip-missing"]
    assert evaluated(partial, *given) == 0
    assert len(read_predictions(tmp_path / "p.jsonl")) < 8
    full = FeatureStore(made / "store" / "videos")
    with FeatureWriter(FeatureStore(partial / "store" / "videos")) as writer:
        for key in sorted(full.keys):
            writer.add({key: full.read(key)})
    assert evaluated(partial, *given) == 0
    assert same(tmp_path, whole)
