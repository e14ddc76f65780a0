"""The packed model against transformers and peft, and against itself with other batch splits."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from dataloaders.samples.batch import collate
from dataloaders.samples.plan import split_batch
from pite import checkpoint, names
from pite.checkpoint import from_pretrained, save_pretrained
from pite.generate import language_model
from pite.model import PiTe
from tests.samples import random_batch, random_samples, tiny_model, without_trajectories


def hf_logits(llama: LlamaForCausalLM, model: PiTe, batch) -> torch.Tensor:
    """transformers' logits, one document at a time."""
    embedded = model.embed(batch.token_ids, batch.features, batch.feature_rows)
    bounds = batch.cu_seqlens.tolist()
    return torch.cat([llama(inputs_embeds=embedded[None, a:b]).logits[0] for a, b in pairwise(bounds)])


@pytest.mark.parametrize("kv_heads, tied", [(4, False), (2, False), (1, True)])
def test_logits_are_transformers(tmp_path, kv_heads, tied):
    model = tiny_model(kv_heads, lora=False, tie_word_embeddings=tied)
    directory = tmp_path / "llama"
    language_model(model).save_pretrained(directory)
    llama = LlamaForCausalLM.from_pretrained(directory)
    loaded = checkpoint.load_language_model(directory, model.config, dtype=torch.float32)
    batch = random_batch(4, model.config)
    with torch.no_grad():
        ours = loaded.logits(loaded.hidden_states(batch, all_rows=True))
        theirs = hf_logits(llama, loaded, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
)
def test_rope_scaling_is_transformers(scaling):
    model = tiny_model(lora=False, rope_parameters={"rope_theta": 500.0, **scaling})
    batch = random_batch(3, model.config)
    with torch.no_grad():
        ours = model.logits(model.hidden_states(batch, all_rows=True))
        torch.testing.assert_close(ours, hf_logits(language_model(model), model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_unsupported_decoder_settings_are_refused(llm, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**llm)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_stage_loads_in_peft(tmp_path, kv_heads):
    model = tiny_model(kv_heads)
    base = tmp_path / "base"
    plain = tiny_model(kv_heads, lora=False)
    save_pretrained(plain, base)
    stage = tmp_path / "stage1"
    stage.mkdir()
    checkpoint.save_stage(model, stage, {"stage": 1, "language_model": str(base), "merged": []})
    peft = PeftModel.from_pretrained(language_model(plain), str(stage))
    batch = random_batch(4, model.config)
    with torch.no_grad():
        ours = model.logits(model.hidden_states(batch, all_rows=True))
        theirs = hf_logits(peft, model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    reloaded = from_pretrained(stage)
    with torch.no_grad():
        torch.testing.assert_close(reloaded.logits(reloaded.hidden_states(batch, all_rows=True)), ours, rtol=0, atol=0)


def test_peft_adapters_load_here(tmp_path):
    """The other direction: an adapter that peft wrote."""
    from peft import LoraConfig, get_peft_model

    plain = tiny_model(lora=False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(
        language_model(plain), LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    )
    peft.save_pretrained(str(tmp_path))
    checkpoint.load_lora(plain, tmp_path)
    batch = random_batch(3, plain.config)
    with torch.no_grad():
        ours = plain.logits(plain.hidden_states(batch, all_rows=True))
        torch.testing.assert_close(ours, hf_logits(peft, plain, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_stays_within_rounding(dtype):
    model = tiny_model()
    for name, tensor in names.language_model_tensors(model).items():
        if "norm" not in name:
            tensor.copy_(tensor.to(dtype))
    batch = random_batch(4, model.config)
    with torch.no_grad():
        before = model.logits(model.hidden_states(batch, all_rows=True))
        model.merge_lora()
        after = model.logits(model.hidden_states(batch, all_rows=True))
    rounding = before.abs().max() * torch.finfo(torch.bfloat16).eps
    assert (after - before).abs().max() < rounding


def test_earlier_stages_are_merged_underneath(tmp_path):
    first = tiny_model(seed=1)
    base = tmp_path / "base"
    save_pretrained(tiny_model(lora=False, seed=1), base)
    (tmp_path / "one").mkdir()
    checkpoint.save_stage(first, tmp_path / "one", {"stage": 1, "language_model": str(base), "merged": []})
    second = from_pretrained(tmp_path / "one")
    second.merge_lora()
    second.add_lora(4, 8, seed=7)
    for tensor in names.lora_tensors(second).values():
        tensor.normal_(0, 0.1)
    (tmp_path / "two").mkdir()
    lineage = {"stage": 2, "language_model": str(base), "merged": [str(tmp_path / "one")]}
    checkpoint.save_stage(second, tmp_path / "two", lineage)
    batch = random_batch(3, first.config)
    with torch.no_grad():
        loaded = from_pretrained(tmp_path / "two")
        torch.testing.assert_close(
            loaded.hidden_states(batch, all_rows=True), second.hidden_states(batch, all_rows=True), rtol=0, atol=0
        )


def test_an_altered_adapter_is_refused(tmp_path):
    base = tmp_path / "base"
    save_pretrained(tiny_model(lora=False), base)
    (tmp_path / "one").mkdir()
    checkpoint.save_stage(tiny_model(), tmp_path / "one", {"stage": 1, "language_model": str(base), "merged": []})
    file = tmp_path / "one" / checkpoint.ADAPTER_FILE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors was altered"):
        from_pretrained(tmp_path / "one")


def test_a_saved_model_loads_unchanged(tmp_path, monkeypatch):
    model = tiny_model(2)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    save_pretrained(model, tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    loaded = from_pretrained(tmp_path / "whole")
    batch = random_batch(3, model.config)
    with torch.no_grad():
        model.merge_lora()
        assert torch.equal(loaded.hidden_states(batch, all_rows=True), model.hidden_states(batch, all_rows=True))
        assert torch.equal(
            loaded.predict(torch.ones(1, 64), "trajectory"), model.predict(torch.ones(1, 64), "trajectory")
        )


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "config.json").write_text('{"model_type": "gpt2"}'), "model_type 'gpt2' is not supported"),
        (lambda d: (d / "model.safetensors").unlink(), "no model"),
        (
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace('"vocab_size": 120', '"vocab_size": 121')
            ),
            "shape",
        ),
        (
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
            ),
            "tensors are missing",
        ),
    ],
)
def test_a_broken_model_directory_is_named(tmp_path, damage, message):
    save_pretrained(tiny_model(lora=False), tmp_path / "whole")
    damage(tmp_path / "whole")
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "whole")


