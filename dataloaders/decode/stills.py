"""Still images to RGB, as a viewer shows them on a white page."""

from __future__ import annotations

import struct
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dataloaders.decode.containers import is_avif
from dataloaders.decode.readable import MAX_PIXELS, DecodeError, check_readable

MAX_STILL_PIXELS = 2 * MAX_PIXELS
"""Most pixels of a still, above the 108 million of phones. Each worker needs 7 bytes for a pixel."""

_LEVELS_16_BIT = ("PNG", "PPM")
"""Formats whose pictures in Pillow's mode I hold 16 bits."""


def decode_image(path: Path) -> np.ndarray:
    """A still image, (H, W, 3) uint8 RGB, turned upright; the first picture of an animation. Raises DecodeError.

    16-bit grey is scaled to 8 bits, and transparent pixels are blended with white.
    """
    check_readable(path, video=False)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures, and refuses them only above its own limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(_source(path)) as image:
                width, height = image.size
                if width * height > MAX_STILL_PIXELS:
                    raise DecodeError(
                        f"{path}: a still of {width} x {height} pixels; at most {MAX_STILL_PIXELS:,} can be decoded"
                    )
                ImageOps.exif_transpose(image, in_place=True)
                return np.array(_rgb(image, path))
    except UnidentifiedImageError:
        heic = "a HEIC image, which Pillow does not support; convert it to JPEG"
        reason = heic if is_avif(path) else "not an image that Pillow supports"
        raise DecodeError(f"{path}: {reason}") from None
    except DecodeError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError(f"{path}: {error}") from None


def _source(path: Path) -> Path | BytesIO:
    """The file to open; a corrected copy of a WebP file whose header counts one byte too many, as browsers accept it."""
    with path.open("rb") as file:
        head = file.read(12)
    length = path.stat().st_size - 8
    if head[:4] != b"RIFF" or head[8:] != b"WEBP" or struct.unpack("<I", head[4:8])[0] != length + 1:
        return path
    return BytesIO(head[:4] + struct.pack("<I", length) + path.read_bytes()[8:])


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _LEVELS_16_BIT):
        # Pillow's own conversion turns every value above 255 to white.
        levels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DecodeError(f"{path}: its pixels have 32 bits, without the value of white; convert it to 8 or 16 bits")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")
