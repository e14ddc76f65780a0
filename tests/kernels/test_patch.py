"""`patch(model)` on public video-language models of transformers, tiny, with random weights, against their own code."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from pite_kernels import patch, row_index
from tests.kernels.families import (
    FAMILIES,
    MORE_FAMILIES,
    PAD,
    TEXT,
    Document,
    assert_gradients_equal,
    document,
    gradients,
    inputs_of,
    joined,
    llava_family,
)

ALL = {**FAMILIES, **MORE_FAMILIES}


def make(name: str = "LlavaNextVideo", words: Sequence[int] = (5, 9)) -> tuple[PreTrainedModel, list[Document]]:
    torch.manual_seed(0)
    family = ALL[name]()
    family.model.train()
    return family.model, [document(family, n, seed) for seed, n in enumerate(words)]


def padded(model: PreTrainedModel, documents: Sequence[Document], side: str = "right") -> dict[str, Tensor]:
    """A row for each document, as a processor of transformers makes it."""
    longest = max(len(d.labels) for d in documents)

    def pad(x: Tensor, value: int) -> Tensor:
        count = longest - x.shape[-1]
        return F.pad(x, (0, count) if side == "right" else (count, 0), value=value)

    rows = {
        name: torch.cat([pad(d.inputs[name], PAD) for d in documents]) for name in ("input_ids", "mm_token_type_ids")
    }
    others = {n: torch.cat([d.inputs[n] for d in documents]) for n in documents[0].inputs if n not in rows}
    mask = torch.cat([pad(torch.ones_like(d.inputs["input_ids"]), 0) for d in documents])
    labels = torch.stack([pad(d.labels, -100) for d in documents])
    return {**inputs_of(model, {**rows, **others}), "attention_mask": mask, "labels": labels}


def packed(model: PreTrainedModel, documents: Sequence[Document]) -> dict[str, Any]:
    """All documents in one row, with the boundaries as transformers' DataCollatorWithFlattening passes them."""
    lengths = [len(d.labels) for d in documents]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    given = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return {**joined(model, documents), "labels": torch.cat([d.labels for d in documents])[None], **given}


def one_by_one(model: PreTrainedModel, documents: Sequence[Document]) -> Tensor:
    """The model's own loss of separate documents, as a mean over all their words."""
    words = sum(int((d.labels != -100).sum()) for d in documents)
    return sum(
        (model(**inputs_of(model, d.inputs), labels=d.labels[None]).loss * (d.labels != -100).sum() / words
         for d in documents), torch.zeros(()))  # fmt: skip


