"""--frozen-dtype fp8: what is quantized and when, training as without it, and refused devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import job
from engine.budget import __main__ as budget
from engine.layout import choose_layout, count_parameters, memory
from engine.metrics import read_metrics
from engine.prepare import check_fp8
from engine.recipes import recipe
from engine.run import Progress
from engine.train import main
from pite import names
from pite.checkpoint import from_pretrained, save_pretrained
from pite.config import PiTeConfig
from pite_kernels.fp8 import dequantize
from tests.engine.distributed.ranks import train
from tests.engine.workspace import train_arguments
from tests.samples import random_batch, tiny_model

FP8 = {"frozen_dtype": "fp8"}
NUMBERS = ("loss", "ce", "l1", "gradient_norm")


def lines(output: Path, stage: int) -> list[dict[str, float]]:
    return read_metrics(output / f"stage{stage}" / "metrics.jsonl")


@pytest.fixture(scope="module")
def trained(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages 1 and 2 of four steps each, in float8."""
    output = tmp_path_factory.mktemp("fp8")
    for stage in ("1", "2"):
        assert main(train_arguments(workspace, output, stage, **FP8)) == 0
    return output


def test_losses_and_gradients_are_close_to_those_of_exact_weights():
    model, exact = tiny_model(2), tiny_model(2)
    model.quantize()
    batch = random_batch(6, model.config)
    found = {}
    for name, each in (("fp8", model), ("exact", exact)):
        losses = each(batch, head="trajectory", label_smoothing=0.1)
        losses.total.backward()
        gradient = torch.cat([p.grad.flatten() for n, p in each.trainable() if "lora_" in n])
        found[name] = losses.total.item(), gradient
    (loss, gradient), (expected, exact_gradient) = found["fp8"], found["exact"]
    assert loss == pytest.approx(expected, rel=0.02) and loss != expected
    assert torch.cosine_similarity(gradient, exact_gradient, dim=0) > 0.98


def test_stages_train_and_their_outputs_are_not_float8(trained: Path, workspace: Path, tmp_path: Path):
    assert main(train_arguments(workspace, tmp_path, "1")) == 0
    ours, exact = lines(trained, 1), lines(tmp_path, 1)
    assert len(ours) == len(exact) == 6
    for a, b in zip(ours, exact):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02) and a["loss"] != b["loss"]
    model = from_pretrained(trained / "stage2" / "final")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_pretrained(model, tmp_path / "merged")
    assert from_pretrained(tmp_path / "merged").dtype == torch.float32


def test_earlier_stages_are_merged_before_the_weights_are_quantised(
    trained: Path, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    models = []
    monkeypatch.setattr(
        job, "run", lambda config, inputs, model, *rest: models.append(model) or Progress(0, False, False)
    )
    assert main(train_arguments(workspace, tmp_path, "3", init=trained / "stage2" / "final", **FP8)) == 0
    merged = from_pretrained(trained / "stage2" / "final")
    merged.merge_lora()
    (model,) = models
    base = from_pretrained(workspace / "llm")
    for (_, ours, _), (_, exact, _), (_, before, _) in zip(*(names.linear_layers(m) for m in (model, merged, base))):
        assert ours.quantized and not any(name == "weight" for name, _ in ours.named_parameters())
        for quantized, scales, weight in (
            (ours.rows, ours.row_scales, exact.weight),
            (ours.columns, ours.column_scales, exact.weight.t()),
        ):
            assert ((dequantize(quantized, scales) - weight).abs() <= weight.abs() / 16 + scales[:, None] / 1024).all()
        assert not torch.equal(exact.weight, before.weight)


def test_an_interrupted_run_continues_bit_for_bit_and_only_as_float8(trained: Path, workspace: Path, tmp_path, capsys):
    assert main(train_arguments(workspace, tmp_path, "1", max_steps=2, **FP8)) == 0
    assert main(train_arguments(workspace, tmp_path, "1")) == 1
    assert "frozen_dtype was fp8" in capsys.readouterr().err
    assert main(train_arguments(workspace, tmp_path, "1", **FP8)) == 0
    for a, b in zip(lines(tmp_path, 1), lines(trained, 1)):
        assert [a[n] for n in NUMBERS] == [b[n] for n in NUMBERS]


def test_sharded_weights_compute_the_same_as_copied_ones(workspace: Path, tmp_path: Path):
    for parallel in ("ddp", "fsdp"):
        flags = {"parallel": parallel, "llm": "random", "max_steps": 2, **FP8}
        ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path / parallel, "2", **flags))
        assert ranks.wait() == [0, 0], ranks.stderr(0)
    for a, b in zip(lines(tmp_path / "ddp", 2), lines(tmp_path / "fsdp", 2), strict=True):
        assert [a[n] for n in NUMBERS] == pytest.approx([b[n] for n in NUMBERS], rel=1e-5)


def test_a_quantised_model_is_not_saved_whole(tmp_path: Path):
    model = tiny_model()
    model.quantize()
    with pytest.raises(ValueError, match="load the model again to save them"):
        save_pretrained(model, tmp_path)


def test_devices_without_float8_are_refused(monkeypatch: pytest.MonkeyPatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="--frozen-dtype fp8: NVIDIA A100 has no float8"):
        check_fp8(cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_fp8(cuda, torch.bfloat16)
    with pytest.raises(ValueError, match="leave --dtype out"):
        check_fp8(cuda, torch.float32)


def test_both_orientations_take_the_bytes_of_bfloat16(capsys: pytest.CaptureFixture[str]):
    config = PiTeConfig.preset("13b")
    count = count_parameters(config, recipe("13b", 2))
    half, both = (memory(config, count, 4096, fp8=fp8) for fp8 in (False, True))
    assert both.weights == half.weights
    assert half.activations < both.activations < 1.01 * half.activations
    wide = memory(config, count, 4096, 4, fp8=True).weights
    assert wide == memory(config, count, 4096, 4).weights - 2 * count.linear
    shared = memory(config, count, 4096, fp8=True, shards=8).weights
    assert shared == pytest.approx(memory(config, count, 4096, shards=8).weights, rel=1e-6)
    assert choose_layout(config, count, 80e9, fp8=True).shards == 1
    assert budget.main(["--model", "13b", "--stage", "2", "--frozen-dtype", "fp8"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("has no float8 arithmetic") == 4
    assert printed.count("59%* ") == 4
