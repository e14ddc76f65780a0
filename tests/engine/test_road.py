"""The road through training: what is wrong is found before the first step, and named; what runs is logged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dataloaders.store.features import MANIFEST
from engine import job
from engine.train import main
from pite import devices
from tests.engine.distributed.ranks import train
from tests.engine.workspace import train_arguments


@pytest.fixture
def data(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may damage."""
    shutil.copytree(workspace / "data", tmp_path / "data", symlinks=True)
    return tmp_path / "data"


def edit_records(file: Path, edit) -> None:
    """Apply `edit` to the list of records of a JSON or JSON Lines file."""
    lines = file.suffix == ".jsonl"
    text = file.read_text()
    records = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    records = edit(records)
    file.write_text("".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records))


def refused(arguments: list[str], output: Path, capsys) -> str:
    """The error of a run that is refused before any stage trains."""
    assert main(arguments) == 1
    assert not list(output.glob("stage*/checkpoints/*")) and not list(output.glob("stage*/metrics.jsonl"))
    return capsys.readouterr().err.splitlines()[-1]


def test_a_malformed_record_of_stage_3_is_found_before_stage_1(workspace: Path, data: Path, tmp_path: Path, capsys):
    edit_records(data / "stage3" / "valley.json", lambda records: [{"id": 3}, *records])
    error = refused(train_arguments(workspace, tmp_path / "run", data=data), tmp_path / "run", capsys)
    assert "records are malformed, more than the failure budget of 1.00%; add --failure-budget 0." in error


def test_media_of_stage_2_without_features_are_found_before_stage_1(
    workspace: Path, data: Path, tmp_path: Path, capsys
):
    edit_records(data / "stage2" / "pite_143k.jsonl", lambda records: [*records, {**records[0], "id": "newcomer"}])
    arguments = train_arguments(workspace, tmp_path / "run", data=data)
    error = refused(arguments, tmp_path / "run", capsys)
    assert "'stage2/newcomer'" in error and "run engine.encode first" in error
    assert main([*arguments, "--dry-run"]) == 0
    assert "1 of its media is not in" in capsys.readouterr().out


def test_a_sample_of_stage_3_beyond_the_token_budget_is_found_before_stage_1(workspace: Path, tmp_path: Path, capsys):
    error = refused(train_arguments(workspace, tmp_path, token_budget=50), tmp_path, capsys)
    assert "raise --token-budget" in error


@pytest.mark.parametrize("stage, file, field", [
    (1, "localized_narratives.jsonl", "traces"), (2, "pite_143k.jsonl", "trajectories"),
])  # fmt: skip
def test_a_stage_without_one_coordinate_is_refused(
    workspace: Path, data: Path, tmp_path: Path, capsys, stage: int, file: str, field: str
):
    empty = {"traces": [], "timed_caption": []} if stage == 1 else {field: []}
    edit_records(data / f"stage{stage}" / file, lambda records: [{**record, **empty} for record in records])
    arguments = train_arguments(workspace, tmp_path / "run", data=data)
    error = refused(arguments, tmp_path / "run", capsys)
    assert "none of the 24 samples has a present coordinate" in error
    assert "24 samples, 0 with mentions, 0 with a trajectory" in error and f"the field {field!r}" in error


def test_points_that_are_all_absent_are_no_coordinates(workspace: Path, data: Path, tmp_path: Path, capsys):
    """A record may have mentions and no point in any frame."""

    def hide(records):
        for mention in (mention for record in records for mention in record["trajectories"]):
            mention["points"] = [[[-1, -1] for _ in track] for track in mention["points"]]
        return records

    edit_records(data / "stage2" / "pite_143k.jsonl", hide)
    error = refused(train_arguments(workspace, tmp_path / "run", data=data), tmp_path / "run", capsys)
    assert "24 with mentions, 0 with a trajectory" in error


