"""config.json of a language model: unsupported settings and broken files are refused, naming the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pite import checkpoint
from pite.checkpoint import from_pretrained, save_pretrained
from pite.config import PiTeConfig
from pite.generate import language_model
from tests.pite.test_model import hf_logits
from tests.samples import random_batch, tiny_config, tiny_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 1\n"


def change(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_pytorch_tanh' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}}, "longrope"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "proportional"}},
            "type 'proportional' are not supported",
        ),
        ({"attention_chunk_size": 64}, "attention_chunk_size 64 is not supported"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has sliding_attention, and sliding_window",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types other than full_attention"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights are not supported"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key and value heads"),
        ({"num_frames": "8"}, "num_frames must be a whole number of at least 1, not '8'"),
        ({"num_points": 0}, "num_points must be a whole number of at least 1, not 0"),
        ({"hidden_size": "wide"}, "is not a valid Llama configuration: .*hidden_size"),
        ({"vocab_size": None}, "is not a valid Llama configuration: .*vocab_size"),
        ({"num_attention_heads": 0, "head_dim": None}, "is not a valid Llama configuration"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "is not a valid Llama configuration"),
        (
            {"model_type": "gemma2"},
            "model_type 'gemma2' is not supported: the decoder computes llama, mistral, qwen2, qwen3",
        ),
        ({"model_type": ["llama"]}, "model_type .* is not supported"),
    ],
)
def test_unsupported_settings_are_refused_in_one_sentence(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    save_pretrained(tiny_model(lora=False), tmp_path)
    path = change(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(tmp_path)
    assert str(caught.value).startswith(f"{path}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "swish"},
        {"pretraining_tp": 2},
        {"sliding_window": None},
        {"sliding_window": 64, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 2},
        {"partial_rotary_factor": 1.0},
        {"quantization_config": None},
        {"pad_token_id": 120},
    ],
)
def test_settings_without_effect_give_transformers_logits(tmp_path: Path, fields: dict[str, Any]) -> None:
    save_pretrained(tiny_model(lora=False), tmp_path)
    change(tmp_path, **fields)
    model = from_pretrained(tmp_path)
    batch = random_batch(3, model.config)
    with torch.no_grad():
        ours = model.logits(model.hidden_states(batch, all_rows=True))
        torch.testing.assert_close(ours, hf_logits(language_model(model), model, batch), rtol=1e-4, atol=1e-4)


BROKEN = {
    "[]": "holds a JSON list where an object is expected",
    "null": "holds a JSON NoneType where an object is expected",
    '{"r": ': "is not valid JSON",
    "": "is empty: fetch it again",
    "<html>404</html>": "is not valid JSON",
    "[" * 100_000: "is not valid JSON",
    "\udcff": "is not valid JSON",
    LFS: "is a git-lfs pointer, not the file itself: run git lfs pull",
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage's output next to its language model."""
    root = tmp_path_factory.mktemp("root")
    save_pretrained(tiny_model(lora=False), root / "base")
    (root / "one").mkdir()
    checkpoint.save_stage(tiny_model(), root / "one", {"stage": 1, "language_model": f"{root}/base", "merged": []})
    return root / "one"


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "lineage.json"])
def test_a_broken_json_file_is_named(stage: Path, name: str, content: str) -> None:
    path = stage / name
    whole = path.read_bytes()
    try:
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=BROKEN[content]) as caught:
            from_pretrained(stage)
    finally:
        path.write_bytes(whole)
    assert str(caught.value).startswith(f"{path} ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "lineage.json"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_directory_or_link_in_place_of_a_file_is_named(stage: Path, name: str, make: Any) -> None:
    path = stage / name
    whole = path.read_bytes()
    path.unlink()
    try:
        make(path)
        with pytest.raises(ValueError, match=f"{path} is no regular file"):
            from_pretrained(stage)
    finally:
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "changed",
    [{"stage": "1"}, {"merged": ["one"]}, {"merged": [{"path": "one"}]}, {"files": []}, {"language_model": 3}],
)
def test_incomplete_lineage_is_named(stage: Path, changed: dict[str, Any]) -> None:
    path = stage / checkpoint.LINEAGE
    whole = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(whole), **changed}))
        with pytest.raises(ValueError, match=r"lineage\.json is damaged"):
            from_pretrained(stage)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pite.safetensors"])
def test_git_lfs_pointer_in_place_of_weights_is_named(stage: Path, name: str) -> None:
    path = stage / name
    whole = path.read_bytes()
    try:
        path.write_text(LFS)
        with pytest.raises(ValueError, match=f"{path} is a git-lfs pointer"):
            from_pretrained(stage)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("llm", "length"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 256),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
                }
            },
            256,
        ),
    ],
)  # fmt: skip
def test_context_length_includes_rope_scaling(llm: dict[str, Any], length: int) -> None:
    config: PiTeConfig = tiny_config(**{"max_position_embeddings": 64, **llm})
    assert config.context_length == length
    assert config.beyond_context(length) is None
    assert f"{length + 1:,} tokens is longer than the {length:,} positions" in str(config.beyond_context(length + 1))