@contextmanager
def raises(sentence: str) -> Iterator[None]:
    """A ValueError that is one sentence."""
    with pytest.raises(ValueError, match=sentence) as caught:
        yield
    assert str(caught.value).startswith("patch: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_equal_those_of_the_models_own_code(name: str) -> None:
    model, documents = make(name)
    rows, row = padded(model, documents), packed(model, documents)
    own = model(**rows, output_hidden_states=True)
    expected, alone = gradients(own.loss, model), one_by_one(model, documents)
    torch.testing.assert_close(alone, own.loss)
    with patch(model):
        ours = model(**rows, output_hidden_states=True)
        assert type(ours) is type(own) and ours.logits is None
        torch.testing.assert_close(ours.loss, own.loss)
        assert_gradients_equal(gradients(ours.loss, model), expected)
        real = rows["attention_mask"].bool()
        for a, b in zip(ours.hidden_states, own.hidden_states, strict=True):
            torch.testing.assert_close(a[real], b[real])
        loss = model(**row).loss
        torch.testing.assert_close(loss, alone)
        assert_gradients_equal(gradients(loss, model), expected)
    again = model(**rows, output_hidden_states=True)
    assert torch.equal(again.logits, own.logits) and torch.equal(again.loss, own.loss)
    assert any("projector" in n or "connector" in n or "visual" in n for n in expected), "no gradient reached the video"


def test_left_padding_and_rows_without_a_mask() -> None:
    model, documents = make("Qwen2VL")
    rows = padded(model, documents, "left")
    own = model(**rows).loss
    expected = gradients(own, model)
    equal = padded(model, [documents[0]] * 2)
    del equal["attention_mask"]
    alone = model(**equal).loss
    with patch(model):
        loss = model(**rows).loss
        torch.testing.assert_close(loss, own)
        assert_gradients_equal(gradients(loss, model), expected)
        torch.testing.assert_close(model(**equal).loss, alone)


def test_documents_from_positions_that_restart() -> None:
    model, documents = make()
    row = {**joined(model, documents), "labels": torch.cat([d.labels for d in documents])[None]}
    restarting = torch.cat([torch.arange(len(d.labels)) for d in documents])[None]
    alone = one_by_one(model, documents)
    mixed = model(**row).loss
    assert abs(mixed - alone) > 1e-4 * alone
    with patch(model):
        torch.testing.assert_close(model(**row, position_ids=restarting).loss, alone)
        torch.testing.assert_close(model(**row).loss, mixed)  # one document, as for the model's own code
        with torch.no_grad():  # without a cache that the caller could continue
            hidden = model.model(**joined(model, documents), position_ids=restarting).last_hidden_state
            first = model.model(**documents[0].inputs | {"mm_token_type_ids": None}).last_hidden_state
        torch.testing.assert_close(hidden[:, : first.shape[1]], first)
        with raises("neither rise by 1 nor restart"):
            model(**row, position_ids=2 * restarting)
        with raises("inside a row that attention_mask makes one document"):
            model(**row, position_ids=restarting, attention_mask=torch.ones_like(restarting))


def test_a_label_counts_within_its_document() -> None:
    model, documents = make()
    documents = [Document(d.inputs, d.inputs["input_ids"][0].clone(), d.rows, d.targets) for d in documents]
    expected = torch.cat([torch.full((len(d.labels) - 1,), 1.0) for d in documents]).sum()
    losses = [model(**inputs_of(model, d.inputs), labels=d.labels[None]).loss for d in documents]
    alone = sum(loss * (len(d.labels) - 1) for loss, d in zip(losses, documents)) / expected
    with patch(model):
        torch.testing.assert_close(model(**packed(model, documents)).loss, alone)
        for side in ("left", "right"):
            torch.testing.assert_close(model(**padded(model, documents, side)).loss, alone)


def test_options_of_the_loss() -> None:
    model, documents = make()
    rows = padded(model, documents)
    shifted = F.pad(rows["labels"], (0, 1), value=-100)[:, 1:].flatten()
    given = (shifted != -100).nonzero().flatten()
    with torch.no_grad():
        logits = model(**rows).logits.flatten(0, 1)
    smoothed = F.cross_entropy(logits, shifted, label_smoothing=0.1)
    own = model(**rows, num_items_in_batch=40).loss
    with patch(model) as handle:
        for count in (40, torch.tensor(40)):
            torch.testing.assert_close(model(**rows, num_items_in_batch=count).loss, own)
        twice = model(**rows, rows=given[[0, 0]], target_ids=shifted[given[[0, 0]]]).loss
        torch.testing.assert_close(twice, F.cross_entropy(logits[given[:1]], shifted[given[:1]]))
        found = model(**rows).loss
        torch.testing.assert_close(model(**rows, rows=given, target_ids=shifted[given]).loss, found)
        as_tuple = model(**rows, return_dict=False)
        assert torch.equal(as_tuple[0], found)
        with raises("both rows and target_ids"):
            model(**rows, rows=given)
        with raises("need labels"):
            model(rows["input_ids"], rows=given, target_ids=shifted[given])
        with raises("leave logits_to_keep out"):
            model(**rows, logits_to_keep=2)
        assert handle.label_smoothing == 0
    with patch(model, label_smoothing=0.1):
        torch.testing.assert_close(model(**rows).loss, smoothed)
        model.eval()
        with torch.no_grad():
            out = model(**rows)
        torch.testing.assert_close(out.loss, smoothed)
        real = rows["attention_mask"].flatten().bool()
        torch.testing.assert_close(out.logits.flatten(0, 1)[real], logits[real])


def test_a_shared_prefix() -> None:
    """Two answers to one question, with the prefix once: `kv_rows` reaches the layers."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).train()
    prefix, answers = torch.randint(1, 50, (6,)), [torch.randint(1, 50, (n,)) for n in (4, 7)]
    alone = [torch.cat([prefix, a])[None] for a in answers]
    labels = [torch.cat([torch.full((6,), -100), a])[None] for a in answers]
    expected = sum(model(a, labels=b).loss * (b.shape[1] - 6) for a, b in zip(alone, labels)) / 11
    grads = gradients(expected, model)
    keys = [[*range(6)], [*range(10)], [*range(6), *range(10, 17)]]
    rows = torch.tensor([5, 6, 7, 8, 5, 10, 11, 12, 13, 14, 15])
    with patch(model):
        loss = model(
            torch.cat([prefix, *answers])[None],
            labels=torch.zeros(1, 17, dtype=torch.long),
            position_ids=torch.tensor([[*range(6), *range(6, 10), *range(6, 13)]]),
            cu_seq_lens_q=torch.tensor([0, 6, 10, 17], dtype=torch.int32),
            max_length_q=7,
            kv_rows=row_index(torch.tensor([row for part in keys for row in part]), 17),
            cu_seq_lens_k=torch.tensor([0, 6, 16, 29], dtype=torch.int32),
            max_length_k=13,
            rows=rows,
            target_ids=torch.cat(answers),
        ).loss
        torch.testing.assert_close(loss, expected)
        assert_gradients_equal(gradients(loss, model), grads)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_the_boundaries(reentrant: bool) -> None:
    model, documents = make()
    rows, row = padded(model, documents), packed(model, documents)
    with patch(model):
        expected = [gradients(model(**batch).loss, model) for batch in (rows, row)]
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        losses = [model(**batch).loss for batch in (rows, row)]  # both forwards before a backward, as in DPO
        for loss, grads in zip(losses, expected):
            model.zero_grad()
            loss.backward()
            got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert_gradients_equal(got, grads)


def test_undo_restores_everything() -> None:
    model, documents = make("Qwen2_5_VL")
    configs = [model.config, model.config.text_config, model.config.vision_config]
    before = [vars(m).copy() for m in model.modules()], [vars(c).copy() for c in configs]
    handle = patch(model)
    assert model.config.text_config._attn_implementation == "pite_packed"
    assert model.config.vision_config._attn_implementation == model.config._attn_implementation == "sdpa"
    assert model.model.visual.config._attn_implementation == "sdpa"
    assert type(model).forward is transformers.Qwen2_5_VLForConditionalGeneration.forward
    model(**padded(model, documents)).loss.backward()
    with raises("patched already"):
        patch(model)
    handle.undo()
    handle.undo()
    model.zero_grad()
    model.model.rope_deltas = None  # Qwen's own
    assert [vars(c) for c in configs] == before[1]
    for module, attributes in zip(model.modules(), before[0]):
        assert vars(module).keys() == attributes.keys(), type(module)
        assert "forward" not in vars(module) and "generate" not in vars(module)
    patch(model).undo()


def test_a_copy_runs_on_its_own_parameters() -> None:
    model, documents = make()
    rows = padded(model, documents)
    expected = model(**rows).loss
    with patch(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        torch.testing.assert_close(twin(**rows).loss, expected)
        twin.model.language_model(**{"input_ids": rows["input_ids"]})


def test_generation_uses_the_models_own_attention(tmp_path: Any) -> None:
    model, documents = make()
    model.eval()
    rows = padded(model, documents, "left")
    del rows["labels"]
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    own = model.generate(**rows, **options)
    with torch.no_grad():
        logits, cached = model(**rows).logits, model(**documents[0].inputs | {"mm_token_type_ids": None})
        after = model(torch.tensor([[7]]), past_key_values=cached.past_key_values).logits
    with patch(model) as handle:
        for extra in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(**rows, **options, **extra), own)
        with torch.no_grad():
            assert torch.equal(model(**rows).logits, logits)
            cached = model(**documents[0].inputs | {"mm_token_type_ids": None})
            assert torch.equal(model(torch.tensor([[7]]), past_key_values=cached.past_key_values).logits, after)
            with raises("cu_seq_lens_q and a cache exclude each other"):
                model(**{k: v for k, v in packed(model, documents).items() if k != "labels"}, use_cache=True)
        model.save_pretrained(tmp_path)
        assert handle.active
    assert "pite" not in (tmp_path / "config.json").read_text()


def test_wrong_boundaries_are_refused() -> None:
    model, documents = make()
    row = packed(model, documents)
    with patch(model):
        with raises("either cu_seq_lens_q or attention_mask"):
            model(**row, attention_mask=torch.ones_like(row["input_ids"]))
        with raises("must rise from 0 to the number of tokens, 46"):
            model(**row | {"cu_seq_lens_q": torch.tensor([0, 21, 40], dtype=torch.int32)})
        with raises("max_length_q is 5, but a document has 25 tokens"):
            model(**row | {"max_length_q": 5})
        torch.testing.assert_close(model(**row | {"max_length_q": None}).loss, model(**row).loss)
        with raises("the batch has 2 rows"):
            model(**padded(model, documents) | {"attention_mask": None, "cu_seq_lens_q": row["cu_seq_lens_q"]})
        with raises(r"must be \(B, T\)"):
            model(**padded(model, documents) | {"attention_mask": torch.ones(2, 1, 25, 25)})
        with raises(r"attention_mask must be \(2, 25\)"):
            model(**padded(model, documents) | {"attention_mask": torch.ones(2, 20)})
        with raises("call the patched model or its text model, not a layer"):
            model.model.language_model.layers[0](torch.zeros(1, 3, 32), position_embeddings=torch.ones(2, 1, 3, 8))
        with raises("output_attentions"):
            model(**row, output_attentions=True)


def test_positions_must_not_replace_those_of_images() -> None:
    model, documents = make("Qwen2VL")
    row = packed(model, documents)
    restarting = torch.cat([torch.arange(len(d.labels)) for d in documents])[None]
    with patch(model), raises("would replace the coordinates of images"):
        model(**row, position_ids=restarting)


def small(name: str, **config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    return kind(getattr(transformers, f"{name}Config")(**{**TEXT, **config})).train()


def test_sliding_windows() -> None:
    """A window that no document reaches has no effect; a shorter one is refused."""
    family = llava_family(
        "LlavaNextVideo", lambda side: (side // 2) ** 2, dict(model_type="mistral", sliding_window=21)
    )
    model = family.model.train()
    documents = [document(family, words, words) for words in (3, 5, 6)]
    rows, longer = padded(model, documents[:2]), padded(model, documents)
    own, own_longer = model(**rows).loss, model(**longer).loss
    with patch(model):
        torch.testing.assert_close(model(**rows).loss, own)
        torch.testing.assert_close(model(**packed(model, documents[:2])).loss, own)
        with raises("sliding_window of MistralConfig is 21, but a document has 22 tokens"):
            model(**longer)
    with patch(model, attention=False):
        torch.testing.assert_close(model(**longer).loss, own_longer)


REFUSED = {
    "attn_logit_softcapping is 50.0": lambda: (small("Gemma2", head_dim=8, final_logit_softcapping=None), {}),
    "final_logit_softcapping is 30.0": lambda: (small("Gemma2", head_dim=8), {}),
    "attention sinks": lambda: (small("GptOss", head_dim=8, num_local_experts=2, num_experts_per_tok=1), {}),
    "attention_dropout is 0.1": lambda: (small("Llama", attention_dropout=0.1), {}),
    "logits_scaling is 8.0": lambda: (small("Granite", logits_scaling=8.0), {}),
    "layer_types has conv": lambda: (small("Lfm2", layer_types=["full_attention", "conv"]), {}),
    "no position_ids": lambda: (small("Mamba"), {}),
    "output_router_logits is True": lambda: (
        small("Mixtral", output_router_logits=True, num_local_experts=2), {}),
    "nothing would change": lambda: (small("Llama"), {"loss": False, "attention": False}),
    "not a model of transformers": lambda: (nn.Linear(2, 2), {}),
    "is_encoder_decoder": lambda: (
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)), {}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_models(sentence: str) -> None:
    model, options = REFUSED[sentence]()
    before = {id(m): {**vars(m)} for m in model.modules()}
    with raises(sentence):
        patch(model, **options)
    assert all(vars(m) == before[id(m)] for m in model.modules())


@pytest.mark.parametrize("name", ["Gemma3", "PaliGemma"])
def test_images_that_attend_in_both_directions(name: str) -> None:
    """The attention is refused, the loss alone is the model's own."""
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    kind, extra = {
        "Gemma3": ("gemma3_text", dict(mm_tokens_per_image=4)),
        "PaliGemma": ("gemma", dict(projection_dim=32)),
    }[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        text_config={**TEXT, "model_type": kind, "head_dim": 8},
        vision_config=dict(vision, model_type="siglip_vision_model", patch_size=8),
        image_token_id=60,
        **extra,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).train()
    for projector in model.model.multi_modal_projector.parameters():
        nn.init.normal_(projector, std=0.1)  # Gemma 3 starts with zeros, whose norm has enormous derivatives
    with raises("use_bidirectional_attention is True" if name == "PaliGemma" else "create_masks_for_vision_model"):
        patch(model)
    ids = torch.tensor([[1, 2, 60, 60, 60, 60, 3, 4, 5, 6]])
    types = (ids == 60).long() if name == "Gemma3" else (torch.arange(10) > 7).long()[None]
    batch = dict(input_ids=ids, token_type_ids=types, pixel_values=torch.randn(1, 3, 16, 16), labels=ids.clone())
    batch["labels"][:, :7] = -100
    own = model(**batch)
    expected = gradients(own.loss, model)
    with patch(model, attention=False):
        ours = model(**batch)
        torch.testing.assert_close(ours.loss, own.loss)
        assert_gradients_equal(gradients(ours.loss, model), expected)


def test_a_model_that_changes_its_logits_is_refused() -> None:
    """Also where no field of the config shows it."""

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
            logits = 2 * self.lm_head(self.model(input_ids).last_hidden_state)
            return transformers.modeling_outputs.CausalLMOutputWithPast(
                loss=self.loss_function(logits=logits, labels=labels, vocab_size=64)
            )

    model = Scaled(transformers.LlamaConfig(**TEXT))
    ids = torch.randint(1, 50, (1, 7))
    with patch(model), raises("changes its logits after lm_head"):
        model(ids, labels=ids)


def test_layers_that_mix_tokens_without_attention_are_refused() -> None:
    model = small("Llama")
    ids = torch.randint(1, 50, (1, 7))
    with patch(model):
        model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states.cumsum(1), None)
        with raises("1 of the 2 layers of LlamaModel use packed attention"):
            model(ids, labels=ids)


