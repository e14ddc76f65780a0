"""Odd but legal stills decode as a viewer shows them on a white page, or are refused with the true reason."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.decode import stills
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.stills import decode_image
from tests.odd_media import picture, write_grey16, write_heic, write_long_webp, write_transparent


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
def test_sixteen_bit_grey(tmp_path: Path, name: str) -> None:
    pixels = decode_image(write_grey16(tmp_path / name))
    assert pixels.shape == (40, 60, 3)
    assert (pixels[:, :30] == 0).all() and (pixels[:, 30:] == 128).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_white_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((4, 5), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(DecodeError, match="32 bits, without the value of white; convert it"):
        decode_image(tmp_path / "a.tiff")


@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGBA"), ("a.png", "LA"), ("a.webp", "RGBA")])
def test_transparent_pixels_are_white(tmp_path: Path, name: str, mode: str) -> None:
    path = write_transparent(tmp_path / name, mode)
    pixels = decode_image(path)
    assert (pixels[:, :20] == 255).all()
    with Image.open(path) as image:
        colours = np.array(image.convert("RGBA"))[..., :3].astype(float)
    assert np.abs(pixels[:, 20:40] - (127 * 255 + 128 * colours[:, 20:40]) / 255).max() <= 1
    assert (pixels[:, 40:] == colours[:, 40:]).all()


def test_a_transparent_colour_of_a_palette(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    image.save(tmp_path / "a.png", transparency=1)
    assert decode_image(tmp_path / "a.png")[..., 0].tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("form", ["AVIF", "WEBP", "GIF", "PNG", "BMP"])
def test_the_content_decides_and_not_the_suffix(tmp_path: Path, form: str) -> None:
    Image.fromarray(picture(30)).save(tmp_path / "a.jpg", form)
    assert abs(int(decode_image(tmp_path / "a.jpg")[30, 40, 0]) - 120) <= 2


def test_reasons(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match="a HEIC image, which Pillow does not support"):
        decode_image(write_heic(tmp_path / "a.jpg"))
    Image.fromarray(picture(30)).save(tmp_path / "cut.avif")
    (tmp_path / "cut.avif").write_bytes((tmp_path / "cut.avif").read_bytes()[:-40])
    with pytest.raises(DecodeError):
        decode_image(tmp_path / "cut.avif")


def test_webp_whose_header_counts_one_byte_too_many(tmp_path: Path) -> None:
    assert abs(int(decode_image(write_long_webp(tmp_path / "a.jpg"))[30, 40, 0]) - 80) <= 2


@pytest.mark.parametrize("size", [(1, 30000), (2, 8000), (60000, 1)])
def test_long_pictures_take_little_memory(tmp_path: Path, size: tuple[int, int]) -> None:
    colours = np.linspace(0, 255, max(size)).astype(np.uint8)
    Image.fromarray(np.broadcast_to(colours[None] if size[1] == 1 else colours[:, None], size[::-1]).copy()).save(
        tmp_path / "a.png"
    )
    frame = decode_image(tmp_path / "a.png")
    tracemalloc.start()
    cropped = Preprocess(224, 224).cropped(frame)
    assert cropped.shape == (224, 224, 3) and abs(float(cropped.mean()) - 127.5) < 2


def test_the_middle_alone_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture resized by its middle alone: within 1/255 of the whole resized and cropped, for smooth pictures."""
    y, x = np.mgrid[:90, :160]
    smooth = np.stack([127 + 100 * np.sin(x / 9), 127 + 100 * np.cos(y / 7), x + y], -1).astype(np.uint8)
    for settings in (Preprocess(64, 64), Preprocess(40, 32)):
        for frame in (smooth, smooth.swapaxes(0, 1).copy()):
            whole = settings.cropped(frame)
            with monkeypatch.context() as patch:
                patch.setattr(Preprocess, "is_extreme", lambda *_: True)
                middle = settings.cropped(frame)
            assert np.abs(whole.astype(int) - middle).max() <= 1


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stills, "MAX_STILL_PIXELS", 3000)
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    with pytest.raises(DecodeError, match=r"a still of 64 x 48 pixels; at most 3,000 can be decoded"):
        decode_image(tmp_path / "a.png")
