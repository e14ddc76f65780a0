"""Features of CLIP and SigLIP equal those of transformers with its own image processor, on both paths of the pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, SiglipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dataloaders.decode import preprocess as preprocessing
from dataloaders.decode.dali.decoder import DaliDecoder
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.video import decode_video
from dataloaders.records import Media
from dataloaders.store.features import FeatureStore
from engine.encode.check import LEAST_COSINE
from engine.encode.config import EncodeConfig
from engine.encode.run import encode
from pite.clip import ClipEncoder
from pite.towers import CLIP, SIGLIP
from tests.clips import SIZE, save_clip, save_siglip, write_data
from tests.media import needs_dali

TOWERS: dict[str, tuple[Callable[[Path], Any], type]] = {
    "clip": (save_clip, CLIPImageProcessorPil),
    "clip 336": (lambda directory: save_clip(directory, size=48), CLIPImageProcessorPil),
    "siglip": (save_siglip, SiglipImageProcessorPil),
    "siglip 2": (lambda directory: save_siglip(directory, resample=2), SiglipImageProcessorPil),
}
PICTURES = [(37, 61), (97, 41), (32, 32), (20, 25), (240, 320)]


@pytest.fixture(scope="module", params=TOWERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    directory = tmp_path_factory.mktemp("tower")
    TOWERS[request.param][0](directory)
    return request.param, directory


def expected_features(kind: str, directory: Path, frames: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' pixel values and features, of its own processor and model."""
    processor = TOWERS[kind][1].from_pretrained(directory)
    pixels = processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")["pixel_values"]
    model = AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels)
    return pixels, found if isinstance(found, torch.Tensor) else found.pooler_output


