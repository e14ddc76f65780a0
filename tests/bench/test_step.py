"""The step benchmark: which peers are timed, which weights are shared, how a failing peer is reported."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.step import __main__ as step
from bench.step import problem as step_problem
from bench.step.problem import make_problem, paper_shape, tiny_shape
from engine.recipes import PAPER


@pytest.fixture(scope="module")
def problem():
    return make_problem(replace(tiny_shape(), samples=3), torch.device("cpu"), torch.float32, 4, None)


def test_a_peer_is_timed_only_if_its_loss_agrees(problem, monkeypatch: pytest.MonkeyPatch):
    def fails(problem):
        raise RuntimeError("no such kernel\nand more")

    def other(problem):
        return lambda update=True: [torch.tensor(1.0)]

    monkeypatch.setattr(step, "PEERS", {**step.PEERS, "fails": fails, "other": other})
    rows = {r.implementation: r for r in step.measure("tiny", problem, 1, ("fails", "other", step.FP8))}
    assert rows["fails"].problem == "RuntimeError: no such kernel"
    assert "its loss is 1.000000, ours" in rows["other"].problem
    assert "only emulates" in rows[step.FP8].problem
    assert rows[step.OURS].tokens_per_second > 0


def test_unsloth_gets_our_weights_and_our_lora(problem, monkeypatch: pytest.MonkeyPatch):
    """Uses a fake with the two functions of unsloth, because unsloth can only be imported with a GPU."""
    given: list[dict[str, object]] = []

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(directory: str, *, max_seq_length: int, dtype: torch.dtype, load_in_4bit: bool):
            return LlamaForCausalLM.from_pretrained(directory, dtype=dtype), AutoTokenizer.from_pretrained(directory)

        @staticmethod
        def get_peft_model(llama, *, bias: str, use_gradient_checkpointing: str, **options):
            given.append(options)
            return get_peft_model(llama, LoraConfig(bias=bias, **options))

    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    rows = {r.implementation: r for r in step.measure("tiny", problem, 1, (step.UNSLOTH,))}
    assert rows[step.UNSLOTH].problem is None, "its loss agrees with ours"
    assert (given[0]["r"], given[0]["lora_alpha"], len(given[0]["target_modules"])) == (4, 8.0, 7)


def test_a_copy_shares_only_the_frozen_weights(problem):
    model = problem.model
    copy = step_problem.copy_trainable(model)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), copy.named_parameters()):
        assert (ours is theirs) == (not ours.requires_grad), name
    copy.quantize()
    assert not any(linear.quantized for linear in (model.decoder.layers[0].qkv, model.decoder.layers[0].down))


def test_memory_of_the_peers():
    config = paper_shape("7b").config
    ours, both = step.peer_bytes(config, [step.OURS]), step.peer_bytes(config, [step.OURS, step.FP8])
    assert ours == 16 * (PAPER[2].lora_rank * 2_498_560 + 600 * 4097)
    assert both == 2 * ours + 2 * 6_476_005_376


def test_only_writes_the_selected_implementations(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    path = tmp_path / "step.json"
    before = [{"model": m, "implementation": n} for m, n in (("tiny", "pite"), ("tiny", "x"), ("7b", "x"))]
    path.write_text(json.dumps({"environment": {}, "rows": before}))
    monkeypatch.setattr(
        step,
        "measure",
        lambda model, *rest: [step.Row(model, "pite", 1.0, 1.0, 1.0, 1.0), step.Row(model, "x", problem="no")],
    )
    monkeypatch.setattr(step, "PEERS", {**step.PEERS, "x": None})
    assert step.main(["--device", "cpu", "--only", "x", "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(r["model"], r["implementation"], r.get("problem")) for r in rows] == [
        ("tiny", "pite", None), ("7b", "x", None), ("tiny", "x", "no"),
    ]  # fmt: skip
    assert "no" in capsys.readouterr().out
    assert step.main(["--device", "cpu", "--memory", "0.001", "--output", str(path)]) == 1
    assert "measure fewer at once" in capsys.readouterr().err
