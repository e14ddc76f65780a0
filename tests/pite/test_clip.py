"""The frozen encoder returns CLIP's image embedding; its checksum shows whether two encoders are the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModelWithProjection, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pite.clip import ClipEncoder
from tests.clips import SIZE, save_clip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("clip")
    save_clip(directory)
    return directory


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 37, 61, 3), dtype=np.uint8)


def cropped(encoder: ClipEncoder, frames: np.ndarray) -> np.ndarray:
    return np.stack([encoder.preprocess.cropped(frame) for frame in frames])


def test_features_are_the_projected_cls_token(directory: Path, frames: np.ndarray, tmp_path: Path) -> None:
    encoder = ClipEncoder(str(directory))
    model = save_clip(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    pixels = processor(images=[Image.fromarray(f) for f in frames], return_tensors="pt")["pixel_values"]
    vision = model.vision_model
    with torch.no_grad():
        hidden = vision.encoder(vision.pre_layrnorm(vision.embeddings(pixels))).last_hidden_state
        expected = model.visual_projection(vision.post_layernorm(hidden[:, 0]))
    features = encoder.encode(cropped(encoder, frames))
    assert features.shape == (5, encoder.channels) == (5, 16) and features.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert (features.norm(dim=-1) - 1).abs().min() > 1e-3, "not normalised"


def test_last_layer_computes_only_the_cls_token(directory: Path, frames: np.ndarray) -> None:
    encoder = ClipEncoder(str(directory))
    rows: list[int] = []
    for layer in encoder.model.vision_model.encoder.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[1]))
    features = encoder.encode(cropped(encoder, frames))
    assert rows == [17, 1]
    pixels = encoder.preprocess.normalized(torch.from_numpy(cropped(encoder, frames)))
    torch.testing.assert_close(features, encoder.model(pixel_values=pixels).image_embeds, atol=1e-5, rtol=0)


def test_no_graph_break(directory: Path, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the whole forward pass, normalisation included, is compiled as one graph."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", **options))
    compiled, plain = (ClipEncoder(str(directory), compiled=c) for c in (True, False))
    assert torch.equal(compiled.encode(cropped(plain, frames)), plain.encode(cropped(plain, frames)))
    assert torch.equal(plain.encode(torch.from_numpy(cropped(plain, frames))), plain.encode(cropped(plain, frames)))


def test_frame_flops_match_the_flop_counter(directory: Path) -> None:
    encoder = ClipEncoder(str(directory))
    counter = FlopCounterMode(display=False)
    # The FLOP counter supports plain attention on every device.
    with counter, sdpa_kernel(SDPBackend.MATH):
        encoder.encode(np.zeros((3, SIZE, SIZE, 3), np.uint8))
    assert counter.get_total_flops() == pytest.approx(3 * encoder.flops_per_frame)


def test_vision_tower_saved_alone_is_the_same_encoder(directory: Path, frames: np.ndarray, tmp_path: Path) -> None:
    whole = ClipEncoder(str(directory))
    CLIPVisionModelWithProjection.save_pretrained(whole.model, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text((directory / "preprocessor_config.json").read_text())
    alone = ClipEncoder(str(tmp_path))
    assert alone.checksum == whole.checksum
    assert torch.equal(alone.encode(cropped(alone, frames)), whole.encode(cropped(whole, frames)))


def test_checksum_depends_on_weights_and_activation(directory: Path, tmp_path: Path) -> None:
    checksum = ClipEncoder(str(directory)).checksum
    save_clip(tmp_path)
    assert ClipEncoder(str(tmp_path)).checksum == checksum
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ClipEncoder(str(tmp_path)).checksum != checksum
    save_clip(tmp_path, seed=1)
    assert ClipEncoder(str(tmp_path)).checksum != checksum


def test_frozen(directory: Path) -> None:
    model = ClipEncoder(str(directory)).model
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers and continue."""
    save_clip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"is not a CLIP vision tower: it lacks visual_projection\.weight"):
        ClipEncoder(str(tmp_path))


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files_are_the_same_encoder(directory: Path, tmp_path: Path, archive: bool, shards: int) -> None:
    """Old CLIP checkpoints have only torch files, which also hold position ids; the oldest format cannot be mapped."""
    whole = {**save_clip(tmp_path).state_dict(), "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    (tmp_path / "model.safetensors").unlink()
    names = sorted(whole)
    for i in range(shards):
        file = tmp_path / ("pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin")
        part = {name: whole[name].clone() for name in names[i::shards]}
        torch.save(part, file, _use_new_zipfile_serialization=archive)
    encoder = ClipEncoder(str(tmp_path))
    assert encoder.checksum == ClipEncoder(str(directory)).checksum


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    whole = {name: tensor.half() for name, tensor in save_clip(tmp_path).state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(whole, tmp_path / "pytorch_model.bin")
    weight = ClipEncoder(str(tmp_path)).model.visual_projection.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, whole["visual_projection.weight"].float())


class _Code:
    """A pickle that runs code when it is read."""

    def __reduce__(self) -> tuple:
        return (print, ("a pickle ran",))


@pytest.mark.parametrize("content", [{"visual_projection.weight": _Code()}, [torch.zeros(1)], b"junk"])
def test_other_torch_files_are_refused(tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]) -> None:
    save_clip(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read: .") as caught:
        ClipEncoder(str(tmp_path))
    assert "\n" not in str(caught.value) and "a pickle ran" not in capsys.readouterr().out


def test_missing_weights_or_wrong_shapes_are_refused(tmp_path: Path) -> None:
    save_clip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["patch_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is not a CLIP model of the shape in its config\.json"):
        ClipEncoder(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\*\.safetensors and no \*\.bin weights"):
        ClipEncoder(str(tmp_path))


def test_other_models_are_refused(tmp_path: Path) -> None:
    save_clip(tmp_path)
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not a CLIP model"):
        ClipEncoder(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_attention_heads": 3},
            "is not a CLIP configuration: The hidden size (32) is not a multiple of the number of",
        ),
        ({"hidden_size": "32"}, "is not a CLIP configuration: Field 'hidden_size' expected int, got str (value: '32')"),
    ],
)
def test_a_broken_configuration_is_one_whole_sentence(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    save_clip(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "vision_config": {**values["vision_config"], **fields}}))
    with pytest.raises(ValueError, match=re.escape(f"{path} {message}")) as caught:
        ClipEncoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_crop_size_must_fit_the_model(tmp_path: Path) -> None:
    save_clip(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its model takes 32 pixels, but its preprocessor_config\.json crops 64"):
        ClipEncoder(str(tmp_path))


def test_unknown_folder_or_name_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "no/such/clip")
    with pytest.raises(
        ValueError, match=r"neither a directory nor a Hugging Face model name|could not be downloaded"
    ) as caught:
        ClipEncoder(missing)
    assert str(caught.value).startswith(missing) and "\n" not in str(caught.value)
