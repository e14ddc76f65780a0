"""Only the packets that the wanted frames need reach a decoder, and the frames are the same bit by bit."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

from bench import frames
from bench.frame_cases import Case, cases
from bench.frames import share_kept
from dataloaders.decode import thinned as thinned_module
from dataloaders.decode import video
from dataloaders.decode.bitstream.av1 import Av1
from dataloaders.decode.bitstream.bits import Bits, Irregular
from dataloaders.decode.bitstream.h264 import H264
from dataloaders.decode.bitstream.hevc import Hevc
from dataloaders.decode.bitstream.picture import CLEAN, NOT, OPEN
from dataloaders.decode.bitstream.pictures import Pictures
from dataloaders.decode.bitstream.thinning import needed
from dataloaders.decode.bitstream.vpx import Vp8, Vp9
from dataloaders.decode.packets import read_packets
from dataloaders.decode.thinned import PacketsMissing, thinned_file
from dataloaders.decode.video import sample_video

SUBSET = {
    "x264 defaults mkv",
    "x264 eight B-frames, strict pyramid mp4",
    "x264 open GOP ts",
    "x264 variable frame rate, a clip mp4",
    "x264 intra refresh mp4",
    "x265 open GOP of 6 mp4",
    "x265 open GOP of 6, a clip mp4",
    "x265 two temporal layers mp4",
    "vp9 realtime, a clip webm",
    "vp8 alternate references webm",
    "av1 mp4",
    "mpeg4 B-frames avi",
    "mjpeg avi",
}
"""Files of `bench.frames`, which tests all of them with torchcodec as well."""

ONE, X265 = {"threads": "1"}, "log-level=none:pools=1:frame-threads=1"
SHARES = [
    (0.50, 250, "libx264", ".mp4", ONE | {"x264-params": "scenecut=0:bframes=3:b-adapt=0"}),
    (0.85, 60, "libx264", ".mp4", ONE | {"x264-params": "scenecut=0:bframes=0"}),
    (0.45, 250, "libx265", ".mp4", {"preset": "superfast", "x265-params": f"{X265}:scenecut=0:bframes=4:b-adapt=0"}),
    (0.95, 128, "libvpx-vp9", ".webm", {"cpu-used": "8", "deadline": "realtime"}),
]
"""Share of the packets that 100 of 1,560 frames need, key frame interval, codec, container and options of the encoder."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("needed")


