"""DALI never gets a file of which it would take other frames, or which it would decode in another file's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from itertools import permutations, product
from pathlib import Path

import av
import numpy as np
import pytest

from bench.dali_model import DecoderCache, calls, counts_right, frames_of
from dataloaders.decode.bitstream.vpx import superframe
from dataloaders.decode.dali.agreement import MARGIN, compare, surroundings
from dataloaders.decode.dali.decoder import DaliDecoder
from dataloaders.decode.dali.request import DecodeRequest, prepare
from dataloaders.decode.dali.sizes import COMMON, may_be_confused
from dataloaders.decode.decoder import Decoded, decode_cropped
from dataloaders.decode.packets import read_packets
from dataloaders.decode.preprocess import Preprocess
from dataloaders.records import Media
from tests.dataloaders.decode.test_backends import VP9, write
from tests.media import TWO_PASS, needs_dali

N = 7
PREPROCESS = Preprocess(32, 32)
X265 = {"x265-params": "log-level=none"}

Change = Callable[[int, bytes, int], Iterator[tuple[bytes, int]]]


def rewrite(source: Path, path: Path, change: Change) -> Path:
    """Write a file whose packets `change(number, content, time in ms)` replaces; times of decoding follow their order."""
    with (
        av.open(str(source)) as container,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as output,
    ):
        stream = container.streams.video[0]
        target = output.add_stream_from_template(stream)
        number = 0
        for packet in (p for p in container.demux(stream) if p.size):
            for content, time in change(number, bytes(packet), round(1000 * packet.pts * stream.time_base)):
                made = av.Packet(content)
                made.stream, made.time_base, made.pts = target, Fraction(1, 1000), time
                made.dts, made.is_keyframe = min(time, number), packet.is_keyframe
                output.mux_one(made)
                number += 1
    return path


def shown_again(number: int, content: bytes, time: int) -> Iterator[tuple[bytes, int]]:
    """Replace the small packets that repeat a hidden picture by the header that shows reference 2 again."""
    yield (bytes([0x8A]) if number and len(content) < 20 else content), time


def kept_from_dali(path: Path) -> str:
    """Why a file is kept from DALI on a GPU; empty where it gets it."""
    found = prepare(Media("k", path), N, PREPROCESS, "cuda")
    assert isinstance(found, DecodeRequest) or found.frames is not None, found.reason
    return "" if isinstance(found, DecodeRequest) else found.by


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    d = tmp_path_factory.mktemp("counting")
    b = write(d / "b.mkv", "libx264", {"preset": "ultrafast", "bf": "3", "b-pyramid": "normal"})
    opened = write(d / "opened.mkv", "libx265", X265 | {"preset": "fast"}, size=(192, 144))
    plain = write(d / "plain.webm", "libvpx-vp9", VP9, size=(192, 144))
    return {
        "two-pass VP9": TWO_PASS,
        "VP9 that shows a frame again": rewrite(TWO_PASS, d / "again.webm", shown_again),
        "VP9": plain,
        "VP9 with times that wrap": rewrite(plain, d / "huge.mkv", lambda i, c, t: iter([(c, 2**31 - 2000 + t)])),
        "VP9 with equal times": rewrite(plain, d / "equal.mkv", lambda i, c, t: iter([(c, t // 200 * 200)])),
        "x264": b,
        "x264, defaults": write(d / "defaults.mp4", "libx264", {"preset": "medium", "g": "250"}),
        "x264, interlaced": write(d / "tff.mp4", "libx264", {"x264-params": "tff=1"}),
        "x264, from the middle": rewrite(b, d / "cut.mkv", lambda i, c, t: iter([(c, t)] if t >= 300 else [])),
        "x265": opened,
        "x265, from the middle": rewrite(opened, d / "rasl.mkv", lambda i, c, t: iter([(c, t)] if t >= 600 else [])),
        "VP9, odd size": write(d / "odd.webm", "libvpx-vp9", VP9, size=(98, 71)),
    }


def test_the_model_counts_hidden_pictures() -> None:
    """Frames are in order of their times. A hidden picture has the time of the shown one after it, and counts."""
    assert frames_of([(t, [t]) for t in (0, 3, 1, 2, 6, 4, 5)]) == list(range(7))
    assert frames_of([(0, [0]), (1, [-9, 1]), (2, [2])]) == [0, -9, 1, 2]
    assert frames_of([(0, [0]), (1, []), (2, [2]), (3, [3])]) == [0, 2, 3]
    assert frames_of([(-1, [-1]), (0, [0])]) == [0]


def test_two_pass_vp9_hides_pictures() -> None:
    content = TWO_PASS.read_bytes()
    hidden = [len(pictures) for _, pictures in calls(content)]
    assert hidden.count(2) == 5 and len(hidden) == 40
    found = frames_of(calls(content))
    assert sum(a == b for a, b in zip(found, sorted(t for t, _ in calls(content)))) < 3, "nearly all are others"


def test_what_dali_counts_wrongly_is_kept_from_it(files: dict[str, Path]) -> None:
    wrong = {name for name, path in files.items() if not counts_right(path.read_bytes())}
    assert wrong >= {"two-pass VP9", "VP9 that shows a frame again", "VP9 with times that wrap"}
    assert not wrong & {"VP9", "x264", "x264, defaults", "x265"}, "the model does not refuse what is right"
    kept = {name: by for name, path in files.items() if (by := kept_from_dali(path))}
    assert kept == {
        "two-pass VP9": "PyAV (hidden pictures)",
        "VP9 that shows a frame again": "PyAV (hidden pictures)",
        "VP9 with equal times": "PyAV (equal or missing times)",
        "x264, interlaced": "PyAV (interlaced)",
        "x264, from the middle": "PyAV (a start in the middle)",
        "x265, from the middle": "PyAV (pictures without their references)",
        "VP9, odd size": "PyAV (odd size)",
    }
    for name, path in files.items():
        request = prepare(Media(name, path), N, PREPROCESS, "cuda")
        assert isinstance(request, Decoded) or counts_right(request.content, request.indices), name


@needs_dali
@pytest.mark.usefixtures("in_this_process")
def test_each_of_these_files_gives_the_frames_of_pyav(files: dict[str, Path]) -> None:
    media = [Media(name, path) for name, path in files.items()]
    with DaliDecoder("video", N, PREPROCESS, "cpu", workers=1) as decoder:
        for m, decoded in zip(media, decoder.map(media)):
            assert isinstance(decoded.frames, np.ndarray), decoded.reason
            if decoded.by.startswith("DALI"):
                assert compare(decoded.frames, surroundings(m, N, PREPROCESS).frames), m.key
            else:
                np.testing.assert_array_equal(decoded.frames, decode_cropped(m, N, PREPROCESS), err_msg=m.key)


def test_h264_is_never_decoded_as_another_size(tmp_path: Path) -> None:
    """1280 x 536 is coded as 1280 x 544, and 640 x 360 as 640 x 368. DALI gets files without cropping, which share decoders."""
    sizes = {}
    for size in [(1280, 544), (1280, 536), (640, 368), (640, 360)]:
        path = write(tmp_path / f"{size[1]}.mp4", "libx264", {"preset": "ultrafast"}, frames=1, size=size)
        request = prepare(Media("k", path), 2, PREPROCESS, "cuda")
        assert isinstance(request, DecodeRequest) and request.size == size
        sizes[size] = request.decoded
        assert request.decoded == (size[0], -(-size[1] // 16) * 16)
        with av.open(BytesIO(request.content)) as container:
            frame = next(container.decode(video=0))
        assert (frame.width, frame.height) == request.decoded
        with av.open(str(path)) as container:
            whole = next(container.decode(video=0)).reformat(format="gray").to_ndarray()
        np.testing.assert_array_equal(frame.reformat(format="gray").to_ndarray()[: size[1], : size[0]], whole)
    for order in permutations(sizes):
        cache = DecoderCache()
        assert [cache.layout(sizes[size], sizes[size]) for size in order] == [sizes[size] for size in order]
        assert len(cache.shown) == 2
    cropped = DecoderCache()
    assert sum(cropped.layout(coded, size) != size for size, coded in sizes.items()) == 2, "what cropping would lead to"


@pytest.mark.parametrize("codec", sorted(COMMON))
def test_no_size_is_rounded_to_another_that_dali_gets(codec: str) -> None:
    """Whatever NVDEC rounds to, up to whole macroblocks, in either direction."""
    assert {(640, 360), (360, 640), (1920, 1080)} <= COMMON[codec]
    assert ((856, 480) if codec == "hevc" else (854, 480)) in COMMON[codec]
    units = list(product((1, 2, 4, 8, 16), repeat=2))
    whole = [(16 * w, 16 * h) for w in range(1, 125) for h in range(1, 125)]
    near = [(w + i, h + j) for w, h in COMMON[codec] for i in range(-16, 17) for j in range(-16, 17)]
    gets = {size for size in [*whole, *near] if not may_be_confused(codec, size)}
    assert COMMON[codec] <= gets and {(1280, 720), (192, 144), (1280, 544)} <= gets
    assert not gets & {(640, 368), (1920, 1088), (856 if codec != "hevc" else 854, 480), (1280, 536), (98, 72)}
    for size in gets:
        rounded = {(-(-size[0] // a) * a, -(-size[1] // b) * b) for a, b in units}
        assert rounded & gets == {size}
    assert len(whole) - len(gets) < 40, "nearly all sizes of whole macroblocks"


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx", "libx265"])
def test_sizes_in_any_order(tmp_path: Path, codec: str) -> None:
    """What goes to DALI depends on the file alone, and its cache never gives a file another one's layout."""
    sizes = [(192, 160), (192, 152), (640, 368), (640, 360)]
    options, suffix = (X265, ".mp4") if codec == "libx265" else (VP9, ".webm")
    paths = [write(tmp_path / f"{h}{suffix}", codec, options, frames=5, size=(w, h)) for w, h in sizes]
    by = [kept_from_dali(path) for path in paths]
    assert by == ["", confused := "PyAV (a size that DALI may confuse with another)", confused, ""]
    for unit, order in product((1, 8, 16), permutations(size for size, why in zip(sizes, by) if not why)):
        cache = DecoderCache()
        for size in order:
            coded = size[0], -(-size[1] // unit) * unit
            assert cache.layout(coded, size) == size


def test_vp9_that_changes_size_goes_to_pyav(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{i}.webm", "libvpx-vp9", VP9, frames=5, size=(96 + 16 * i, 72)) for i in range(2)]
    second: list[bytes] = []
    rewrite(parts[1], tmp_path / "unused.webm", lambda i, c, t: (second.append(c), iter([(c, t)]))[1])
    mixed = rewrite(parts[0], tmp_path / "mixed.webm", lambda i, c, t: iter([(c, t)]))
    with av.open(str(mixed), "w") as output, av.open(str(parts[0])) as container:
        target = output.add_stream_from_template(container.streams.video[0])
        contents = [bytes(p) for p in container.demux(video=0) if p.size] + second
        for i, content in enumerate(contents):
            packet = av.Packet(content)
            packet.stream, packet.time_base, packet.pts, packet.dts = target, Fraction(1, 10), i, i
            packet.is_keyframe = i in (0, 5)
            output.mux_one(packet)
    assert read_packets(mixed, None).pictures.hidden == "frames that change size"
    assert kept_from_dali(mixed) == "PyAV (frames that change size)"


def test_superframes() -> None:
    """VP9's Annex B: sizes of the frames stand at the end, between two equal bytes."""
    frames = [b"a" * 300, b"b" * 5]
    index = bytes([0xC9]) + (300).to_bytes(2, "little") + (5).to_bytes(2, "little") + bytes([0xC9])
    assert superframe(b"".join(frames) + index) == frames
    assert superframe(b"a" * 10) == [b"a" * 10]


class TestAgreement:
    @pytest.fixture(scope="class")
    @classmethod
    def around(cls) -> np.ndarray:
        return surroundings(Media("k", TWO_PASS), N, PREPROCESS).frames

    def test_right_frames_agree(self, around: np.ndarray) -> None:
        ours = decode_cropped(Media("k", TWO_PASS), N, PREPROCESS)
        np.testing.assert_array_equal(around[N : 2 * N], ours)
        noise = np.random.default_rng(0).integers(-3, 4, ours.shape)
        agreement = compare((ours + noise).clip(0, 255).astype(np.uint8), around)
        assert agreement and 0 < agreement.difference < 3

    @pytest.mark.parametrize("part", [0, 2])
    def test_one_frame_that_is_its_neighbour_does_not(self, around: np.ndarray, part: int) -> None:
        """The mean over all frames, as compared before, is far below the limit."""
        ours = around[N : 2 * N].copy()
        ours[3] = around[part * N + 3]
        assert np.abs(ours.astype(int) - around[N : 2 * N]).mean() < 5
        agreement = compare(ours, around)
        assert not agreement and agreement.shifted == 1

    def test_still_scenes_agree(self) -> None:
        still = np.full((3 * N, 8, 8, 3), 90, np.uint8)
        assert compare(still[:N], still) and compare(still[:N] + 1, still) and MARGIN < 1
        assert not compare(still[:N] + 20, still)
