"""The step benchmark: which peers are timed, which weights are shared, how a failing peer is reported."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from bench.step import __main__ as step
from bench.step import peers, rows
from bench.step import problem as step_problem
from bench.step.implementations import FP8, KEPT, LOOP, OURS, PACKED, STEPS, UNSHARED, UNSLOTH, peer_bytes
from bench.step.problem import make_problem, paper_shape, tiny_shape
from engine.layout import count_parameters, memory
from engine.recipes import PAPER


@pytest.fixture(scope="module")
def problem():
    return make_problem(replace(tiny_shape(), samples=3), torch.device("cpu"), torch.float32, 4, None)


def test_a_peer_is_timed_only_if_its_loss_agrees(problem, monkeypatch: pytest.MonkeyPatch):
    def fails(problem):
        raise RuntimeError("no such kernel\nand more")

    def other(problem):
        return lambda update=True: [torch.tensor(1.0)]

    monkeypatch.setattr(rows, "STEPS", {**STEPS, "fails": fails, "other": other})
    names = "fails", "other", FP8
    for found in (rows.measure("tiny", problem, 1, names), [*rows.measure_alone("tiny", problem, 1, (OURS, *names))]):
        by_name = {row.implementation: row for row in found}
        assert by_name["fails"].problem == "RuntimeError: no such kernel"
        assert "its loss is 1.000000, ours" in by_name["other"].problem
        assert "only emulates" in by_name[FP8].problem
        assert by_name[OURS].tokens_per_second > 0


def test_alone_each_starts_from_the_same_weights(problem):
    """Ours, the loop, without sharing: the same loss, within float32. Samples share rows, so ours computes fewer."""
    problem.model.zero_grad()
    before = [parameter.clone() for parameter in problem.model.parameters()]
    found = {row.implementation: row for row in rows.measure_alone("tiny", problem, 1, (LOOP, OURS, UNSHARED, KEPT))}
    assert [row.problem for row in found.values()] == [None] * 4
    assert all(torch.equal(a, b) for a, b in zip(before, problem.model.parameters()))
    assert all(parameter.grad is None for parameter in problem.model.parameters())
    computed = {name: row.rows_per_second / row.tokens_per_second for name, row in found.items()}
    assert computed[OURS] == pytest.approx(computed[LOOP]) == pytest.approx(problem.rows / problem.tokens)
    assert computed[OURS] < computed[UNSHARED] < computed[KEPT] == 1


@pytest.mark.parametrize(("limit", "problem_of_packed"), [(3_500, None), (500, "out of memory with 3,200 tokens")])
def test_a_packed_peer_gets_smaller_micro_batches(limit, problem_of_packed, problem, monkeypatch: pytest.MonkeyPatch):
    """Half of the tokens as long as it runs out of memory; a padded one has eight samples in any case."""
    sizes = []

    def large(problem):
        sizes.append(problem.token_budget)
        if problem.token_budget > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return STEPS[OURS](problem)

    monkeypatch.setattr(rows, "STEPS", {**STEPS, PACKED: large, KEPT: large})
    roomy = replace(problem, token_budget=12_800)
    packed, padded = rows.measure_alone("tiny", roomy, 1, (PACKED, KEPT))
    assert sizes == [12_800, 6_400, 3_200, 12_800] and padded.problem == "out of memory"
    if problem_of_packed is None:
        assert packed.problem is None and packed.token_budget == 3_200
    else:
        assert packed.problem.startswith(problem_of_packed)


def test_the_estimate_has_the_shares_of_the_largest_micro_batch(problem):
    batch = max(problem.batches(), key=lambda b: b.num_rows)
    count = count_parameters(problem.model.config, PAPER[2])
    read, copied = len(batch.read_rows) / batch.num_rows, len(batch.kv_rows) / batch.num_rows - 1
    assert 0 < read < 0.9 and copied > 0
    expected = memory(problem.model.config, count, batch.num_rows, 4, read=read, copied=copied)
    assert problem.needed() == expected
    assert problem.needed(share=False).activations != expected.activations


def test_flash_attn_4_alone_is_not_flash_attn_2(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_spec("flash_attn") is not None and not peers.flash_attention_2_installed()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert peers.flash_attention_2_installed()


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
    found = {r.implementation: r for r in rows.measure("tiny", problem, 1, (UNSLOTH,))}
    assert found[UNSLOTH].problem is None, "its loss agrees with ours"
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
    ours, both = peer_bytes(config, [OURS]), peer_bytes(config, [OURS, FP8])
    assert ours == 16 * (PAPER[2].lora_rank * 2_498_560 + 600 * 4097)
    assert both == 2 * ours + 2 * 6_476_005_376


def test_only_writes_the_selected_implementations(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    path = tmp_path / "step.json"
    before = [{"model": m, "implementation": n} for m, n in (("tiny", "pite"), ("tiny", "x"), ("7b", "x"))]
    path.write_text(json.dumps({"environment": {}, "rows": before}))
    monkeypatch.setattr(
        step,
        "measure",
        lambda model, *rest: [rows.Row(model, "pite", 1.0, 1.0, 1.0, 1.0), rows.Row(model, "x", problem="no")],
    )
    monkeypatch.setattr(step, "NAMES", (*step.NAMES, "x"))
    assert step.main(["--device", "cpu", "--only", "x", "--output", str(path)]) == 0
    written = json.loads(path.read_text())["rows"]
    assert [(r["model"], r["implementation"], r.get("problem")) for r in written] == [
        ("tiny", "pite", None), ("7b", "x", None), ("tiny", "x", "no"),
    ]  # fmt: skip
    assert "no" in capsys.readouterr().out
    assert step.main(["--device", "cpu", "--memory", "0.001", "--output", str(path)]) == 1
    assert "measure fewer at once" in capsys.readouterr().err