def cosines(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Of the features without their mean, because those of one random tower resemble each other."""
    centre = two.mean(0, keepdim=True)
    return torch.cosine_similarity(one - centre, two - centre)


def noise(height: int, width: int, count: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(height).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def smooth(height: int, width: int, count: int = 3) -> list[np.ndarray]:
    """Blobs of colour, which a resize leaves as they are."""
    blobs = [Image.fromarray(small) for small in noise(6, 6, count)]
    return [np.array(blob.resize((width, height), Image.Resampling.BICUBIC)) for blob in blobs]


@pytest.mark.parametrize(("height", "width"), PICTURES)
def test_features_are_transformers(saved: tuple[str, Path], height: int, width: int) -> None:
    kind, directory = saved
    frames = noise(height, width)
    pixels, expected = expected_features(kind, directory, frames)
    encoder = ClipEncoder(str(directory))
    assert encoder.tower is (CLIP if kind.startswith("clip") else SIGLIP)
    assert encoder.channels == expected.shape[1]
    cropped = np.stack([encoder.preprocess.cropped(frame) for frame in frames])
    torch.testing.assert_close(encoder.preprocess.normalized(torch.from_numpy(cropped)), pixels, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.encode(cropped), expected, atol=1e-4, rtol=1e-4)
    assert cosines(encoder.encode(cropped), expected).min() > 0.9999


@pytest.mark.parametrize(("dtype", "difference"), [("float32", 1), ("float16", 2)])
@pytest.mark.parametrize(("height", "width"), PICTURES)
def test_pixels_that_the_device_resizes_are_the_processors(
    saved: tuple[str, Path], height: int, width: int, dtype: str, difference: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of DALI's frames, in the GPU's precision too; on white noise, where a wrong rule is far off."""
    monkeypatch.setattr(preprocessing, "ARITHMETIC", {"cpu": dtype})
    kind, directory = saved
    frames, preprocess = noise(height, width), Preprocess.load(directory)
    pixels, _ = expected_features(kind, directory, frames)
    ours = preprocess.cropped_batch(torch.from_numpy(np.stack(frames)))
    step = 1 / 255 / min(preprocess.std)
    assert (preprocess.normalized(ours) - pixels).abs().max() <= difference * step + 1e-5
    scenes = smooth(height, width)
    features = ClipEncoder(str(directory)).encode(preprocess.cropped_batch(torch.from_numpy(np.stack(scenes))))
    assert cosines(features, expected_features(kind, directory, scenes)[1]).min() > 0.999
    other = Preprocess(
        preprocess.resize, preprocess.crop, preprocess.mean, preprocess.std, squash=not preprocess.squash
    )
    if height != width:
        wrong = other.normalized(other.cropped_batch(torch.from_numpy(np.stack(frames))))
        assert (wrong - pixels).abs().max() > 20 * step


def test_a_tower_saved_alone_is_the_same_encoder(tmp_path: Path) -> None:
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    save_siglip(whole)
    encoder = ClipEncoder(str(whole))
    SiglipVisionModel.save_pretrained(encoder.model, alone)
    (alone / "preprocessor_config.json").write_text((whole / "preprocessor_config.json").read_text())
    assert ClipEncoder(str(alone)).checksum == encoder.checksum
    save_siglip(alone, seed=1)
    assert ClipEncoder(str(alone)).checksum != encoder.checksum


def test_no_graph_break(saved: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", **options))
    torch._dynamo.reset()
    compiled, plain = (ClipEncoder(str(saved[1]), compiled=c) for c in (True, False))
    frames = np.random.default_rng(0).integers(0, 256, (2, *[plain.preprocess.crop] * 2, 3), dtype=np.uint8)
    assert torch.equal(compiled.encode(frames), plain.encode(frames))


def test_frame_flops_match_the_flop_counter(saved: tuple[str, Path]) -> None:
    encoder = ClipEncoder(str(saved[1]))
    side, counter = encoder.preprocess.crop, FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        encoder.encode(np.zeros((3, side, side, 3), np.uint8))
    assert counter.get_total_flops() == pytest.approx(3 * encoder.flops_per_frame)


@pytest.mark.parametrize("kind", ["siglip", "siglip 2"])
def test_encoding_a_data_folder(tmp_path: Path, kind: str) -> None:
    """The PyAV path: every stored record is transformers' feature of the decoded frames; the manifest has the rule."""
    TOWERS[kind][0](tmp_path / "tower")
    data = write_data(tmp_path / "data", videos=2, images=2)
    config = EncodeConfig(data=data, store=tmp_path / "store", clip=str(tmp_path / "tower"), num_frames=5, workers=0)
    encode(config)
    store = FeatureStore(tmp_path / "store" / "videos")
    for key in store.keys:
        frames = list(decode_video(data / "stage2/videos" / f"{Path(key).name}.mp4", 5))
        _, expected = expected_features(kind, tmp_path / "tower", frames)
        found = torch.from_numpy(store.read(key).astype(np.float32))
        assert torch.cosine_similarity(found, expected).min() > 0.9999
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
    encoder = ClipEncoder(str(tmp_path / "tower"))
    assert store.manifest.encoder == encoder.checksum and store.manifest.channels == 32
    assert json.loads(store.manifest.preprocess) == {
        "filter": "bicubic" if kind == "siglip" else "bilinear",
        "resize": SIZE, "crop": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "squash": True,
    }  # fmt: skip


@needs_dali
def test_the_frames_of_dali_have_transformers_features(saved: tuple[str, Path], tmp_path: Path) -> None:
    kind, directory = saved
    path = tmp_path / "v.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10, options={"auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 72, "yuv420p", 4_000_000
        for scene in smooth(72, 96, 5):
            # Grey: the conversion of colours differs a little between decoders, and has tests of its own.
            frame = np.repeat(scene[..., :1], 3, 2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    encoder = ClipEncoder(str(directory))
    with DaliDecoder("video", 5, encoder.preprocess, "cpu", workers=1) as decoder:
        (decoded,) = decoder.map([Media("", path)])
    assert decoded.by == "DALI (vp9)"
    _, expected = expected_features(kind, directory, list(decode_video(path, 5)))
    assert torch.cosine_similarity(encoder.encode(decoded.frames), expected).min() > LEAST_COSINE


def test_the_published_rule_has_the_words_of_earlier_stores() -> None:
    assert Preprocess().describe() == (
        '{"filter": "bicubic", "resize": 224, "crop": 224, "mean": [0.48145466, 0.4578275, 0.40821073], '
        '"std": [0.26862954, 0.26130258, 0.27577711]}'
    )


def test_towers_of_varying_shape_and_without_a_head_are_refused(tmp_path: Path) -> None:
    save_siglip(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "vision_config": {**values["vision_config"], "vision_use_head": False}}))
    with pytest.raises(ValueError, match=r"vision_use_head is off"):
        ClipEncoder(str(tmp_path))
    path.write_text(json.dumps({**values, "model_type": "siglip2"}))
    with pytest.raises(ValueError, match=r"NaFlex.*is not supported: take one of a fixed resolution"):
        ClipEncoder(str(tmp_path))


def test_siglips_file_without_values_has_siglips_defaults(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    values = {"do_center_crop": None, "crop_size": None, "image_processor_type": "SiglipImageProcessor", "resample": 2}
    path.write_text(json.dumps(values))
    half = (0.5, 0.5, 0.5)
    assert Preprocess.load(tmp_path) == Preprocess(224, 224, half, half, "bilinear", squash=True)
