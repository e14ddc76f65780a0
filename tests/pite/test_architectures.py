"""Llama, Mistral, Qwen2 and Qwen3 against transformers and PEFT, with random weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, DynamicCache

from dataloaders.samples.batch import collate
from engine.prepare import check_tokens
from pite import checkpoint, names
from pite.architectures import ARCHITECTURES
from pite.checkpoint import from_pretrained, save_pretrained
from pite.config import PiTeConfig
from pite.generate import frozen_language_model, language_model
from pite.model import PiTe
from tests.operators import Operators
from tests.pite.test_model import hf_logits
from tests.samples import random_batch, related_samples, tiny_config, tiny_model

EVERY = sorted(ARCHITECTURES)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {"default": {"rope_type": "default"}, "linear": {"rope_type": "linear", "factor": 4.0}, "yarn": YARN}


def logits(model: PiTe, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden_states(batch, all_rows=True))


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_of_a_saved_model_are_transformers(tmp_path: Path, kind: str, tied: bool) -> None:
    """transformers builds and saves the model; head_dim times heads is not the hidden size, as in Qwen3."""
    shape = {"head_dim": 24} if kind in ("qwen3", "mistral", "llama") else {}
    plain = tiny_model(2, lora=False, architecture=kind, tie_word_embeddings=tied, **shape)
    frozen_language_model(plain).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == ARCHITECTURES[kind].model
    ours = checkpoint.load_language_model(tmp_path, plain.config, dtype=torch.float32)
    batch = random_batch(4, ours.config)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, batch), hf_logits(theirs, ours, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("rope", [*ROPES.values(), LLAMA3], ids=[*ROPES, "llama3"])
def test_every_rope_scaling_is_transformers(kind: str, rope: dict[str, Any]) -> None:
    plain = tiny_model(
        2, lora=False, architecture=kind, max_position_embeddings=128, rope_parameters={"rope_theta": 500.0, **rope}
    )
    batch = random_batch(3, plain.config)
    theirs = getattr(transformers, plain.config.architecture.model)(plain.config.llm).eval()
    theirs.load_state_dict(names.language_model_tensors(plain))  # its own rotary embedding
    with torch.no_grad():
        torch.testing.assert_close(logits(plain, batch), hf_logits(theirs, plain, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EVERY)
def test_weights_of_every_kind_change_the_logits(kind: str) -> None:
    """The tests above cannot pass because a bias or a norm is neutral."""
    model = tiny_model(2, lora=False, architecture=kind)
    batch = random_batch(2, model.config)
    before = logits(model, batch)
    added = [n for n in names.language_model_tensors(model) if n.endswith((".bias", "q_norm.weight", "k_norm.weight"))]
    assert len(added) == {"qwen2": 6, "qwen3": 4}.get(kind, 0)
    for name in added:
        if "k_proj" in name:  # softmax removes most of k's bias
            continue
        tensor = names.language_model_tensors(model)[name]
        whole = tensor.clone()
        tensor.mul_(1.5)
        assert (logits(model, batch) - before).abs().max() > 1e-3, name
        tensor.copy_(whole)


@pytest.mark.parametrize("kind", EVERY)
def test_what_samples_share_changes_nothing(kind: str) -> None:
    """Rotated and gathered k, and the last layer's read rows, with biases and norms."""
    model = tiny_model(2, architecture=kind)
    samples = related_samples(2, 2, model.config)
    found = []
    for share in (False, True):
        model.zero_grad()
        losses = model(collate(*samples, share=share), head="trajectory", label_smoothing=0.1)
        losses.total.backward()
        found.append((losses.total.detach(), {n: p.grad for n, p in model.trainable() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_compiled_layers_have_no_graph_break(kind: str) -> None:
    torch._dynamo.reset()
    plain, compiled = tiny_model(2, architecture=kind), tiny_model(2, architecture=kind)
    for layer in compiled.decoder.layers:
        layer._before = torch.compile(layer._before, fullgraph=True, backend="aot_eager")
        layer._after = torch.compile(layer._after, fullgraph=True, backend="aot_eager")
    batch = collate(*related_samples(2, 2, plain.config), share=True)
    found = []
    for model in (compiled, plain):
        model(batch, head="trajectory").total.backward()
        found.append({name: p.grad for name, p in model.trainable() if p.grad is not None})
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", EVERY)
def test_activation_checkpointing_and_float8(kind: str) -> None:
    exact, rounded = tiny_model(2, architecture=kind), tiny_model(2, architecture=kind)
    exact.decoder.checkpoint_activations(2)
    rounded.quantize()
    assert all(linear.bias is None or linear.bias.dtype == torch.float32 for linear in rounded.linear_layers())
    batch = random_batch(4, exact.config)
    losses, gradients = [], []
    for model in (exact, rounded):
        loss = model(batch, head="trajectory").total
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.trainable() if "lora_" in n]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("kind", EVERY)
def test_training_is_pefts_for_twenty_steps(kind: str) -> None:
    ours = tiny_model(2, lora=False, architecture=kind)
    peft = get_peft_model(
        frozen_language_model(tiny_model(2, lora=False, architecture=kind)),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.0),
    )
    ours.add_lora(4, 8, seed=1)
    start = {name: tensor.clone() for name, tensor in names.lora_tensors(ours).items()}
    assert not set_peft_model_state_dict(peft, start).unexpected_keys
    ours.set_trainable(())
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
        for model in (ours, peft)
    ]
    losses: list[list[float]] = [[], []]
    for step in range(20):
        batch = random_batch(4, ours.config, seed=step % 5)
        expected = hf_logits(peft, ours, batch)[batch.read_rows[batch.target_rows]]
        for i, loss in enumerate((ours(batch).total, F.cross_entropy(expected, batch.target_ids))):
            optimizers[i].zero_grad()
            loss.backward()
            optimizers[i].step()
            losses[i].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.parametrize("kind", EVERY)
