"""PG-Video-LLaVA end to end: features of a synthetic world, one stage, resume, sharing, float8, files, answers."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dataloaders.cli import parse
from dataloaders.ranks import ALONE
from dataloaders.store.features import FeatureStore
from dataloaders.synthetic.world import WorldConfig, make_world
from dataloaders.transcripts.files import Segment, write_transcript
from engine.budget.costs import stage_cost
from engine.config import TrainConfig
from engine.encode.__main__ import main as encode
from engine.metrics import read_metrics
from engine.tiny.shipped import PARTS
from engine.train import main
from pite.chat.__main__ import main as chat
from pite.checkpoint import from_pretrained, load_language_model
from pite.config import PiTeConfig
from pite.evaluate.__main__ import main as evaluate
from pite.evaluate.answering import Model
from pite.evaluate.inputs import Inputs, LeftOut
from pite.evaluate.questions import Question
from pite.export.__main__ import main as export
from pite.generate import Generator
from pite.llava import EDGES, EMBEDDINGS, PROJECTOR_FILE
from pite.names import merged_tensors
from tests.engine.workspace import train_arguments
from tests.pite.evaluate.qa.server import Handler, running

FRAMES = 6
TOWER = json.loads((PARTS / "clip" / "config.json").read_text())
PLACES = (TOWER["image_size"] // TOWER["patch_size"]) ** 2
NUMBERS = ("loss", "ce", "gradient_norm", "learning_rate", "tokens")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/data with four questions about each of 12 videos, ROOT/features by engine.encode, ROOT/llm."""
    root = tmp_path_factory.mktemp("pg")
    make_world(root / "data", WorldConfig(videos=12, evaluation=3, images=1, frames=FRAMES), processes=1)
    file = root / "data/stage3/video_instruct.json"
    records = json.loads(file.read_text())
    others = [("How many shapes can be seen?", "There are two shapes."), ("What is shown?", "A circle moves left.")]
    others.append(("Which shape can be seen first?", "The red circle can be seen first."))
    more = [{"q": q, "a": a, "video_id": r["video_id"]} for r in records for q, a in others]
    file.write_text(json.dumps(records + more))
    (root / "llm").symlink_to(PARTS / "vicuna")
    flags = {"data": root / "data", "store": root / "features", "clip": PARTS / "clip", "num_frames": FRAMES}
    arguments = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert encode([*arguments, "--family", "pg-video-llava", "--workers", "0", "--device", "cpu"]) == 0
    return root


def arguments(workspace: Path, output: Path, **flags: object) -> list[str]:
    given = {"family": "pg-video-llava", "epochs": 1, "token_budget": 4000, **flags}
    return train_arguments(workspace, output, **given)  # type: ignore[arg-type]


