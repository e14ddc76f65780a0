"""engine.train from command-line arguments: three stages, refused runs and error messages."""

import gc
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaForCausalLM

from dataloaders.samples.dataset import StageDataset
from dataloaders.store.features import FeatureStore, FeatureWriter
from engine import job, loop, report, run
from engine.metrics import read_metrics
from engine.train import main
from pite.checkpoint import from_pretrained
from pite.decoder import Documents
from tests.engine.workspace import train_arguments


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert main(train_arguments(workspace, output)) == 0
    return output


def test_three_stages_leave_models_metrics_and_lineage(trained: Path):
    for stage, steps in ((1, 6), (2, 6), (3, 16)):
        lines = read_metrics(trained / f"stage{stage}" / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert all(np.isfinite(list(line.values())).all() for line in lines)
        assert (lines[0]["l1"] > 0) == (stage < 3)
        model = from_pretrained(trained / f"stage{stage}" / "final")
        assert AutoTokenizer.from_pretrained(trained / f"stage{stage}" / "final").eos_token_id == 2
        assert model.config.num_frames == 8
    lineage = json.loads((trained / "stage3" / "final" / "lineage.json").read_text())
    assert [Path(entry["path"]).parent.name for entry in lineage["merged"]] == ["stage1", "stage2"]
    assert all(len(entry["sha256"]) == 64 for entry in lineage["merged"])


def test_a_stage_changes_only_its_trainable_modules(trained: Path):
    heads = [load_file(trained / f"stage{s}" / "final" / "pite.safetensors") for s in (1, 2, 3)]
    for name in ("model.vision_adapter.weight", "model.localization_projector.weight"):
        assert torch.equal(heads[0][name], heads[1][name])
    assert not torch.equal(heads[0]["model.trajectory_projector.weight"], heads[1]["model.trajectory_projector.weight"])
    assert all(torch.equal(heads[1][name], heads[2][name]) for name in heads[1])


def test_a_trained_chain_of_adapters_loads_in_peft(trained: Path, workspace: Path):
    """As a user of transformers + peft would: load the language model, then merge the adapter of each stage in turn."""
    llama = LlamaForCausalLM.from_pretrained(workspace / "llm")
    for stage in (1, 2, 3):
        llama = PeftModel.from_pretrained(llama, str(trained / f"stage{stage}" / "final")).merge_and_unload()
    ours = from_pretrained(trained / "stage3" / "final")
    ids = torch.arange(3, 40)
    with torch.no_grad():
        x = torch.nn.functional.embedding(ids, ours.decoder.embed_tokens)
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        hidden = ours.decoder(x, torch.arange(len(ids), dtype=torch.int32), Documents(bounds, len(ids)))
        torch.testing.assert_close(ours.logits(hidden), llama(input_ids=ids[None]).logits[0], rtol=1e-4, atol=1e-4)


def test_repeating_a_finished_run_changes_nothing(trained: Path, workspace: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    assert main(train_arguments(workspace, trained)) == 0
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().err.count("is done") == 3


@pytest.mark.parametrize(
    "flag, named",
    [
        ({"seed": 1}, "seed was 0"),
        ({"global_batch": 4}, "recipe.global_batch was 8"),
        ({"lora_rank": 4}, "recipe.lora_rank was 32"),
    ],
)
def test_a_finished_stage_of_another_run_is_refused(trained: Path, workspace: Path, capsys, flag, named):
    assert main(train_arguments(workspace, trained, "1", **flag)) == 1
    assert named in capsys.readouterr().err


def test_an_interrupted_run_refuses_other_data(workspace: Path, tmp_path: Path, capsys):
    assert main(train_arguments(workspace, tmp_path, "2", init=tmp_path, max_steps=2)) == 1
    assert "train stage 1 first" in capsys.readouterr().err
    data = tmp_path / "data"
    shutil.copytree(workspace / "data", data, symlinks=True)
    assert main(train_arguments(workspace, tmp_path, "1", data=data, max_steps=2)) == 0
    assert not (tmp_path / "stage1" / "final").exists()
    lines = (data / "stage1" / "localized_narratives.jsonl").read_text().splitlines(keepends=True)
    (data / "stage1" / "localized_narratives.jsonl").write_text("".join(lines[:-1]))
    assert main(train_arguments(workspace, tmp_path, "1", data=data)) == 1
    assert "data was 24 samples" in capsys.readouterr().err


def test_an_interrupted_run_refuses_other_features_and_another_epsilon(
    workspace: Path, tmp_path: Path, capsys, monkeypatch
):
    """With the same manifest and the same weights; refused before any model is loaded."""
    for name in ("features", "llm"):
        shutil.copytree(workspace / name, tmp_path / name)
    output, paths = tmp_path / "out", {"store": tmp_path / "features", "llm": tmp_path / "llm"}
    assert main(train_arguments(workspace, output, "1", **paths, max_steps=2)) == 0
    monkeypatch.setattr(job, "build_model", lambda *_, **__: pytest.fail("a model is loaded"))
    config = tmp_path / "llm" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    assert main(train_arguments(workspace, output, "1", **paths)) == 1
    assert "norm_epsilon was 1e-06 there and is 0.5 now" in capsys.readouterr().err
    config.write_text(text)
    images = FeatureStore(tmp_path / "features" / "images")
    records = {key: -images.read(key) for key in images.keys}
    for file in (tmp_path / "features" / "images").glob("0*.*"):
        file.unlink()
    with FeatureWriter(FeatureStore(tmp_path / "features" / "images")) as writer:
        writer.add(records)
    assert main(train_arguments(workspace, output, "1", **paths)) == 1
    assert "feature_records was" in capsys.readouterr().err


def test_media_that_were_never_encoded_are_an_error(workspace: Path, tmp_path: Path, capsys):
    features = tmp_path / "features"
    for folder in ("images", "videos"):
        FeatureStore.create_or_open(features / folder, FeatureStore(workspace / "features" / folder).manifest)
    full = FeatureStore(workspace / "features" / "images")
    keys = sorted(full.keys)
    with FeatureWriter(FeatureStore(features / "images")) as writer:
        writer.add({key: full.read(key) for key in keys[1:]})
    assert main(train_arguments(workspace, tmp_path / "out", "1", store=features)) == 1
    error = capsys.readouterr().err
    assert repr(keys[0]) in error
    assert "run engine.encode" in error


def test_samples_over_length_are_counted(workspace: Path, tmp_path: Path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(workspace / "llm")
    shape = {"num_frames": 1, "num_points": 1, "available": None}
    every = StageDataset(workspace / "data", 1, tokenizer, max_length=2048, **shape)
    limit = int(np.median(every.tokens))
    longer = int((every.tokens > limit).sum())
    assert longer > 0
    assert main(train_arguments(workspace, tmp_path, "1", max_length=limit, global_batch=2, max_steps=1)) == 0
    assert f"{longer} left out for more than {limit} tokens" in capsys.readouterr().err


def test_a_sample_with_nan_features_is_named_before_any_update(
    trained: Path, workspace: Path, tmp_path: Path, capsys, monkeypatch
):
    read = FeatureStore.read

    def poisoned(self: FeatureStore, key: str) -> np.ndarray:
        record = read(self, key)
        return np.full_like(record, np.nan) if key == "stage2/v000003" else record

    monkeypatch.setattr(FeatureStore, "read", poisoned)
    assert main(train_arguments(workspace, tmp_path, "2", init=trained / "stage1/final", checkpoint_every=1)) == 1
    error = capsys.readouterr().err
    assert "the loss or gradient of v000003 is not finite, because the features of v000003 in " in error
    assert "rank 0" in error
    failed = int(error.split("engine.train: step ")[1].split(",")[0])
    saved = sorted(p.name for p in (tmp_path / "stage2" / "checkpoints").iterdir())
    assert saved[-1:] == ([f"step-{failed - 1:08d}"] if failed > 1 else [])
    files = [file for p in saved for file in (tmp_path / "stage2/checkpoints" / p).glob("*.safetensors")]
    assert len(files) == len(saved)
    assert all(torch.isfinite(t).all() for file in files for t in load_file(file).values())


@pytest.mark.parametrize("late", [False, True])
def test_optimizer_steps_are_skipped_from_the_first_non_finite_one(
    trained: Path, workspace: Path, tmp_path: Path, capsys, monkeypatch, late: bool
):
    """`late`: as on a GPU, where the numbers are read when the next step and its update are queued already."""
    compute, make = loop.compute_losses, run.make_optimizer
    optimizers: list[torch.optim.Optimizer] = []
    calls: list[int] = []

    def poisoned(*arguments):
        calls.append(1)
        losses = compute(*arguments)
        return (
            replace(losses, total=losses.total * math.nan) if len(calls) == 3 and "poisoned" in output.name else losses
        )

    monkeypatch.setattr(loop, "compute_losses", poisoned)
    monkeypatch.setattr(report, "reads_late", lambda device: late)
    monkeypatch.setattr(run, "make_optimizer", lambda *rest: optimizers.append(make(*rest)) or optimizers[-1])
    for output, steps, status in ((tmp_path / "clean", 2, 0), (tmp_path / "poisoned", 6, 1)):
        calls.clear()
        flags = {"init": trained / "stage1/final", "max_steps": steps, "checkpoint_every": 1000}
        assert main(train_arguments(workspace, output, "2", **flags)) == status
    assert len(calls) == (4 if late else 3), "computed micro-batches"
    error = capsys.readouterr().err
    assert "engine.train: step 3, " in error
    clean, stopped = ([p for group in o.param_groups for p in group["params"]] for o in optimizers)
    assert clean and all(torch.equal(a, b) for a, b in zip(clean, stopped, strict=True))
    assert [line["step"] for line in read_metrics(output / "stage2" / "metrics.jsonl")] == [1, 2]


def test_the_garbage_collector_is_frozen_during_training(trained: Path, workspace: Path, tmp_path: Path, monkeypatch):
    calls: list[str] = []
    freeze, compute = gc.freeze, loop.compute_losses
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze") or freeze())
    monkeypatch.setattr(gc, "unfreeze", lambda: calls.append("unfreeze"))
    monkeypatch.setattr(loop, "compute_losses", lambda *rest: calls.append("compute") or compute(*rest))
    assert main(train_arguments(workspace, tmp_path, "1", max_steps=1)) == 0
    assert calls == ["freeze", "compute", "unfreeze"]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"model": "tiny", "llm": "none"}, "--model tiny needs --llm"),
        ({"max_length": 0}, "--max-length must be at least 1"),
        ({"stage": "4"}, "--stage"),
        ({"learning_rat": 1}, "--learning-rate"),
    ],
)
def test_a_wrong_flag_is_one_sentence(workspace: Path, tmp_path: Path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as exit:
        main(train_arguments(workspace, tmp_path, **{"stage": "1", **flags}))
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert "\n" not in error


@pytest.mark.parametrize("missing", ["data", "store", "llm"])
def test_a_missing_path_is_one_sentence(workspace: Path, tmp_path: Path, capsys, missing):
    assert main(train_arguments(workspace, tmp_path, "1", **{missing: tmp_path / "nowhere"})) == 1
    error = capsys.readouterr().err.strip()
    assert str(tmp_path / "nowhere") in error
    assert "\n" not in error


def test_a_batch_larger_than_the_data_is_refused(workspace: Path, tmp_path: Path, capsys):
    assert main(train_arguments(workspace, tmp_path, "1", global_batch=100)) == 1
    assert "24 samples do not fill one global batch of 100" in capsys.readouterr().err


@pytest.mark.parametrize("absent, normalizer", [("regress", "present"), ("skip", "paper"), ("regress", "paper")])
def test_the_papers_other_normalizers_divide_by_other_counts(workspace: Path, tmp_path: Path, absent, normalizer):
    """Stage 1 has one point of two coordinates per token; some tokens have none."""
    arguments = {"max_steps": 1, "lora_rank": 4, "trajectory_weight": 5}
    assert main(train_arguments(workspace, tmp_path / "default", "1", **arguments)) == 0
    other = {**arguments, "absent": absent, "trajectory_normalizer": normalizer}
    assert main(train_arguments(workspace, tmp_path / "other", "1", **other)) == 0
    default, line = (read_metrics(tmp_path / name / "stage1" / "metrics.jsonl")[0] for name in ("default", "other"))
    assert line["ce"] == default["ce"]
    assert line["l1"] != default["l1"]
    assert line["loss"] == pytest.approx(line["ce"] + 5 * line["l1"], rel=1e-5)


def test_a_stage_of_another_language_model_is_refused(trained: Path, workspace: Path, tmp_path: Path, capsys):
    shutil.copytree(workspace / "llm", tmp_path / "llm")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llm")
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path / "llm")
    start = trained / "stage1" / "final"
    assert main(train_arguments(workspace, tmp_path, "2", init=start, llm=tmp_path / "llm")) == 1
    assert "its language_model was" in capsys.readouterr().err
    assert main(train_arguments(workspace, tmp_path, "2", init=start, num_points=1)) == 1
    assert "its num_points was 3" in capsys.readouterr().err


