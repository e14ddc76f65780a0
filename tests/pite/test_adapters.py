"""PEFT adapters: plain LoRA gives PEFT's own logits; any other kind is refused, naming the field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pite import adapters, checkpoint
from pite.generate import language_model
from tests.pite.test_model import hf_logits
from tests.samples import random_batch, tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 2


def write(directory: Path, **fields: Any) -> Path:
    """An adapter_config.json as PEFT writes it, with some fields replaced; Ellipsis removes one."""
    LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS).save_pretrained(str(directory))
    path = directory / adapters.CONFIG
    content = {name: value for name, value in {**json.loads(path.read_text()), **fields}.items() if value is not ...}
    path.write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_initialisations_match_peft_or_are_refused(tmp_path: Path, start: bool | str) -> None:
    """Against PEFT itself: its slightly trained adapter, and its logits."""
    plain = tiny_model(lora=False)
    configuration = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=start)
    # PEFT shares the weights with the model, and an initialisation may change them.
    peft = get_peft_model(language_model(tiny_model(lora=False)), configuration)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    peft.save_pretrained(str(tmp_path))
    if isinstance(start, str) and start.startswith(("pissa", "olora")):
        with pytest.raises(ValueError, match=rf"adapter_config\.json: init_lora_weights '{start}' is not supported"):
            checkpoint.load_lora(plain, tmp_path)
        return
    checkpoint.load_lora(plain, tmp_path)
    batch = random_batch(3, plain.config)
    with torch.no_grad():
        ours = plain.logits(plain.hidden_states(batch, all_rows=True))
        torch.testing.assert_close(ours, hf_logits(peft, plain, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("exclude_modules", ["q_proj"]),
        ("layers_to_transform", 0),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["mlp.experts"]),
        ("alora_invocation_tokens", [3, 4]),
        ("megatron_config", {"a": 1}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"a": 1}),
        ("velora_config", {"a": 1}),
        ("monteclora_config", {"a": 1}),
        ("use_bdlora", {"a": 1}),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "of next year"),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("a_field_of_next_year", 1),
    ],
)
def test_anything_but_plain_lora_is_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {name} .* only plain LoRA is") as caught:
        adapters.plain_lora(write(tmp_path, **{name: value}), LAYERS)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers_to_transform", [*range(LAYERS)]),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", ...),
        ("bias", ...),
        ("peft_type", ...),
        ("modules_to_save", []),
        ("loftq_config", None),
        ("lora_dropout", 0.1),
        ("enable_lora", None),
        ("merge_weights", False),
        ("base_model_name_or_path", "somewhere/else"),
    ],
)
def test_fields_without_effect_are_accepted(tmp_path: Path, name: str, value: object) -> None:
    assert adapters.plain_lora(write(tmp_path, **{name: value}), LAYERS) == (4, 8)


def test_every_field_of_this_peft_is_either_without_effect_or_refused(tmp_path: Path) -> None:
    for field in dataclasses.fields(LoraConfig):
        if field.name in adapters._WITHOUT_EFFECT or field.name == "runtime_config":
            continue
        with pytest.raises(ValueError, match=f"{field.name} 'other' is not supported"):
            adapters.plain_lora(write(tmp_path, **{field.name: "other"}), LAYERS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": ...}, "r must be a whole number of at least 1, not None"),
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": "4"}, "r must be a whole number of at least 1, not '4'"),
        ({"r": True}, "r must be a whole number of at least 1, not True"),
        ({"lora_alpha": ...}, "lora_alpha must be a number, not None"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, not '8'"),
    ],
)
def test_rank_and_alpha_are_needed(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}$"):
        adapters.plain_lora(write(tmp_path, **fields), LAYERS)