def losses_and_gradients(model: PiTe, batches, head):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        losses = model(batch, head=head, label_smoothing=0.1, trajectory_weight=2.0)
        losses.total.backward()
        total += losses.total.item()
    return total, {name: p.grad.clone() for name, p in model.trainable() if p.grad is not None}


@pytest.mark.parametrize("head", [None, "trajectory"])
@pytest.mark.parametrize("micro_batches", ["one per row", 1, 2, 4])
def test_packing_changes_nothing(head, micro_batches):
    model = tiny_model(2)
    samples, features = random_samples(8, model.config)
    if head is None:
        samples = [without_trajectories(s) for s in samples]
    whole = collate(samples, features)
    expected, reference = losses_and_gradients(model, [whole], head)
    lengths = [len(s.token_ids) for s in samples]
    if micro_batches == "one per row":
        bins = [[i] for i in range(8)]
    else:
        bins = [rank[0] for rank in split_batch(lengths, micro_batches, token_budget=10_000)]
    normalizers = tuple(whole.normalizers.tolist())
    cut = [collate([samples[i] for i in m], [features[i] for i in m], normalizers=normalizers) for m in bins]
    total, gradients = losses_and_gradients(model, cut, head)
    assert total == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        assert (gradient - reference[name]).norm() <= 1e-5 * reference[name].norm() + 1e-9, name


def test_the_trajectory_head_starts_as_copies_of_the_localization_head():
    """Paper eq. 9: every point and frame predicts what the localization head does."""
    model = tiny_model()
    model.initialize_trajectory_head()
    hidden = torch.randn(5, 64)
    trajectories = model.predict(hidden, "trajectory")
    assert trajectories.shape == (5, 3, 8, 2)
    torch.testing.assert_close(trajectories, model.predict(hidden, "localization").expand_as(trajectories))


def test_only_trainable_parameters_have_gradients():
    model = tiny_model()
    model.set_trainable(("trajectory_projector",))
    model(random_batch(3, model.config), head="trajectory").total.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in model.trainable()}
    assert {name.split(".")[0] for name in learning} == {"trajectory_projector", "decoder"}
    assert all("lora_" in name or name.startswith("trajectory_projector") for name in learning)


def test_a_batch_without_trajectories_gives_no_l1_and_no_nan():
    model = tiny_model()
    samples, features = random_samples(3, model.config)
    batch = collate([without_trajectories(s) for s in samples], features)
    losses = model(batch, head="trajectory")
    losses.total.backward()
    assert losses.l1.item() == 0
    assert np.isfinite(losses.total.item())
    assert all(torch.isfinite(p.grad).all() for _, p in model.trainable() if p.grad is not None)


@pytest.mark.parametrize("fp8", [False, True])
def test_compiled_layers_compute_what_plain_ones_do(monkeypatch, fp8):
    """Traced without graph breaks, one program for all layers but the first and the last. Another number of tokens compiles each
    program once more, for all lengths.
    """
    torch._dynamo.reset()
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, fullgraph: compiler(function, fullgraph=True, backend=backend)
    )
    plain, compiled = tiny_model(2, num_hidden_layers=3), tiny_model(2, num_hidden_layers=3)
    if fp8:
        plain.quantize()
        compiled.quantize()
    compiled.decoder.compile_layers()
    for count in (4, 6, 3):
        batch = random_batch(count, plain.config, seed=count)
        found = []
        for model in (plain, compiled):
            losses = model(batch, head="trajectory", label_smoothing=0.1)
            learning = [p for _, p in model.trainable()]
            found.append([losses.total.detach(), *torch.autograd.grad(losses.total, learning, allow_unused=True)])
        for ours, expected in zip(*found):
            if expected is None:
                assert ours is None
            else:
                assert (ours - expected).norm() <= 1e-5 * expected.norm() + 1e-9
    assert len(programs) == 4 * 2, (
        "before attention (in the first layer, with nothing to add; in the middle; in the last, which computes rows that are read), after it"
    )