@pytest.mark.parametrize("name", sorted(SUBSET))
def test_frames_are_those_that_ffmpeg_shows(folder: Path, name: str) -> None:
    (case,) = (case for case in cases() if case.name == name)
    decoders = ["pyav", "dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else ["pyav"]
    assert frames.differences(case, case.write(folder, None), decoders) == []


@pytest.mark.parametrize(("share", "gop", "codec", "suffix", "options"), SHARES, ids=lambda value: str(value)[:12])
def test_share_of_needed_packets(
    folder: Path, share: float, gop: int, codec: str, suffix: str, options: dict[str, str]
) -> None:
    case = Case(f"{codec} {gop}", codec, suffix, options, gop=gop, frames=1560, size=(64, 48))
    assert share_kept(case.write(folder, None), 100) == pytest.approx(share, abs=0.04)


def test_only_needed_packets_reach_the_decoder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of five GOPs hold wanted frames. The decoder starts anew at the second."""
    path = Case("sparse", "libx264", ".mp4", ONE | {"x264-params": "scenecut=0"}, gop=8).write(folder, None)
    pictures = read_packets(path, None).pictures
    ticks = pictures.in_display_order
    wanted = ticks[[2, 33]]
    plan = needed(pictures, wanted)
    groups = np.cumsum(pictures.restarts == CLEAN) - 1
    assert set(groups[plan.kept]) == {0, 4} and plan.kept.sum() < 8
    assert np.flatnonzero(plan.fresh).tolist() == [0, int(np.flatnonzero(groups == 4)[0])]
    shown = [frame.pts for frame in thinned_module.decode_needed(path, pictures, wanted)]
    assert set(wanted) <= set(shown) and len(shown) == plan.kept.sum()
    whole = sample_video(path, 40, thinned=False).frames
    thin = thinned_file(path, pictures, wanted)
    (folder / "thin.mkv").write_bytes(thin.content)
    np.testing.assert_array_equal(
        np.stack([sample_video(folder / "thin.mkv", int(plan.kept.sum())).frames[i] for i in thin.indices]),
        np.stack([whole[2], whole[33]]),
    )


def test_a_file_that_lacks_a_needed_packet_is_decoded_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Case("whole", "libx264", ".mp4", ONE).write(folder, None)
    expected = sample_video(path, 9).frames
    decoded: list[int] = []
    decode = video._decode
    monkeypatch.setattr(video, "_decode", lambda *a: (decoded.append(1), decode(*a))[1])
    np.testing.assert_array_equal(sample_video(path, 9).frames, expected)
    assert not decoded
    pictures = read_packets(path, None).pictures
    elsewhere = Pictures(pictures.ticks + 1, pictures.restarts, pictures.spare, pictures.leading)
    with pytest.raises(PacketsMissing):
        list(thinned_module.decode_needed(path, elsewhere, elsewhere.ticks[:1]))
    with pytest.raises(PacketsMissing):
        thinned_file(path, elsewhere, elsewhere.ticks[:1])

    def missing(*arguments: object) -> list[av.VideoFrame]:
        raise PacketsMissing

    monkeypatch.setattr(video, "decode_needed", missing)
    np.testing.assert_array_equal(sample_video(path, 9).frames, expected)
    assert decoded


def random_pictures(rng: np.random.Generator) -> Pictures:
    """Groups of 1 to 9 pictures, each CLEAN or OPEN; after an OPEN start, up to three leading pictures."""
    restarts: list[int] = []
    spare: list[bool] = []
    leading: list[bool] = []
    for group in range(rng.integers(1, 6)):
        kind = CLEAN if group == 0 else int(rng.choice([OPEN, CLEAN]))
        leads, others = (int(rng.integers(0, 4)) if kind == OPEN else 0), int(rng.integers(0, 6))
        restarts += [kind] + [NOT] * (leads + others)
        leading += [False] + [True] * leads + [False] * others
        spare += [False, *(rng.random(leads + others) < 0.5).tolist()]
    order = np.arange(len(restarts))
    ticks = 10 * np.where(leading, np.maximum.accumulate(np.where(restarts, order, 0)) - 5, order) + order % 10
    return Pictures(ticks, np.array(restarts), np.array(spare), np.array(leading))


def references(pictures: Pictures, picture: int) -> set[int]:
    """All pictures to which one may refer, itself included."""
    starts = np.flatnonzero(pictures.restarts != NOT)
    group = int(np.searchsorted(starts, picture, side="right")) - 1
    start = int(starts[group])
    inside = {i for i in range(start, picture) if not pictures.spare[i]}
    if not pictures.leading[picture]:
        return {picture} | {i for i in inside if not pictures.leading[i]}
    before = range(int(starts[group - 1]), start)
    return {picture} | inside | {i for i in before if not pictures.spare[i] and not pictures.leading[i]}


@pytest.mark.parametrize("seed", range(40))
def test_needed_are_the_references_of_the_wanted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pictures = random_pictures(rng)
    total = len(pictures.ticks)
    wanted = np.sort(rng.choice(total, int(rng.integers(1, total + 1)), replace=False))
    closure = set().union(*(references(pictures, int(i)) for i in wanted))
    kept = set(np.flatnonzero(needed(pictures, pictures.ticks[wanted]).kept).tolist())
    assert closure <= kept
    # Leading references that no wanted leading picture needs may stay; nothing else does.
    assert all(i in closure or not pictures.spare[i] for i in kept)
    spliced = needed(pictures, pictures.ticks[wanted], splice=True)
    assert closure <= set(np.flatnonzero(spliced.kept).tolist())
    for start in np.flatnonzero(pictures.restarts == OPEN):
        before, after = spliced.kept[:start], spliced.kept[start:]
        if before.any() and after[0]:
            previous = np.flatnonzero(pictures.restarts[:start] != NOT)[-1]
            lost = ~spliced.kept[previous:start] & ~pictures.spare[previous:start] & ~pictures.leading[previous:start]
            assert not lost.any(), "no gap before a picture at which a decoder does not start anew"


class TestHeaders:
    def test_exp_golomb(self) -> None:
        bits = Bits(bytes([0b1_010_011_0, 0b0100_1_011, 0b0_0000000]))
        assert [bits.ue() for _ in range(5)] == [0, 1, 2, 3, 0]
        assert Bits(bytes([0b010_011_00, 0b100_00101])).se() == 1
        with pytest.raises(Irregular):
            Bits(b"\0").ue()

    def test_h264_that_is_not_one_progressive_picture(self) -> None:
        idr, reference, spare = b"\x65\x88", b"\x41\x9a", b"\x01\x9a"
        reader = H264(b"")
        assert reader.read(b"\0\0\1" + idr).restart == CLEAN
        assert reader.read(b"\0\0\1" + reference).reference and not reader.read(b"\0\0\1" + spare).reference
        for packet in (
            reference + b"\0\0\1" + reference,
            b"\x42\x9a",
            b"\x54\x9a",
            b"\x41\x1a",
            idr + b"\0\0\1" + spare,
        ):
            with pytest.raises(Irregular):
                reader.read(b"\0\0\1" + packet)

    def test_hevc_that_hides_pictures(self) -> None:
        """Pictures that a slice header hides, several layers, and leading pictures whose references are not there."""
        cra, rasl, trailing = b"\x2a\x01\x80", b"\x12\x01\x80", b"\x02\x01\x80"
        start = b"\0\0\1"
        for packet in (b"\x44\x01\xd8" + start + cra, b"\x2b\x01\x80", b"\x2a\x09\x80", trailing):
            with pytest.raises(Irregular):
                Hevc(b"").read(start + packet)
        reader = Hevc(b"")
        assert reader.read(start + cra).restart == OPEN
        with pytest.raises(Irregular):
            reader.read(start + rasl)
        reader.read(start + trailing)
        reader.read(start + cra)
        picture = reader.read(start + rasl)
        assert picture.leading and picture.reference

    def test_vp8_and_vp9(self) -> None:
        assert Vp8(b"").read(b"\x10\0\0\x9d\x01\x2a\x60\0\x48\0").size == (96, 72)
        with pytest.raises(Irregular):
            Vp8(b"").read(b"\x01\0\0")
        assert Vp9(b"").read(b"\x88").hidden == "a frame that is shown again"
        with pytest.raises(Irregular):
            Vp9(b"").read(b"\x00" * 9)

    def test_vp9_that_is_shown_in_another_size(self) -> None:
        """Its render_size (6.2.4): FFmpeg ignores it, and NVDEC may crop to it."""
        bits = "10 00 0 0 1 0" + f"{0x498342:024b} 001 0 {191:016b} {143:016b}"

        def packet(end: str) -> bytes:
            return int(f"{bits}{end}".replace(" ", "").ljust(320, "0"), 2).to_bytes(40)

        same = f"1 {191:016b} {143:016b}"
        assert Vp9(b"").read(packet("0")).size == Vp9(b"").read(packet(same)).size == (192, 144)
        with pytest.raises(Irregular, match="a size to be shown that is not its own"):
            Vp9(b"").read(packet(f"1 {191:016b} {135:016b}"))

    def test_av1_units(self) -> None:
        """A temporal unit with a hidden frame and a shown one; one that shows an earlier frame; and two shown frames."""
        hidden, shown, again = b"\x32\x01\x20", b"\x32\x01\x30", b"\x1a\x01\x80"
        key = b"\x0a\x01\0" + b"\x32\x01\x10"
        assert Av1(b"").read(key).restart == CLEAN and Av1(b"").read(hidden + shown).hidden
        assert Av1(b"").read(again).restart == NOT
        for packet in (shown + again, hidden, b"\x30\x01", b"\x32\x7f\x10"):
            with pytest.raises(Irregular):
                Av1(b"").read(packet)
