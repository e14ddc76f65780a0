"""`patch(model)` on public video-language models of transformers, tiny, with random weights, against their own code."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from pite_kernels import pack_batch, packed_attention, patch, row_index
from tests.fake_cuda import fake_cuda
from tests.kernels.families import (
    PAD,
    TEXT,
    Document,
    assert_gradients_equal,
    document,
    gradients,
    inputs_of,
    joined,
)
from tests.kernels.patched import ALL, make, one_by_one, packed, padded, raises, small


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_equal_those_of_the_models_own_code(name: str) -> None:
    model, documents = make(name)
    rows, row = padded(model, documents), packed(model, documents)
    own = model(**rows, output_hidden_states=True)
    expected, alone = gradients(own.loss, model), one_by_one(model, documents)
    torch.testing.assert_close(alone, own.loss)
    with patch(model) as handle:
        ours = model(**rows, output_hidden_states=True)
        assert handle.documents.count == rows["attention_mask"].sum() < rows["attention_mask"].numel()
        assert type(ours) is type(own) and ours.logits is None
        torch.testing.assert_close(ours.loss, own.loss)
        assert_gradients_equal(gradients(ours.loss, model), expected)
        real = rows["attention_mask"].bool()
        for a, b in zip(ours.hidden_states, own.hidden_states, strict=True):
            torch.testing.assert_close(a[real], b[real])
        loss = model(**row).loss
        torch.testing.assert_close(loss, alone)
        assert_gradients_equal(gradients(loss, model), expected)
        torch.testing.assert_close(model(**pack_batch(rows)).loss, alone)
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


def test_hidden_states_of_the_inner_model() -> None:
    """For a loss of the user's own. SmolVLM makes a cache, as its config demands."""
    model, documents = make("SmolVLM")
    model.model.config.use_cache = model.model.text_model.config.use_cache = True
    rows, row = padded(model, documents), packed(model, documents)
    own = model.model(**{k: v for k, v in rows.items() if k != "labels"})
    real = own.last_hidden_state[rows["attention_mask"].bool()]
    with patch(model):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                hidden = model.model(**{k: v for k, v in row.items() if k != "labels"}).last_hidden_state
                torch.testing.assert_close(hidden[0], real)
                out = model.model(**{k: v for k, v in rows.items() if k != "labels"})
                torch.testing.assert_close(out.last_hidden_state[rows["attention_mask"].bool()], real)
                assert out.past_key_values.get_seq_length() == len(documents[1].labels)


def test_coordinates_of_images_start_again_in_each_document() -> None:
    model, documents = make("Qwen2_5_VL")
    alone = [
        model.model.get_rope_index(**{k: v for k, v in d.inputs.items() if not k.startswith("pixel")})[0]
        for d in documents
    ]
    seen: list[Tensor] = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with patch(model):
        model(**packed(model, documents))
        model(**padded(model, documents, "left"))
    assert len(seen) == 2 and all(torch.equal(positions, torch.cat(alone, -1)) for positions in seen)


def test_attention_gets_the_dtype_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Varlen kernels support half precision only, and rotary embedding makes float32 of q and k."""
    model, documents = make()
    seen = []

    def recording(*tensors: Tensor, **options: Any) -> Tensor:
        seen.append([t.dtype for t in tensors[:3]])
        return packed_attention(*tensors, **options)

    monkeypatch.setattr("pite_kernels.patching.attention.packed_attention", recording)
    with patch(model), torch.autocast("cpu", torch.bfloat16):
        assert model(**padded(model, documents)).loss.dtype == torch.float32
    assert seen == [[torch.bfloat16] * 3] * 2


def test_a_packed_batch() -> None:
    model, documents = make("Qwen2VL")
    for side in ("right", "left"):
        row, expected = pack_batch(padded(model, documents, side)), packed(model, documents)
        for name in ("input_ids", "mm_token_type_ids", "pixel_values_videos", "labels", "cu_seq_lens_q"):
            assert torch.equal(row[name], expected[name])
        assert row["max_length_q"] == expected["max_length_q"] and "attention_mask" not in row
        assert torch.equal(row["labels"][0, row["rows"] + 1], row["target_ids"])
        assert len(row["rows"]) == (row["labels"] != -100).sum()
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 0, 0], [0, 0, 0]])}
    batch |= {"labels": batch["input_ids"], "attention_mask": (batch["input_ids"] > 0).int(), "position_ids": None}
    row = pack_batch(batch)
    assert row["labels"].tolist() == [[-100, 2, 3, -100]] and row["target_ids"].tolist() == [2, 3]
    assert row["cu_seq_lens_q"].tolist() == [0, 3, 4, 4]


def test_documents_that_share_a_row_stay_apart_when_a_batch_is_packed() -> None:
    model = small("Llama")
    g = torch.Generator().manual_seed(1)
    tokens = {"input_ids": torch.randint(1, 50, (1, 12), generator=g)}
    tokens["labels"] = tokens["input_ids"].clone()
    bounds = {"cu_seq_lens_q": torch.tensor([0, 7, 12], dtype=torch.int32), "max_length_q": 7}
    with patch(model):
        expected = model(**tokens, **bounds).loss
        once = pack_batch({**tokens, **bounds})
        positions = torch.tensor([[*range(7), *range(5)]])
        for batch in (once, pack_batch(once), pack_batch({**tokens, "position_ids": positions})):
            assert torch.equal(batch["cu_seq_lens_q"], bounds["cu_seq_lens_q"])
            torch.testing.assert_close(model(**batch).loss, expected)


def test_given_boundaries_and_rows_do_not_synchronize_with_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors, which have no values to read: what is found instead of given reads some."""
    with fake_cuda(monkeypatch):
        model = transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**TEXT), dtype=torch.bfloat16)
        ids, bounds = torch.ones(1, 17, dtype=torch.long), torch.ones(4, dtype=torch.int32)
        rows = torch.ones(11, dtype=torch.long)
        given: dict[str, Any] = {"cu_seq_lens_q": bounds, "max_length_q": 9}
        with patch(model):
            loss = model(ids, labels=ids, rows=rows, target_ids=rows, num_items_in_batch=40, **given).loss
            loss.backward()
            assert all(p.grad is not None for p in model.parameters())
            for fewer in ({"rows": rows, "target_ids": rows, "position_ids": ids}, given):
                with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
                    model(ids, labels=ids, **fewer)


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
            with raises("cu_seq_lens_q and past_key_values exclude each other"):
                model(**packed(model, documents), past_key_values=cached.past_key_values)
        model.save_pretrained(tmp_path)
        assert handle.active
    assert "pite" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ["LlavaNextVideo", "Qwen2_5_VL"])
def test_huggingface_trainer_in_bfloat16(name: str, tmp_path: Any) -> None:
    """Losses of the steps and of the evaluation, with the normalizer of two accumulated batches where a model takes it."""

    family = ALL[name]()

    def losses(patched: bool, collate: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> list[float]:
        model, _ = make(name)
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # so that losses differ by more than rounding
        documents = [document(family, words, words) for words in (4, 9, 6, 12, 5, 7, 8, 3)]
        handle = patch(model) if patched else None
        options = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, bf16=True, max_steps=2, per_device_train_batch_size=2, report_to=[],
            gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-2, optim="sgd", save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, options, train_dataset=documents, eval_dataset=documents[:3],
            data_collator=lambda rows: collate(padded(model, rows)),
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

    own = losses(False)
    assert len(own) == 3 and max(own) - min(own) > 0.1
    for ours in (losses(True), losses(True, pack_batch)):
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