def test_save_load_merge_and_peft_in_both_directions(tmp_path: Path, kind: str) -> None:
    model, plain = tiny_model(2, architecture=kind), tiny_model(2, lora=False, architecture=kind)
    batch = random_batch(4, model.config)
    trained = logits(model, batch)
    save_pretrained(plain, tmp_path / "base")
    (tmp_path / "stage1").mkdir()
    lineage = {"stage": 1, "language_model": str(tmp_path / "base"), "merged": []}
    checkpoint.save_stage(model, tmp_path / "stage1", lineage)
    assert torch.equal(logits(from_pretrained(tmp_path / "stage1"), batch), trained)

    peft = PeftModel.from_pretrained(frozen_language_model(plain), str(tmp_path / "stage1"))
    with torch.no_grad():
        torch.testing.assert_close(hf_logits(peft, model, batch), trained, rtol=1e-4, atol=1e-4)
    peft.save_pretrained(str(tmp_path / "again"))
    back = tiny_model(2, lora=False, architecture=kind)
    checkpoint.load_lora(back, tmp_path / "again")
    torch.testing.assert_close(logits(back, batch), trained, rtol=1e-5, atol=1e-5)

    save_pretrained(model, tmp_path / "whole")
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "whole"), batch), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EVERY)
def test_generation_is_transformers_greedy(tmp_path: Path, kind: str) -> None:
    """With the LoRA apart, against transformers' own model with merged weights; step by step with our head's rows."""
    model = tiny_model(2, architecture=kind, max_position_embeddings=128)
    save_pretrained(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    embedded = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3)) * 0.1
    found = [
        each.generate(inputs_embeds=embedded, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
        for each in (language_model(model), theirs)
    ]
    assert found[0].tolist() == found[1].tolist() and found[0].shape == (2, 20)


def test_a_sliding_window_bounds_the_samples() -> None:
    """Up to its length, attention within the window is attention over everything; beyond, transformers' logits differ."""
    config: PiTeConfig = tiny_config(architecture="mistral", sliding_window=24, max_position_embeddings=128)
    model = checkpoint.random_model(config, dtype=torch.float32)
    theirs = transformers.MistralForCausalLM(config.llm).eval()
    theirs.load_state_dict(names.language_model_tensors(model))
    own = frozen_language_model(model)
    assert config.context_length == 24
    for length, equal in ((24, True), (40, False)):
        embedded = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0)) * 0.1
        with torch.no_grad():
            whole, windowed = own(inputs_embeds=embedded).logits, theirs(inputs_embeds=embedded).logits
        assert torch.allclose(whole, windowed, rtol=1e-4, atol=1e-4) == equal
    assert config.beyond_context(24) is None
    assert "25 tokens is longer than the 24 positions of the language model's sliding window" in str(
        config.beyond_context(25)
    )


class Samples:
    """What `check_tokens` reads of a data set."""

    ids, tokens, largest_tokens = ["a", "b"], np.array([20, 25]), np.array([5, 6])


def test_samples_beyond_a_sliding_window_are_refused_before_training() -> None:
    config = tiny_config(architecture="mistral", sliding_window=24)
    with pytest.raises(ValueError, match=r"longest sample \('b'\) has 25 tokens, .*--max-length 24 leaves"):
        check_tokens(Samples(), None, config)  # type: ignore[arg-type]
    check_tokens(Samples(), None, tiny_config(architecture="mistral", sliding_window=25))  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "whole"])
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_a_window_in_the_configuration_does_not_shorten_the_cache(kind: str, cache: bool) -> None:
    window = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1}
    model = tiny_model(2, lora=False, architecture=kind, max_position_embeddings=128, **window)
    assert model.config.context_length == 12
    llama = frozen_language_model(model)
    embedded = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        whole = llama(inputs_embeds=embedded).logits[:, -1]
        if cache:
            past = DynamicCache(config=llama.config)
            llama(inputs_embeds=embedded[:, :19], past_key_values=past, use_cache=True)
            last = llama(inputs_embeds=embedded[:, 19:], past_key_values=past, use_cache=True).logits[:, -1]
            torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-4)


DISPATCHED = 734, "c3230a10cbfa9013"
"""Operators of a step of two layers, and a checksum of their names in order, at commit 7f7d239."""


def test_the_llama_path_dispatches_the_operators_of_before() -> None:
    """Counted before other architectures were there: absent biases and norms cost nothing."""
    model = tiny_model(2)
    batch = collate(*related_samples(2, 2, model.config), share=True)
    for _ in range(2):  # the first call plans the batches of SDPA
        with Operators() as operators:
            model(batch, head="trajectory", label_smoothing=0.1).total.backward()
    checksum = hashlib.sha256(" ".join(operators.names).encode()).hexdigest()[:16]
    assert (len(operators.names), checksum) == DISPATCHED
