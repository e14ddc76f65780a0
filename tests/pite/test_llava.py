"""LLaVA-1.5 in both published layouts, and published projectors, load as the second family's model and are written as such.

The layouts are those of liuhaotian/llava-v1.5-7b and llava-hf/llava-1.5-7b-hf: names, files, and settings of the real ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pite.checkpoint import check_trained, from_pretrained, load_language_model, resolve
from pite.config import PiTeConfig
from pite.export.__main__ import main as export
from pite.export.formats import published_code_loads
from pite.llava import EDGES, EMBEDDINGS, HEAD, PROJECTOR_FILE, VideoTokenWeights, read_projector, write_projector
from pite.names import head_tensors

REFERENCE = Path(__file__).resolve().parents[1] / "golden" / "pg_reference"


SETTINGS = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "max_length": 4096,
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "pretraining_tp": 1,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
}
"""Of liuhaotian/llava-v1.5-7b, apart from its shape."""


def base_weights() -> dict[str, torch.Tensor]:
    """The reference's weights without the rows of its three tokens."""
    weights = load_file(REFERENCE / "model.safetensors")
    return weights | {name: weights[name][:-3].clone() for name in (EMBEDDINGS, HEAD)}


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """The reference's model as LLaVA-1.5 is published: torch files with an index, and its projector in a file of its own."""
    weights = base_weights()
    projector = {name: tensor for name, tensor in weights.items() if "mm_projector" in name}
    weights |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "model.vision_tower.x": torch.zeros(2)}
    files = {name: f"pytorch_model-0000{1 + (i % 2)}-of-00002.bin" for i, name in enumerate(weights)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in weights if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    torch.save(projector, tmp_path / PROJECTOR_FILE)
    config = json.loads((REFERENCE / "config.json").read_text())
    del config["mm_use_vid_start_end"]
    (tmp_path / "config.json").write_text(json.dumps(config | SETTINGS | {"vocab_size": config["vocab_size"] - 3}))
    return tmp_path


@pytest.fixture
def hub_llava(tmp_path: Path) -> Path:
    """The same model as transformers' LLaVA: sharded, with a CLIP, and with a vocabulary of more rows."""
    values, weights = json.loads((REFERENCE / "config.json").read_text()), base_weights()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    text = LlamaConfig(**{name: values[name] for name in names}, vocab_size=640, max_position_embeddings=2048)
    side = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    vision = CLIPVisionConfig(hidden_size=values["mm_hidden_size"], intermediate_size=16, **side)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=620, pad_token_id=621)
    with torch.random.fork_rng():
        model = LlavaForConditionalGeneration(config)
    language, projector = model.model.language_model.state_dict(), model.model.multi_modal_projector.state_dict()
    for name, tensor in weights.items():
        own = name.removeprefix("model.")
        if own.startswith("mm_projector."):
            projector[own.replace("mm_projector.0", "linear_1").replace("mm_projector.2", "linear_2")].copy_(tensor)
        else:
            (model.lm_head.weight.data if name == HEAD else language[own])[: len(tensor)] = tensor
    model.save_pretrained(tmp_path / "hub", max_shard_size="100kB")
    assert len(list((tmp_path / "hub").glob("model-*.safetensors"))) > 1
    return tmp_path / "hub"


SHAPE = {"family": "pg-video-llava", "num_frames": 8, "num_places": 16}


def test_both_layouts_are_the_same_base(llava: Path, hub_llava: Path) -> None:
    """Names, files, settings and the vocabulary differ; nothing else does."""
    configs = [PiTeConfig.load(path, **SHAPE) for path in (llava, hub_llava)]
    models = [load_language_model(p, c, dtype=torch.float32) for p, c in zip((llava, hub_llava), configs)]
    assert [config.llm.vocab_size for config in configs] == [623, 623]
    one, two = (dict(model.named_parameters()) for model in models)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    index = hub_llava / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    assert {"language_model.lm_head.weight", "multi_modal_projector.linear_2.bias"} <= files.keys()
    for folder in (llava, hub_llava):
        with pytest.raises(ValueError, match="train it first"):
            check_trained(folder)


def test_the_names_in_memory_are_read_too() -> None:
    """As a state dict has them, which some programs save."""
    table = torch.arange(12.0).view(6, 2)
    weights = {"model.language_model.embed_tokens.weight": table, "model.multi_modal_projector.linear_1.bias": table[0]}
    found = VideoTokenWeights(REFERENCE, {**weights, "model.vision_tower.x": table}, rows=7)
    assert list(found) == [EMBEDDINGS, "model.mm_projector.0.bias", EDGES]
    assert found[EMBEDDINGS].tolist() == [*table[:4].tolist(), *[[3.0, 4.0]] * 3]


