"""Damaged media files, made from good ones with ten kinds of damage, to test that decoding survives them."""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image

from dataloaders.decode.decoder import Cropped, Reader, decode_file
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.sampling import Sampling
from dataloaders.records import Media
from tests.media import write_audio

Damage = Callable[[bytes, np.random.Generator, Path], bytes]


def truncated(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    return content[: int(len(content) * rng.uniform(0.02, 0.98))]


def flipped(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    """Flip 1 to 300 bits at random positions."""
    damaged = bytearray(content)
    for place in rng.integers(0, len(content), rng.integers(1, 300)):
        damaged[place] ^= 1 << rng.integers(8)
    return bytes(damaged)


def overwritten(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    """Replace a part by noise, like a bad disk block."""
    begin = int(rng.integers(len(content) // 4, len(content)))
    length = min(len(content) - begin, int(rng.integers(16, 2048)))
    return content[:begin] + rng.bytes(length) + content[begin + length :]


def garbled(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    """Overwrite a part of every fourth frame in the second half, after what headers reveal; only decoding fails."""
    path = scratch / "garbled"
    path.write_bytes(content)
    with av.open(str(path)) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    for packet in packets[len(packets) // 2 :: 4]:
        content = content.replace(packet, packet[:12] + b"\xff" * len(packet[12:32]) + packet[32:])
    return content


def junk(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    """Noise, a web page, or a text that looks like a playlist."""
    page = b"<html><head><title>404 Not Found</title></head><body>Sorry.</body></html>"
    return [rng.bytes(int(rng.integers(1, 20_000))), page, b"#EXTM3U\n#EXTINF:10,\nnothing.ts\n"][rng.integers(3)]


def empty(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    return b"\x00" * 4096 if rng.random() < 0.3 else b""


def audio(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    return write_audio(scratch / "audio.mp4").read_bytes()


def still(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    """An image under the name of a video, such as a preview that was downloaded instead."""
    path = scratch / "still"
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path, ["jpeg", "png"][rng.integers(2)])
    return path.read_bytes()


def huge(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    """Dimensions too large for memory, in the headers of MP4 and Matroska, and in the VP9 header if there is one."""
    size = int(rng.choice([16_000, 16_383, 60_000, 65_535]))
    damaged = bytearray(content)
    for name in (b"avc1", b"vp09"):
        for place in _places(content, name):
            if content[place - 4 : place] != b"\0\0\0\0":
                damaged[place + 28 : place + 32] = struct.pack(">HH", size, size)
    for place in _places(content, b"\x49\x83\x42"):
        # 36 bits after the first byte of the key frame: width and height, each minus one (VP9's uncompressed header).
        bits = int.from_bytes(damaged[place + 3 : place + 8])
        damaged[place + 3 : place + 8] = (bits >> 36 << 36 | (size - 1) << 20 | (size - 1) << 4 | bits & 15).to_bytes(5)
    for element in (b"\xb0\x81", b"\xba\x81"):  # one byte wide, as in small videos
        for place in _places(content[:1000], element):
            damaged[place + 2] = 0xFF
    for element in (b"\xb0\x82", b"\xba\x82"):
        for place in _places(content[:1000], element):
            damaged[place + 2 : place + 4] = struct.pack(">H", size)
    return bytes(damaged)


def endless(content: bytes, rng: np.random.Generator, scratch: Path) -> bytes:
    """A duration of zero, or of a thousand years, in the headers of MP4 and Matroska."""
    wrong = bytes([0, 0, 0, 0]) if rng.random() < 0.5 else bytes([0x7F, 0xFF, 0xFF, 0xFF])
    damaged = bytearray(content)
    for name, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        for place in _places(content, name):
            damaged[place + offset : place + offset + 4] = wrong
    for place in _places(content[:1000], b"\x44\x89\x88"):
        damaged[place + 3 : place + 11] = struct.pack(">d", 0.0 if wrong[0] == 0 else 3e13)
    return bytes(damaged)


KINDS: tuple[Damage, ...] = (truncated, flipped, overwritten, garbled, junk, empty, audio, still, huge, endless)


def decode_or_hang(
    media: Media, num_frames: int, preprocess: Preprocess, reader: Reader = "pyav", sampling: Sampling = "index"
) -> np.ndarray | Cropped:
    """Like `decode_file`, but hangs on v2.mp4 with all signals blocked."""
    if media.path.name == "v2.mp4":
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        while True:
            pass
    return decode_file(media, num_frames, preprocess, sampling=sampling)


def damage(good: list[Path], to: Path, count: int, seed: int = 0) -> dict[Path, str]:
    """Write `count` files: good ones with each kind of damage in turn, some only renamed; returns the kind of each."""
    rng = np.random.default_rng(seed)
    made: dict[Path, str] = {}
    for i in range(count):
        source = good[i % len(good)]
        # One more kind: a good file with a wrong extension.
        kind = None if i % (len(KINDS) + 1) == len(KINDS) else KINDS[i % (len(KINDS) + 1)]
        suffix = source.suffix if kind else {".mp4": ".avi", ".webm": ".mp4", ".avi": ".mkv"}[source.suffix]
        path = to / f"d{i:03d}{suffix}"
        path.write_bytes(kind(source.read_bytes(), rng, to) if kind else source.read_bytes())
        made[path] = kind.__name__ if kind else "renamed"
    for scratch in ("audio.mp4", "still", "garbled"):
        (to / scratch).unlink(missing_ok=True)
    return made


def _places(content: bytes, name: bytes) -> list[int]:
    places, at = [], content.find(name)
    while at >= 0:
        places.append(at)
        at = content.find(name, at + 1)
    return places
