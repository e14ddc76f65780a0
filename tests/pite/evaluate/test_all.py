"""All benchmarks of a data folder in one command: the answers of each command alone, and the paper's tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataloaders.media import list_media
from dataloaders.store.features import FeatureStore, FeatureWriter
from pite.evaluate import answering
from pite.evaluate.__main__ import main
from pite.evaluate.captioning import java
from pite.evaluate.paper import TABLE_3, TABLE_4, TABLE_5
from pite.evaluate.tables import markdown
from pite.export.card import read_scores
from tests.commands import status_of
from tests.engine.distributed.ranks import launch
from tests.held_out import CHANNELS, FRAMES, make_held_out, save_model
from tests.pite.evaluate.qa.server import Handler, running

QUESTIONS = [
    {"id": i, "video_id": 1 + i // 2, "question": f"what is {what}?", "answer": "dog"}
    for i, what in enumerate(("running", "the animal", "moving", "seen"))
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out videos, two videos with MSVD questions, and two models."""
    root = make_held_out(tmp_path_factory.mktemp("made"))
    (root / "data/evaluation/msvd_qa.json").write_text(json.dumps(QUESTIONS))
    rng = np.random.default_rng(1)
    with FeatureWriter(FeatureStore(root / "store" / "videos")) as writer:
        writer.add({f"evaluation/vid{i}": rng.standard_normal((FRAMES, CHANNELS)) for i in (1, 2)})
    save_model(root / "second" / "stage3" / "final", seed=1)
    for config in root.glob("**/config.json"):
        if config.parent.name != "clip":  # a short context ends the endless answers of random weights
            config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 240}))
    return root


def evaluated(made: Path, *more: str, models: tuple[str, ...] = ("model",)) -> int:
    where = ["--data", f"{made}/data", "--store", f"{made}/store", "--device", "cpu"]
    return status_of(main, ["all", "--model", *(f"{made}/{model}" for model in models), *where, *more])


WITHOUT_JAVA = ["--benchmarks", "grounding", "msvd_qa", "trajectories"]


def test_each_benchmark_gives_what_its_own_command_gives(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--output", f"{tmp_path}/out", "--metrics", f"{tmp_path}/m.json"]
    assert evaluated(made, *WITHOUT_JAVA, *files) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert list(metrics) == ["grounding", "msvd_qa", "trajectories"]
    assert json.loads((tmp_path / "out/model/metrics.json").read_text()) == metrics
    where = ["--model", f"{made}/model", "--data", f"{made}/data", "--store", f"{made}/store", "--device", "cpu"]
    for command, more in (("grounding", []), ("qa", ["--benchmark", "msvd_qa"]), ("trajectories", [])):
        name = "msvd_qa" if command == "qa" else command
        written = [] if command == "trajectories" else ["--predictions", f"{tmp_path}/{name}.jsonl"]
        assert main([command, *where, *more, *written, "--metrics", f"{tmp_path}/{name}.json"]) == 0
        assert json.loads((tmp_path / f"{name}.json").read_text()) == {name: metrics[name]}
        assert capsys.readouterr().out.strip() in printed
        if written:
            assert (tmp_path / f"{name}.jsonl").read_bytes() == (tmp_path / f"out/model/{name}.jsonl").read_bytes()
    assert dict(read_scores(tmp_path / "m.json").rows)["msvd_qa, items"] == "4"


def test_a_judge_that_does_not_reply_is_found_before_the_first_answer(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*WITHOUT_JAVA, "--judge-model", "m", "--retries", "0"]
    with running(lambda handler, _: handler.status(401)) as server:
        assert evaluated(made, *flags, "--output", f"{tmp_path}/out", "--judge-url", server.url) == 1
        assert len(server.bodies) == 1
    assert "answers 401 Unauthorized: check --judge-url" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))


