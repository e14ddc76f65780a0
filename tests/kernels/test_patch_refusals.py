"""What `patch(model)` refuses, in one sentence, instead of computing something else in silence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from pite_kernels import pack_batch, patch
from tests.kernels.families import TEXT, assert_gradients_equal, document, gradients, joined, llava_family
from tests.kernels.patched import make, packed, padded, raises, small


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
        numbered = torch.cat([torch.full((1, len(d.labels)), n) for n, d in enumerate(documents, 1)], 1)
        with raises("attention_mask must be 0 or 1"):
            model(**joined(model, documents), labels=row["labels"], attention_mask=numbered)
        rows = padded(model, documents)
        rows["attention_mask"][1, 18] = 0
        with raises("zeros between the tokens of a row"):
            model(**rows)
        with raises("got no document boundaries: its model does not pass them on, it was called by itself"):
            model.model.language_model.layers[0](torch.zeros(1, 3, 32), position_embeddings=torch.ones(2, 1, 3, 8))
        with raises("output_attentions"):
            model(**row, output_attentions=True)
        rising = torch.arange(46)[None]
        with raises("do not restart at 0 exactly where cu_seq_lens_q begins a document"):
            model(**row | {"position_ids": rising})
        with raises("do not restart at 0 exactly where"):
            whole = {"cu_seq_lens_q": torch.tensor([0, 46], dtype=torch.int32), "max_length_q": 46}
            model(**row | whole | {"position_ids": torch.cat([torch.arange(len(d.labels)) for d in documents])[None]})


def test_boundaries_need_packed_attention() -> None:
    model, documents = make()
    with patch(model, attention=False):
        with raises("does not read cu_seq_lens_q"):
            model(**packed(model, documents))
        model(**padded(model, documents))


def test_a_lora_on_the_head_after_patching_is_refused() -> None:
    model, documents = make()
    with patch(model):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
        with raises("the head of .* is Linear of peft"):
            model(**padded(model, documents))


def test_positions_with_an_offset_are_refused() -> None:
    shape = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    options = dict(is_decoder=True, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    model = transformers.RobertaForCausalLM(transformers.RobertaConfig(**shape, **options))
    with raises("derives positions from input_ids"):
        patch(model)


def test_positions_must_not_replace_those_of_images() -> None:
    model, documents = make("Qwen2VL")
    row = packed(model, documents)
    restarting = torch.cat([torch.arange(len(d.labels)) for d in documents])[None]
    with patch(model), raises("would replace the coordinates of images"):
        model(**row, position_ids=restarting)


def test_videos_without_a_token_between_them() -> None:
    """In one document, and where two documents meet in a packed row."""
    model, documents = make("Qwen2VL")
    row = packed(model, documents)
    video = int((row["mm_token_type_ids"][0] == 2).sum()) // 2
    start = 46 - 25
    row["mm_token_type_ids"] = torch.zeros_like(row["mm_token_type_ids"])
    row["mm_token_type_ids"][0, start - video : start + video] = 2
    with (
        patch(model),
        raises("no token separates some of the 2 videos, so Qwen2VLForConditionalGeneration cannot"),
    ):
        model(**row)


def test_a_trainer_that_smooths_labels_itself_is_refused(tmp_path: Path) -> None:
    model = small("Llama")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 50, (2, 7))]
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    with patch(model), raises("as from a Trainer with label_smoothing_factor"):
        transformers.Trainer(model, options, train_dataset=rows).train()


WRONG_BATCHES = [
    ({"input_ids": None}, "a mapping with input_ids"),
    ({"input_ids": [[1, 2]]}, "input_ids is a list; let the collator return tensors"),
    ({"input_ids": torch.ones(2, 3)}, "input_ids must be integers, not torch.float32"),
    ({"input_ids": torch.ones(3, dtype=torch.long)}, r"input_ids must be \(B, T\) with at least one token, not \(3,\)"),
    ({"input_ids": torch.ones(0, 3, dtype=torch.long)}, "at least one token"),
    ({"labels": torch.ones(2, 4, dtype=torch.long)}, r"labels must be \(2, 3\) as input_ids, not \(2, 4\)"),
    ({"labels": [[1, 2, 3]] * 2}, "labels is a list"),
    ({"attention_mask": torch.ones(2, 1, 3, 3, dtype=torch.long)}, r"attention_mask must be \(2, 3\)"),
    ({"position_ids": torch.zeros(2, 4, dtype=torch.long)}, r"position_ids must end in \(2, 3\)"),
    ({"cu_seq_lens_q": [0, 3]}, "cu_seq_lens_q is a list"),
    ({"cu_seq_lens_q": torch.tensor([0, 3])}, "the batch has 2 rows"),
    ({"max_length_q": "3"}, "max_length_q must be an integer, not '3'"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG_BATCHES)
def test_wrong_batches_are_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with raises(sentence):
        pack_batch({"input_ids": torch.ones(2, 3, dtype=torch.long)} | change)


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
    "attention_probs_dropout_prob is 0.1": lambda: (small("BioGpt"), {}),
    "NemotronDecoderLayer does not pass cu_seq_lens_q on": lambda: (small("Nemotron"), {}),
    "StableLmDecoderLayer does not pass cu_seq_lens_q on": lambda: (small("StableLm"), {}),
    "DogeAttention makes attention masks of its own": lambda: (small("Doge"), {}),
    "the values of DeepseekV3Model are 128 wide": lambda: (small("DeepseekV3", n_routed_experts=2, n_group=1, topk_group=1), {}),
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
        model.set_attn_implementation("sdpa")
        with raises("0 of the 2 layers of LlamaModel use packed attention"):
            model(ids, labels=ids)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with raises("needs the package transformers"):
        patch(nn.Linear(2, 2))