@pytest.mark.parametrize("name", ["LlavaNextVideo", "Qwen2_5_VL"])
def test_huggingface_trainer_in_bfloat16(name: str, tmp_path: Any) -> None:
    """Losses of the steps and of the evaluation, with the normalizer of two accumulated batches where a model takes it."""

    def losses(patched: bool) -> list[float]:
        model, _ = make(name)
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # so that losses differ by more than rounding
        documents = [document(ALL_MADE[name], words, words) for words in (4, 9, 6, 12, 5, 7, 8, 3)]
        model.config.use_cache = True
        handle = patch(model) if patched else None
        options = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, bf16=True, max_steps=2, per_device_train_batch_size=2, report_to=[],
            gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-2, optim="sgd", save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, options, train_dataset=documents, eval_dataset=documents[:3],
            data_collator=lambda rows: padded(model, rows),
        )  # fmt: skip
        trainer.train()
        found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append(trainer.evaluate()["eval_loss"])
        if handle is not None:
            handle.undo()  # accelerate has wrapped the forward since
            batch = padded(model, documents[:2])
            assert model(**batch).logits is not None
            with patch(model):
                assert model(**batch).logits is None
        return found

    ALL_MADE = {name: ALL[name]()}
    own, ours = losses(False), losses(True)
    assert max(own) - min(own) > 0.1
    torch.testing.assert_close(ours, own, rtol=4e-3, atol=0)


def test_peft_model() -> None:
    peft = pytest.importorskip("peft")
    model, documents = make("Qwen2VL")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    rows = padded(model, documents)
    own = wrapped(**rows).loss
    expected = gradients(own, wrapped)
    with patch(wrapped):
        ours = wrapped(**rows)
        assert ours.logits is None
        torch.testing.assert_close(ours.loss, own)
        assert_gradients_equal(gradients(ours.loss, wrapped), expected)
    wrapped = peft.get_peft_model(small("Llama"), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with raises("the head of LlamaForCausalLM is Linear of peft"):
        patch(wrapped)