def test_the_tables_have_the_papers_rows_and_ours(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge at an endpoint that accepts every answer, two models; the second run computes nothing."""
    with running(lambda handler, _: Handler.complete(handler)) as server:
        judge = ["--judge-model", "j", "--judge-url", server.url]
        argv = [*WITHOUT_JAVA[:3], *judge, "--output", f"{tmp_path}/out"]
        assert evaluated(made, *argv, models=("model", "second/stage3/final")) == 0
        calls = len(server.bodies)
        first = capsys.readouterr().out
        tables = (tmp_path / "out/tables.md").read_text()
        assert first.endswith(tables)
        monkeypatch.delattr(answering, "SharedPrefixes")
        assert evaluated(made, *argv, models=("model", "second/stage3/final")) == 0
        assert (
            capsys.readouterr().out.endswith(tables) and len(server.bodies) == calls == 8 + 1
        )  # before the first answer
    lines = tables.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("**Table")] == [f"**Table {n}**" for n in (3, 4, 5)]
    assert "| PiTe (paper) | 7B | 68.4 | 3.9 | 56.4 | 3.5 | 42.0 | 3.3 |" in lines
    assert "| PiTe (paper) | 13B | 37.9 | 23.7 | 10.0 | 26.0 | 5.0 | 26.5 | 6.6 |" in lines
    assert 2 == sum("| 100.0 | 4.0 | - | - | - | - |" in line for line in lines) == 2
    found = json.loads((tmp_path / "out/tables.json").read_text())
    ours = found["table 5"]["rows"][len(TABLE_5.rows) :]
    assert [row["MSVD-QA accuracy"] for row in ours] == [100.0, 100.0]
    assert [row["mIoU"] for row in ours] == [found["metrics"][row["model"]]["grounding"]["mIoU"] for row in ours]
    assert [row["METEOR"] for row in ours] == [None, None]


def _evaluate(argv: list[str]) -> int:
    return main(argv)


def test_two_processes_write_the_same_metrics_and_tables(made: Path, tmp_path: Path) -> None:
    where = ["--model", f"{made}/model", "--data", f"{made}/data", "--store", f"{made}/store", "--device", "cpu"]
    argv = ["all", *where, *WITHOUT_JAVA]
    ranks = launch(2, tmp_path / "logs", _evaluate, [*argv, "--output", f"{tmp_path}/two"])
    assert ranks.wait() == [0, 0], ranks.stderr(0) + ranks.stderr(1)
    assert main([*argv, "--output", f"{tmp_path}/one"]) == 0
    one, two = (
        {
            file.relative_to(folder): file.read_bytes()
            for file in folder.rglob("*")
            if file.suffix in (".json", ".jsonl", ".md")
        }
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) == 7


def test_captions_are_scored_too_where_java_is(made: Path, tmp_path: Path) -> None:
    try:
        java.package()
    except ValueError as error:
        pytest.skip(str(error))
    assert evaluated(made, "--output", f"{tmp_path}/out") == 0
    metrics = json.loads((tmp_path / "out/model/metrics.json").read_text())
    assert list(metrics) == ["grounding", "dense_captioning", "msvd_qa", "trajectories"]


def test_without_java_the_remedy_names_the_other_benchmarks(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert evaluated(made, "--output", f"{tmp_path}/out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pite.evaluate: dense captioning is scored with ")
    assert error.endswith("; or leave it out with --benchmarks grounding msvd_qa trajectories")


def test_features_of_all_benchmarks_are_looked_up_before_the_first_answer(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(answering, "SharedPrefixes")
    path = made / "data/evaluation/msvd_qa.json"
    path.write_text(json.dumps([*QUESTIONS, {**QUESTIONS[0], "id": 9, "video_id": 3}]))
    assert evaluated(made, *WITHOUT_JAVA, "--output", f"{tmp_path}/out") == 1
    path.write_text(json.dumps(QUESTIONS))
    assert "lacks 1 of 3 videos, the first is 'vid3'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--benchmarks", "video_chatgpt"], 2, "video_chatgpt is scored by a judge"),
        (["--benchmarks", "tgif_qa"], 1, "data/evaluation/tgif_qa_q.json: no such file"),
        (["--model", "{made}/model"], 2, "--model names a model twice"),
        (["--model", "{made}/second/stage3/final", "--metrics", "m.json"], 2, "--metrics is for one model"),
        (["--batch-size", "0"], 2, "--batch-size must be at least 1, not 0"),
    ],
)
def test_wrong_flags_are_one_sentence(
    made: Path, tmp_path: Path, more: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [each.replace("{made}", str(made)) for each in more]
    assert evaluated(made, *argv, "--output", f"{tmp_path}/out") == status
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_data_folder_without_benchmarks_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data" / "evaluation").mkdir(parents=True)
    assert evaluated(made, "--data", f"{tmp_path}/data", "--output", f"{tmp_path}/out") == 1
    assert "evaluation/ holds the files of no benchmark, such as activitynet_captions.json" in capsys.readouterr().err


def test_every_published_row_has_a_value_for_each_column() -> None:
    for table in (TABLE_3, TABLE_4, TABLE_5):
        assert all(len(row.values) == len(table.columns) for row in table.rows)
    assert markdown({"a|b": {}}).count(r"**a\|b**") == 2


def test_the_videos_of_the_questions_are_encoded_with_the_others(made: Path) -> None:
    found = list_media(made / "data", ["evaluation"])
    assert not found.malformed
    assert {"evaluation/vid1", "evaluation/vid2", "evaluation/e000000"} <= {media.key for media in found.media}
