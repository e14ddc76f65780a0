"""Preprocess gives the same numbers as Hugging Face's CLIPImageProcessor on Pillow, for awkward sizes too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dataloaders.decode import preprocess as preprocessing
from dataloaders.decode.preprocess import Preprocess

SIZES = [
    (224, 224),
    (240, 320),
    (333, 251),
    (480, 640),
    (97, 1001),
    (31, 17),
    (225, 224),
    (719, 1279),
    (1, 1),
    (64, 500),
]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("resize", "crop"), [(224, 224), (64, 64), (72, 63)])
def test_equals_the_reference(height: int, width: int, resize: int, crop: int) -> None:
    frame = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    reference = CLIPImageProcessorPil(size={"shortest_edge": resize}, crop_size={"height": crop, "width": crop})
    expected = reference(images=[Image.fromarray(frame)], return_tensors="pt")["pixel_values"]
    preprocess = Preprocess(resize, crop)
    cropped = preprocess.cropped(frame)
    assert cropped.shape == (crop, crop, 3) and cropped.dtype == np.uint8
    ours = preprocess.normalized(torch.from_numpy(cropped)[None])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "difference"), [("float32", 1), ("float16", 2)])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (700, 230), (2000, 18)])
def test_cropped_batch(height: int, width: int, dtype: str, difference: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On white noise, and on noise of black and white only. A GPU computes in half precision."""
    monkeypatch.setattr(preprocessing, "ARITHMETIC", {"cpu": dtype})
    monkeypatch.setattr(preprocessing, "_PART", 2 * 3 * height * width)
    noise = np.random.default_rng(height).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    frames = np.stack([*noise[:2], (noise[2] > 127) * np.uint8(255)])
    for preprocess in (Preprocess(64, 64), Preprocess(72, 63)):
        ours = preprocess.cropped_batch(torch.from_numpy(frames))
        assert ours.dtype == torch.uint8 and ours.is_contiguous()
        expected = np.stack([preprocess.cropped(frame) for frame in frames])
        assert np.abs(ours.numpy().astype(int) - expected).max() <= difference


def test_load_reads_what_transformers_writes(tmp_path: Path) -> None:
    reference = CLIPImageProcessorPil(
        size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}, image_mean=[0.1, 0.2, 0.3]
    )
    reference.save_pretrained(tmp_path)
    loaded = Preprocess.load(tmp_path)
    assert loaded == Preprocess(72, 64, mean=(0.1, 0.2, 0.3))
    assert loaded.describe() != Preprocess(72, 64).describe()


def test_load_reads_openai_clip(tmp_path: Path) -> None:
    """The file of openai/clip-vit-large-patch14 gives sizes as plain numbers."""
    values = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    values |= {"image_mean": list(Preprocess.mean), "image_std": list(Preprocess.std), "size": 224}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    assert Preprocess.load(tmp_path) == Preprocess()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"do_center_crop": False}, "do_center_crop is off"),
        ({"resample": 1}, "resample is 1"),
        ({"size": {"height": 224, "width": 200}}, "only a square or a shortest_edge"),
        ({"size": {"height": 224}}, "only a square or a shortest_edge"),
        ({"size": {"longest_edge": 224}}, "only a square or a shortest_edge"),
        ({"rescale_factor": "1/255"}, "could not convert"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, only 1/255"),
        ({"max_num_patches": 256, "size": None}, "pictures of varying shape"),
        ({"crop_size": {"height": 224, "width": 200}}, "only a square"),
        ({"size": 100}, "a crop of 224 pixels does not fit"),
    ],
)
def test_load_refuses_unsupported_settings(tmp_path: Path, values: dict, reason: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=reason):
        Preprocess.load(tmp_path)


def test_load_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no preprocessor_config\.json"):
        Preprocess.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Preprocess.load(tmp_path)


@pytest.mark.parametrize("size", [1, 17, 336, 337, 404, 540, 848, 1080, 1440, 2160])
def test_squash_equals_nearest_interpolation(size: int) -> None:
    """Also where whole numbers would give other columns; one by one and as a batch."""
    frames = np.random.default_rng(size).integers(0, 256, (2, size, 20, 3), dtype=np.uint8)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    expected = torch.nn.functional.interpolate(planes, size=(336, 336)).permute(0, 2, 3, 1).to(torch.uint8)
    squash = Preprocess(336, 336).by("squash")
    assert torch.equal(squash.cropped_batch(torch.from_numpy(frames)), expected)
    assert (squash.cropped(frames[1]) == expected[1].numpy()).all()


def test_each_resize_has_its_own_description() -> None:
    assert json.loads(Preprocess(336, 336).by("squash").describe())["filter"] == "nearest"
    assert Preprocess().by("crop").describe() == (
        '{"filter": "bicubic", "resize": 224, "crop": 224, "mean": [0.48145466, 0.4578275, 0.40821073], '
        '"std": [0.26862954, 0.26130258, 0.27577711]}'
    )