def test_features_of_two_encoders_are_refused(workspace: Path, tmp_path: Path, capsys):
    store = tmp_path / "features"
    shutil.copytree(workspace / "features", store)
    manifest = json.loads((store / "images" / MANIFEST).read_text())
    (store / "images" / MANIFEST).write_text(json.dumps({**manifest, "encoder": "another"}))
    for stage in ("1", "all"):
        error = refused(train_arguments(workspace, tmp_path / "run", stage, store=store), tmp_path / "run", capsys)
        assert "hold features of two encoders, another and" in error and "import --like" in error


def test_a_stage_does_not_start_from_another_encoder(workspace: Path, tmp_path: Path, capsys):
    assert main(train_arguments(workspace, tmp_path / "one", "1", epochs=1)) == 0
    store = tmp_path / "features"
    shutil.copytree(workspace / "features", store)
    for kind in ("images", "videos"):
        manifest = json.loads((store / kind / MANIFEST).read_text())
        (store / kind / MANIFEST).write_text(json.dumps({**manifest, "encoder": "another"}))
    start = tmp_path / "one" / "stage1" / "final"
    error = refused(
        train_arguments(workspace, tmp_path / "two", "2", store=store, init=start), tmp_path / "two", capsys
    )
    assert "its encoder was " in error and "and is another now" in error