def test_a_saved_config_has_what_the_published_code_reads(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    PiTeConfig.load(llava, **SHAPE).save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    wanted = ("mm_projector_type", "mm_hidden_size", "mm_vision_tower", "use_mm_proj", "vocab_size", "num_places")
    assert [saved[name] for name in wanted] == ["mlp2x_gelu", 48, SETTINGS["mm_vision_tower"], True, 623, 16]
    assert PiTeConfig.load(tmp_path / "saved").num_features == 24


def test_a_base_gets_three_tokens_and_keeps_its_projector(llava: Path) -> None:
    config = PiTeConfig.load(llava, **SHAPE)
    assert (config.llm.vocab_size, config.video_tokens, config.num_features) == (623, (621, 622), 24)
    assert config.vision_feature_size == 48
    model, weights = load_language_model(llava, config, dtype=torch.float32), base_weights()
    mean = weights[EMBEDDINGS].mean(0)
    torch.testing.assert_close(model.decoder.embed_tokens[-3:], mean.expand(3, -1))
    torch.testing.assert_close(model.vid_edges, mean.expand(2, -1))
    assert model.lm_head is not None
    torch.testing.assert_close(model.lm_head[-1], weights[HEAD].mean(0))
    assert torch.equal(head_tensors(model)["model.mm_projector.2.weight"], weights["model.mm_projector.2.weight"])


def test_a_base_is_not_trained_and_a_published_model_is(llava: Path) -> None:
    with pytest.raises(ValueError, match="train it first"):
        check_trained(llava)
    check_trained(REFERENCE)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', and only mlp2x_gelu is supported"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer is -1, and only -2 is supported"),
        ({"text_config": {"model_type": "mistral"}}, "the language model is 'mistral', and only Llama is supported"),
        ({"text_config": {}, "projector_hidden_act": "relu"}, "mm_projector_type is 'mlp2x_relu'"),
    ],
)
def test_another_model_is_refused(llava: Path, setting: dict[str, object], message: str) -> None:
    config = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps(config | setting))
    with pytest.raises(ValueError, match=message):
        PiTeConfig.load(llava, family="pg-video-llava")


def test_a_published_projector_file_is_written_and_read(llava: Path) -> None:
    """A folder with LLaVA-1.5 and the file computes what the published model of both does."""
    published = from_pretrained(REFERENCE)
    write_projector(llava / PROJECTOR_FILE, head_tensors(published), published.decoder.embed_tokens)
    raw = torch.load(llava / PROJECTOR_FILE, weights_only=True)
    whole = load_file(REFERENCE / "model.safetensors")
    assert raw.keys() == {EMBEDDINGS, *(name for name in whole if "mm_projector" in name)}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in raw.items())
    check_trained(resolve(llava))
    model = from_pretrained(llava)
    for name, tensor in head_tensors(published).items():
        assert torch.equal(tensor, head_tensors(model)[name]), name


def test_a_projector_that_executes_code_or_lacks_the_projector_is_refused(tmp_path: Path) -> None:
    torch.save({"model.embed_tokens.weight": torch.zeros(3, 2)}, tmp_path / PROJECTOR_FILE)
    with pytest.raises(ValueError, match=r"holds no model\.mm_projector\.0\.weight"):
        read_projector(tmp_path / PROJECTOR_FILE)
    torch.save({"model.mm_projector.0.weight": Path("x")}, tmp_path / PROJECTOR_FILE)
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_projector(tmp_path / PROJECTOR_FILE)


def test_names_are_those_of_the_parts() -> None:
    weights = {"model.vision_tower.a": torch.zeros(1), EMBEDDINGS: torch.arange(8.0).view(4, 2)}
    found = VideoTokenWeights(REFERENCE, weights, rows=7)
    assert list(found) == [EMBEDDINGS, EDGES] and len(found) == 2
    assert found[EDGES].tolist() == [[3, 4], [3, 4]]


def test_an_export_is_what_the_published_code_loads(tmp_path: Path) -> None:
    """It fills the tensors of its model from the weights, and those of the projector file over them."""
    model = tmp_path / "model"
    shutil.copytree(REFERENCE, model)
    for file in (REFERENCE / "tokenizer").iterdir():
        shutil.copyfile(file, model / file.name)
    assert export(["--model", str(model), "--output", str(tmp_path / "export"), "--dtype", "float16"]) == 0
    folder, whole = tmp_path / "export", load_file(REFERENCE / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    projector = torch.load(folder / PROJECTOR_FILE, weights_only=True)
    assert written.keys() == whole.keys() and projector.keys() < whole.keys()
    assert all(
        torch.equal(tensor.half(), whole[name].half()) for each in (written, projector) for name, tensor in each.items()
    )
    for file in (REFERENCE / "tokenizer").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert "--projection_path export/mm_projector.bin" in (folder / "README.md").read_text()
    assert torch.equal(from_pretrained(folder).vid_edges, from_pretrained(REFERENCE).vid_edges)


def test_a_tokenizer_with_tokens_of_its_own_is_not_for_the_published_code(tmp_path: Path) -> None:
    """It would give the three tokens other ids."""
    folder = tmp_path / "model"
    shutil.copytree(REFERENCE / "tokenizer", folder)
    shutil.copyfile(REFERENCE / "config.json", folder / "config.json")
    assert published_code_loads(folder)
    (folder / "added_tokens.json").write_text('{"<image>": 620}')
    assert not published_code_loads(folder)