def numbers(output: Path) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in NUMBERS) for line in read_metrics(output / "stage3" / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(pg_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on random features with a random language model, which is faster."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert main(arguments(pg_workspace, output)) == 0
    return output


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert main(arguments(workspace, output)) == 0
    return output


def test_only_projector_and_marks_are_trained(trained: Path, workspace: Path) -> None:
    lines = read_metrics(trained / "stage3" / "metrics.jsonl")
    assert len(lines) == 6 and lines[-1]["ce"] < lines[0]["ce"] and not any(line["l1"] for line in lines)
    final = trained / "stage3" / "final"
    assert not (final / "adapter_model.safetensors").exists()
    config = PiTeConfig.load(final)
    assert (config.family, config.num_features, config.vision_feature_size) == (
        "pg-video-llava",
        FRAMES + PLACES,
        TOWER["hidden_size"],
    )
    before = load_language_model(workspace / "llm", config, dtype=torch.float32)
    after = from_pretrained(final)
    changed = {
        name for name, p in after.named_parameters() if not torch.equal(p, dict(before.named_parameters())[name])
    }
    projector = {f"mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert changed == {"vid_edges", *projector}


def test_the_published_projector_file_is_written_next_to_safetensors(trained: Path, workspace: Path) -> None:
    final = trained / "stage3" / "final"
    own, published = load_file(final / "pite.safetensors"), torch.load(final / PROJECTOR_FILE, weights_only=True)
    assert torch.equal(own[EDGES], published[EMBEDDINGS][-2:])
    assert all(torch.equal(own[name], published[name]) for name in own.keys() - {EDGES})
    table = load_file(workspace / "llm" / "model.safetensors")[EMBEDDINGS]
    assert torch.equal(published[EMBEDDINGS][:-3], table)


def test_an_export_loads_here_and_in_transformers(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final, folder = trained / "stage3" / "final", tmp_path / "export"
    flags = ["--model", str(final), "--output", str(folder)]
    assert export([*flags, "--format", "peft"]) == 1
    assert f"{final} holds no adapter: export it with --format full" in capsys.readouterr().err
    assert export([*flags, "--dtype", "float32"]) == 0
    ours, loaded = (dict(from_pretrained(each).named_parameters()) for each in (final, folder))
    # The rows of the marks in the table are the trained ones, which a stage keeps next to the table.
    assert torch.equal(loaded["decoder.embed_tokens"][-2:], ours["vid_edges"])
    assert all(torch.equal(ours[name], loaded[name]) for name in ours if name != "decoder.embed_tokens")
    llama, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {name.rpartition(".")[0] for name in report["unexpected_keys"]} == {
        f"model.mm_projector.{i}" for i in (0, 2)
    }
    assert not report["missing_keys"] and torch.equal(llama.lm_head.weight, ours["lm_head"])
    assert (folder / "tokenizer.json").read_bytes() == (PARTS / "vicuna" / "tokenizer.json").read_bytes()


def test_a_stopped_run_resumes_bitwise(
    uninterrupted: Path, pg_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = torch.optim.AdamW.step, []

    def signalling(self: torch.optim.AdamW, *rest: object) -> object:
        steps.append(self)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", signalling)
    assert main(arguments(pg_workspace, tmp_path)) == 0
    assert 0 < len(numbers(tmp_path)) < 6
    monkeypatch.undo()
    assert main(arguments(pg_workspace, tmp_path)) == 0
    assert numbers(tmp_path) == numbers(uninterrupted)
    expected = load_file(uninterrupted / "stage3" / "final" / "pite.safetensors")
    for name, tensor in load_file(tmp_path / "stage3" / "final" / "pite.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_micro_batches_change_nothing(uninterrupted: Path, pg_workspace: Path, tmp_path: Path) -> None:
    assert main(arguments(pg_workspace, tmp_path, token_budget=130)) == 0
    np.testing.assert_allclose(numbers(tmp_path), numbers(uninterrupted), rtol=1e-5)


def test_videos_first_share_their_rows(pg_workspace: Path, tmp_path: Path) -> None:
    """Questions about one video meet in a batch, and the loss is that of batches that share nothing."""
    flags = {"video_first": "always", "lora_rank": 4, "learning_rate": 1e-3}
    assert main(arguments(pg_workspace, tmp_path / "shared", **flags)) == 0
    assert main(arguments(pg_workspace, tmp_path / "small", token_budget=130, **flags)) == 0
    shared, small = numbers(tmp_path / "shared"), numbers(tmp_path / "small")
    np.testing.assert_allclose(shared, small, rtol=1e-5)
    one, two = (read_metrics(tmp_path / name / "stage3" / "metrics.jsonl")[0] for name in ("shared", "small"))
    assert one["rows"] < 0.5 * one["tokens"] and one["tokens"] == two["tokens"] and one["rows"] < two["rows"]
    cost = stage_cost(parse(TrainConfig, arguments(pg_workspace, tmp_path / "shared", **flags), prog="train"), 3)
    lines = read_metrics(tmp_path / "shared" / "stage3" / "metrics.jsonl")
    rows, tokens = (sum(line[name] for line in lines) for name in ("rows", "tokens"))
    planned = cost.corpus.sharing(cost.recipe, 1, 4000).computed
    # The collator finds more equal rows: the mark after a video, and questions that begin with equal words.
    assert rows / tokens <= planned <= rows / tokens + 0.06, "the dry run counts the data on disk"
    model = from_pretrained(tmp_path / "shared" / "stage3" / "final")
    assert next(model.linear_layers()).lora_b is not None
    flags = ["--model", str(tmp_path / "shared" / "stage3" / "final"), "--output", str(tmp_path / "peft")]
    assert export([*flags, "--format", "peft"]) == 0
    again = from_pretrained(tmp_path / "peft")
    assert torch.equal(again.vid_edges, model.vid_edges)
    torch.testing.assert_close(merged_tensors(again), merged_tensors(model))


def test_float8_without_a_lora_trains(uninterrupted: Path, pg_workspace: Path, tmp_path: Path) -> None:
    assert main(arguments(pg_workspace, tmp_path, frozen_dtype="fp8")) == 0
    losses, exact = numbers(tmp_path), numbers(uninterrupted)
    assert losses != exact and losses[-1][0] < losses[0][0]
    np.testing.assert_allclose(losses[0][:2], exact[0][:2], rtol=0.01)


def test_features_and_flags_of_another_family_are_refused(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_arguments(workspace, tmp_path, "3", family="pite", init=tmp_path)) == 1
    assert main(train_arguments(workspace, tmp_path, "all", family="pg-video-llava", init=tmp_path)) == 1
    assert "stage 3 has none: leave it out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(arguments(workspace, tmp_path, stage="1"))
    assert "--family pg-video-llava has no stage 1" in capsys.readouterr().err


def test_chat_and_evaluation_answer_with_the_trained_model(
    trained: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chat's answer equals that of the stored features; a transcript changes the prompt; the store is checked."""
    final, videos = trained / "stage3" / "final", workspace / "data/evaluation/videos"
    video, question = sorted(videos.iterdir())[0], "How many shapes can be seen?"
    (tmp_path / "transcript.txt").write_text("red circle\n")
    flags = [
        "--model",
        str(final),
        "--clip",
        str(PARTS / "clip"),
        "--device",
        "cpu",
        "--max-new-tokens",
        "12",
        "--json",
    ]
    chat_flags = [*flags, "--video", str(video), "--query", question, "--family", "pg-video-llava"]
    assert chat(chat_flags) == 0 and chat([*chat_flags, "--transcript", str(tmp_path / "transcript.txt")]) == 0
    plain, quoted = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert plain["num_frames"] == FRAMES and plain["tracks"] == []
    generator = Generator.from_pretrained(final)
    record = FeatureStore(workspace / "features/videos").read(f"evaluation/{video.stem}")
    (stored,) = generator.answer([question], [record.copy()], max_new_tokens=12)
    assert plain["answer"] == stored.text and plain["token_ids"] == list(stored.token_ids)
    ids = [generator.prompt(question, len(record), (), text)[0] for text in (None, "red circle")]
    assert len(ids[1]) > len(ids[0]) and "answer" in quoted
    assert chat([*chat_flags, "--trajectory", str(tmp_path / "x.mp4")]) == 1
    assert "predicts no trajectories" in capsys.readouterr().err
    assert chat([*chat_flags[:-1], "pite"]) == 1
    assert "is a model of the family pg-video-llava" in capsys.readouterr().err

    folders = ["--data", str(workspace / "data"), "--store", str(workspace / "features")]
    metrics = tmp_path / "metrics.json"
    arguments = ["grounding", "--model", str(final), *folders, "--device", "cpu", "--metrics", str(metrics)]
    assert evaluate([*arguments, "--predictions", str(tmp_path / "answers.jsonl"), "--batch-size", "2"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert metrics.exists() and sum("answer" in line for line in answers) >= 3


def test_a_judge_scores_its_answers(
    trained: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the published transcripts as an option, which are part of what the answers depend on."""
    videos = [file.stem for file in sorted((workspace / "data/evaluation/videos").iterdir())]
    items = [{"video_name": video, "Q": "How many shapes can be seen?", "A": "Two shapes."} for video in videos]
    (tmp_path / "generic_qa.json").write_text(json.dumps(items))
    transcript = Segment(0, 9, ("red circle " * 20).strip())
    write_transcript(tmp_path / "transcripts" / f"{videos[0]}.json", Path(__file__), 9, "en", [transcript])
    paths = {"model": trained / "stage3/final", "data": workspace / "data", "store": workspace / "features"}
    paths |= {
        "ground_truth": tmp_path / "generic_qa.json",
        "predictions": tmp_path / "p.jsonl",
        "metrics": tmp_path / "m",
    }
    flags = [
        "qa",
        "--benchmark",
        "video_chatgpt",
        "--family",
        "pg-video-llava",
        "--device",
        "cpu",
        "--judge-model",
        "m",
    ]
    flags += [text for name, path in paths.items() for text in (f"--{name.replace('_', '-')}", str(path))]

    def grade(handler: Handler, body: dict[str, object]) -> None:
        handler.complete('{"score": 4}')

    with running(grade) as server:
        assert evaluate([*flags, "--judge-url", server.url]) == 0
        numbers = json.loads(paths["metrics"].read_text())["video_chatgpt"]
        assert server.bodies and {body["model"] for body in server.bodies} == {"m"}
        assert {numbers[axis] for axis in ("correctness", "detail", "context")} == {4.0}
        quoted = [*flags, "--judge-url", server.url, "--transcripts", str(tmp_path / "transcripts")]
        assert evaluate(quoted) == 1
        assert "transcripts" in capsys.readouterr().err
        assert evaluate([*quoted, "--overwrite"]) == 0
        assert f"1 of {len(videos)} videos have a transcript" in capsys.readouterr().err
        (tmp_path / "none").mkdir()
        assert evaluate([*quoted[:-1], str(tmp_path / "none"), "--overwrite"]) == 1
        assert "has a file there, such as" in capsys.readouterr().err
    generator = Generator.from_pretrained(trained / "stage3/final")
    record = FeatureStore(workspace / "features/videos").read(f"evaluation/{videos[0]}").copy()
    (answer,) = generator.answer([items[0]["Q"]], [record], transcripts=["red circle " * 19 + "red circle"])
    first = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert (first["video_id"], first["answer"]) == (videos[0], answer.text)
    assert evaluate(["trajectories", *flags[flags.index("--model") :][:6], "--device", "cpu"]) == 1
    assert "of the family pg-video-llava, which predicts no trajectories" in capsys.readouterr().err


def test_one_of_several_benchmarks_may_have_no_transcript(trained: Path, workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("red circle")
    model = Model(trained / "stage3/final", "cpu", 1, ALONE, transcripts=tmp_path)
    store = FeatureStore(workspace / "features/videos")
    one, two = (Inputs([Question(video, "qa", 0, "Why?")], store, LeftOut(), "") for video in "ab")
    model.check_transcripts([two, one])
    assert model.count_transcripts(two) == ["0 of 1 videos have a transcript"]
    with pytest.raises(ValueError, match=r"none of 1 videos has a file there, such as b\.json"):
        model.check_transcripts([two])


def test_transcripts_are_counted_and_a_run_is_not_continued_with_others(
    uninterrupted: Path, pg_workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((pg_workspace / "data/stage3/video_instruct.json").read_text())
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / f"{records[0]['video_id']}.txt").write_text("red circle " * 20)
    flags = {"transcripts": tmp_path / "t"}
    plain, quoted = (
        stage_cost(parse(TrainConfig, arguments(pg_workspace, tmp_path, **each), prog="train"), 3).corpus
        for each in ({}, flags)
    )
    assert quoted.longest > plain.longest + 40 and quoted.tokens > plain.tokens and quoted.targets == plain.targets
    number = sum(record["video_id"] == records[0]["video_id"] for record in records)
    assert f"{number} with a transcript" in quoted.origin
    assert main(arguments(pg_workspace, uninterrupted, **flags)) == 1
    assert "data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(train_arguments(pg_workspace, tmp_path, "3", **flags))
    assert "--transcripts: --family pite reads none" in capsys.readouterr().err


def test_a_dry_run_prints_the_published_recipes_cost(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(workspace, tmp_path, dry_run=True, video_first="always")) == 0
    printed = capsys.readouterr().out
    assert "published" in printed and "counted: 48 samples" in printed and "LoRA 0.0 M" in printed