def test_a_budget_below_the_longest_sample_is_refused_at_once(workspace: Path, tmp_path: Path, capsys):
    assert main(train_arguments(workspace, tmp_path, "1", token_budget=20)) == 1
    error = capsys.readouterr().err
    assert "raise --token-budget" in error
    assert re.search(r"the longest sample \('i\d{6}:0'\) has \d+ tokens", error)


def test_a_token_without_an_embedding_is_an_error_before_any_model(
    workspace: Path, tmp_path: Path, capsys, monkeypatch
):
    shutil.copytree(workspace / "llm", tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    tokenizer.add_tokens([AddedToken("ircle", normalized=False)])
    tokenizer.save_pretrained(tmp_path / "llm")
    monkeypatch.setattr(job, "build_model", lambda *_, **__: pytest.fail("a model is loaded"))
    for flags in ({}, {"dry_run": True}):
        assert main(train_arguments(workspace, tmp_path / "out", "1", llm=tmp_path / "llm", **flags)) == 1
        error = capsys.readouterr().err
        assert f"holds token {len(tokenizer) - 1} ('ircle'): the tokenizer has {len(tokenizer):,} tokens" in error


@pytest.mark.parametrize("dry_run", [False, True])
def test_samples_beyond_the_context_are_refused(workspace: Path, tmp_path: Path, capsys, dry_run: bool):
    shutil.copytree(workspace / "llm", tmp_path / "llm")
    config = tmp_path / "llm" / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 2048', '"max_position_embeddings": 30'))
    arguments = train_arguments(workspace, tmp_path / "out", "1", llm=tmp_path / "llm", max_steps=1, global_batch=2)
    assert main([*arguments, *["--dry-run"] * dry_run]) == 1
    error = capsys.readouterr().err
    assert "is longer than the 30 positions that the language model was trained on" in error
    assert "--max-length 30 leaves out " in error
    assert main([*arguments, "--max-length", "30", *["--dry-run"] * dry_run]) == 0