def test_a_finished_stage_is_compared_with_its_data(workspace: Path, data: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    assert main(train_arguments(workspace, run, "1", data=data, epochs=1)) == 0
    edit_records(data / "stage1" / "localized_narratives.jsonl", lambda records: records[:-1])
    assert main(train_arguments(workspace, run, "1", data=data, epochs=1)) == 1
    assert "data was 24 samples" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    ({"llm": "./nowhere"}, "--llm ./nowhere is neither a directory nor a Hugging Face model name"),
    ({"init": "nowhere"}, "--init nowhere: no such folder"),
    ({"stage": "2"}, "stage 2 starts from stage 1's output, and"),
    ({"cache": "/dev/null/samples"}, "--cache /dev/null/samples: /dev/null is a file, not a folder"),
    ({"output": "/dev/null/run"}, "--output /dev/null/run: /dev/null is a file, not a folder"),
])  # fmt: skip
def test_missing_paths_are_named_before_anything_is_read(workspace: Path, tmp_path: Path, capsys, flags, words: str):
    arguments = {"stage": "1", **flags}
    output = arguments.pop("output", tmp_path)
    assert main(train_arguments(workspace, output, arguments.pop("stage"), **arguments)) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_large_models_train_on_a_cpu_only_by_flag(workspace: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(devices, "unusable_gpu", lambda: None)
    monkeypatch.setattr(job, "World", None)
    arguments = train_arguments(workspace, tmp_path, "1", model="13b", device="none")
    assert "--model 13b is trained on one; --device cpu trains on the CPU" in refused(arguments, tmp_path, capsys)
    with pytest.raises(AttributeError):  # past the check
        main(train_arguments(workspace, tmp_path, "1", model="13b", device="cpu"))
    with pytest.raises(AttributeError):
        main(train_arguments(workspace, tmp_path, "1", device="none"))


def test_a_gpu_that_torch_cannot_use_is_one_sentence(workspace: Path, tmp_path: Path, capsys, monkeypatch):
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
    monkeypatch.setattr(devices, "_driver", lambda: devices._driver_of(version))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    error = refused(train_arguments(workspace, tmp_path, "1", device="none"), tmp_path, capsys)
    assert "is built for CUDA 13.0, and the driver is 535.183.01" in error and "--device cpu" in error
    monkeypatch.setattr(torch.version, "cuda", None)
    error = refused(train_arguments(workspace, tmp_path, "1", device="cuda"), tmp_path, capsys)
    assert "is a build without CUDA" in error


def test_a_gpu_without_kernels_in_the_build_is_one_sentence(monkeypatch):
    def missing(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")

    monkeypatch.setattr(torch, "zeros", missing)
    with pytest.raises(
        ValueError, match=r"cuda:0 cannot be used by torch .*no kernel image is available.*docs/install"
    ):
        devices.check_computes(torch.device("cuda:0"))


def test_what_trains_is_logged(workspace: Path, tmp_path: Path, capsys):
    assert main(train_arguments(workspace, tmp_path, max_steps=1)) == 0
    lines = [line.partition(" INFO    ")[2] for line in capsys.readouterr().err.splitlines()]
    assert re.match(
        r"1 rank on 1 host \(.+\), a CPU, \d+ threads each; float32, losses by (C\+\+|PyTorch); torch ", lines[0]
    )
    for stage, counts in ((1, "24 samples, 24 with mentions, 24 with a trajectory"), (3, "68 samples")):
        assert f"stage {stage}: {counts}" in lines
    assert sum("attention by sdpa" in line for line in lines) == 3, "all stages are prepared before the first"


def test_ranks_and_hosts_are_logged_once(workspace: Path, tmp_path: Path):
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path / "run", "1", max_steps=1))
    assert ranks.wait() == [0, 0], ranks.stderr(0)
    assert "rank 0: 2 ranks on 1 host" in ranks.stderr(0)
    assert "INFO" not in ranks.stderr(1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_not_finite_are_named_and_not_the_samples(workspace: Path, tmp_path: Path, ranks: int):
    llm = tmp_path / "llm"
    shutil.copytree(workspace / "llm", llm)
    weights = load_file(llm / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    for parallel in ("ddp", "fsdp")[:ranks]:
        arguments = train_arguments(workspace, tmp_path / parallel, "1", llm=llm, parallel=parallel)
        started = train(ranks, tmp_path / "logs" / parallel, arguments)
        assert started.wait() == [1] * ranks, started.stderr(0)
        (error,) = (line for line in started.stderr(0).splitlines() if line.startswith("engine.train:"))
        assert "step 1, every sample's loss or gradient is not finite, because weights are not: " in error
        assert re.search(r"decoder\.layers\.1\.\S+ \(1 of [\d,]+\)", error), error
        assert "v0" not in error


def test_the_flags_are_written_and_read_again(workspace: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    assert main(train_arguments(workspace, run, "1", epochs=1, learning_rate=3e-4)) == 0
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["optimization"]["learning-rate"] == 3e-4 and written["model"]["model"] == "tiny"
    capsys.readouterr()
    assert main(["--config", str(run / "config.yaml")]) == 0
    assert "stage 1 is done" in capsys.readouterr().err
    assert main(["--config", str(run / "config.yaml"), "--learning-rate", "1e-3"]) == 1
    assert "recipe.learning_rate was 0.0003 there and is 0.001 now" in capsys.readouterr().err


def test_quiet_runs_print_only_problems(workspace: Path, tmp_path: Path, capsys):
    assert main(train_arguments(workspace, tmp_path, "1", max_steps=1, log_level="warning")) == 0
    assert "INFO" not in capsys.readouterr().err


def test_a_refused_run_changes_nothing_in_the_folder(workspace: Path, data: Path, tmp_path: Path, capsys):
    """Neither the flags of the run before nor its list of samples that are left out."""
    run = tmp_path / "run"
    assert main(train_arguments(workspace, run, "1", data=data, max_steps=2)) == 0
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    edit_records(data / "stage1" / "localized_narratives.jsonl", lambda records: [{}, *records])
    assert main(train_arguments(workspace, run, "1", data=data, seed=7, failure_budget=0.5)) == 1
    assert "the config.yaml of that --output has its flags" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_stage_starts_from_the_stage_before_it(workspace: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    assert main(train_arguments(workspace, run, epochs=1)) == 0
    capsys.readouterr()
    for stage, init, words in (
        ("2", run / "stage3" / "final", "stage 2 starts from stage 1's output, and"),
        ("3", run / "stage1" / "final", "is stage 1's; --no-trajectory-stage leaves stage 2 out"),
        ("1", run / "stage1" / "final", "stage 1 has none: leave it out"),
        ("2", run / "stage1", f"give --init {run / 'stage1' / 'final'}"),
        ("3", run, f"give --init {run / 'stage3' / 'final'}"),
    ):
        assert words in refused(train_arguments(workspace, tmp_path / "x", stage, init=init), tmp_path / "x", capsys)


def test_features_that_were_never_made_are_named_as_such(workspace: Path, tmp_path: Path, capsys):
    """A store without one record of the stage, and annotations without one record."""
    for kind in ("images", "videos"):
        (tmp_path / "features" / kind).mkdir(parents=True)
        shutil.copy(workspace / "features" / kind / MANIFEST, tmp_path / "features" / kind)
    arguments = train_arguments(workspace, tmp_path / "run", store=tmp_path / "features")
    error = refused(arguments, tmp_path / "run", capsys)
    assert (
        "24 left out whose media are not in the feature store, in localized_narratives.jsonl: run engine.encode"
        in error
    )


def test_an_empty_annotation_file_is_named(workspace: Path, data: Path, tmp_path: Path, capsys):
    (data / "stage2" / "pite_143k.jsonl").write_text("")
    error = refused(train_arguments(workspace, tmp_path / "run", data=data), tmp_path / "run", capsys)
    assert "stage 2: " in error and "holds no usable sample: 0 samples, in pite_143k.jsonl" in error


def test_weights_are_compared_with_the_shape_before_data_are_read(workspace: Path, tmp_path: Path, capsys):
    llm = tmp_path / "llm"
    shutil.copytree(workspace / "llm", llm)
    weights = load_file(llm / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    error = refused(train_arguments(workspace, tmp_path / "run", llm=llm), tmp_path / "run", capsys)
    assert "model.layers.1.mlp.up_proj.weight" in error and str(llm) in error
    assert not (tmp_path / "run" / "stage1").exists()


def test_held_out_lines_of_no_sample_are_counted(workspace: Path, tmp_path: Path, capsys):
    """A file may name samples of some stages only."""
    file = tmp_path / "held_out.txt"
    file.write_text("v000001\nno-such-id\n")
    assert main(train_arguments(workspace, tmp_path / "run", held_out=file, validate_every=100, epochs=1)) == 0
    error = capsys.readouterr().err
    assert "1 of its lines are no sample, such as 'no-such-id'" in error
    assert error.count("are held out for validation") == 2


def test_a_dry_run_names_data_that_it_did_not_count(workspace: Path, capsys):
    """Without a network and without Vicuna's tokenizer on this machine."""
    arguments = ["--model", "7b", "--stage", "2", "--data", str(workspace / "data"), "--dry-run"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "stage2 is not counted: the tokenizer of lmsys/vicuna-7b-v1.5 is not on this machine" in printed


def test_a_record_on_a_line_with_others_is_named_by_its_number(workspace: Path, data: Path, tmp_path: Path, capsys):
    def spoil(records):
        records[6].pop("a")
        return records

    edit_records(data / "stage3" / "video_instruct.json", spoil)
    assert (data / "stage3" / "video_instruct.json").read_text().count("\n") == 0
    assert main(train_arguments(workspace, tmp_path / "run", data=data)) == 1
    assert "video_instruct.json:1: record 7: field 'a' is missing" in capsys.readouterr().err


def test_a_wrong_file_has_no_budget_to_raise(workspace: Path, data: Path, tmp_path: Path, capsys):
    edit_records(data / "stage2" / "pite_143k.jsonl", lambda records: [{"video": record["id"]} for record in records])
    error = refused(train_arguments(workspace, tmp_path / "run", data=data), tmp_path / "run", capsys)
    assert "and more than half: check the files and their format" in error and "add --failure-budget" not in error
