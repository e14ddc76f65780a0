"""Decoding: the right frames of every kind of file, and the right reason for every file without frames."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dataloaders.decode import packets, video
from dataloaders.decode.containers import duration, truncation
from dataloaders.decode.packets import Packets
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.sampling import frame_indices
from dataloaders.decode.stills import decode_image
from dataloaders.decode.video import decode_video, sample_video
from tests.media import truncate, which_frame, write_audio, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("media") / "fifty.mp4", 50, container_options={"movflags": "faststart"})


def decoded(path: Path, num_frames: int, clip: tuple[float, float] | None = None) -> list[int]:
    return [which_frame(frame) for frame in decode_video(path, num_frames, clip)]


@pytest.mark.parametrize(("total", "n"), [(1, 1), (1, 5), (3, 7), (50, 8), (1560, 100), (100, 100), (101, 100)])
def test_frame_indices_are_the_published_rule(total: int, n: int) -> None:
    indices = frame_indices(total, n)
    # Exact integer arithmetic: floor(i * (total - 1) / (n - 1)).
    expected = [i * (total - 1) // (n - 1) if n > 1 else 0 for i in range(n)]
    # linspace in float64 may land just below a whole number; the published code truncates that as well.
    assert np.abs(indices - expected).max() <= 1
    assert indices[0] == 0 and indices[-1] == (total - 1 if n > 1 else 0)
    assert (indices == np.linspace(0, total - 1, n).astype(np.int64)).all()


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        (".mp4", "libx264", {"bf": "3"}),
        (".mp4", "libx264", {"x264-params": "open-gop=1:bframes=3"}),
        (".mkv", "libx265", {"x265-params": "log-level=none"}),
        (".webm", "libvpx-vp9", {"cpu-used": "8"}),
        (".mp4", "mpeg4", {"qmin": "1", "qmax": "1"}),
        (".avi", "mjpeg", {}),
    ],
)
def test_codecs_and_containers(tmp_path: Path, suffix: str, codec: str, options: dict[str, str]) -> None:
    path = tmp_path / f"v{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(30):
            image = np.full((48, 64, 3), i * 4, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert decoded(path, 8) == frame_indices(30, 8).tolist()


def test_shape_and_dtype(clip: Path) -> None:
    frames = decode_video(clip, 5)
    assert frames.shape == (5, 48, 64, 3) and frames.dtype == np.uint8


def test_short_video_repeats_frames(tmp_path: Path) -> None:
    assert decoded(write_video(tmp_path / "v.mp4", 3), 7) == [0, 0, 0, 1, 1, 1, 2]


def test_one_frame(tmp_path: Path) -> None:
    assert decoded(write_video(tmp_path / "v.mp4", 1), 4) == [0, 0, 0, 0]


def test_variable_frame_rate_counts_frames_not_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 40, times=[7 * i * i + 10 * i for i in range(40)])
    assert decoded(path, 6) == frame_indices(40, 6).tolist()


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))])
def test_rotation_metadata(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    """The matrix turns counter-clockwise: at 90 degrees the top left corner goes to the bottom left."""
    frame = decode_video(write_video(tmp_path / "v.mp4", 3, rotation=rotation), 1)[0]
    assert frame.shape == ((64, 48, 3) if rotation % 180 else (48, 64, 3))
    assert frame[corner].min() > 240
    assert sum(int(frame[c].min() > 240) for c in [(0, 0), (0, -1), (-1, 0), (-1, -1)]) == 1


def test_clip_takes_frames_shown_in_it(clip: Path) -> None:
    # Ten frames a second, so [1, 2) shows frames 10 to 19.
    assert decoded(clip, 10, (1.0, 2.0)) == list(range(10, 20))
    assert decoded(clip, 4, (1.3, 4.0)) == [13, 21, 30, 39]
    assert decoded(clip, 3, (0.0, 100.0 / 25)) == [0, 19, 39]


def test_sampled_frames_have_their_times(tmp_path: Path) -> None:
    uneven = write_video(tmp_path / "uneven.mp4", 4, times=[0, 100, 200, 1000])
    sampled = sample_video(uneven, 3)
    assert sampled.times == pytest.approx((0, 0.1, 1.0), abs=1e-3)
    assert sampled.duration is not None and sampled.duration > 1.0
    by_time = sample_video(uneven, 3, sampling="time")
    assert by_time.duration == sampled.duration and by_time.times[1] == pytest.approx(0.2, abs=1e-3)
    bare = sample_video(write_video(tmp_path / "bare.h264", 6), 3)
    assert len(bare.frames) == 3 and len(bare.times) in (0, 3)
    assert (bare.duration is None) == (bare.times == ())


def test_clip_of_variable_frame_rate(tmp_path: Path) -> None:
    times = [7 * i * i + 10 * i for i in range(40)]
    inside = [i for i, t in enumerate(times) if 1000 <= t < 5000]
    path = write_video(tmp_path / "v.mp4", 40, times=times)
    assert decoded(path, len(inside), (1.0, 5.0)) == inside


def test_clip_skips_what_comes_before_its_key_frame(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[float] = []
    inside = video.inside
    monkeypatch.setattr(video, "inside", lambda seconds, clip: checked.append(seconds) or inside(seconds, clip))
    frames = sample_video(clip, 5, (4.0, 4.5), thinned=False).frames
    assert list(map(which_frame, frames)) == [40, 41, 42, 43, 44]
    assert min(checked) == pytest.approx(3.6), "key frames are 12 apart"


def test_wrong_count_is_found_and_corrected(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number of packets costs a second decode, and never gives a wrong frame."""
    expected = decoded(clip, 9)
    for wrong in (20, 70):
        found = Packets(times=np.arange(wrong) / 10, end=wrong / 10, origin=0)
        monkeypatch.setattr(video, "read_packets", lambda path, clip, found=found: found)
        assert decoded(clip, 9) == expected
    monkeypatch.setattr(video, "read_packets", lambda path, clip: Packets())
    assert decoded(clip, 9) == expected
    assert decoded(clip, 10, (1.0, 2.0)) == list(range(10, 20))


def test_only_transformed_frames_are_kept(clip: Path) -> None:
    corners = decode_video(clip, 50, transform=lambda frame: frame[:1, :1])
    assert corners.shape == (50, 1, 1, 3)


def test_a_cover_picture_is_not_a_video(tmp_path: Path) -> None:
    """A song with a cover: FFmpeg lists the picture as a video stream."""
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        container.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(picture.encode())
    with pytest.raises(DecodeError, match="no video stream"):
        decode_video(path, 4)


class TestBadFiles:
    @pytest.fixture
    def bad(self, tmp_path: Path, clip: Path) -> dict[str, Path]:
        late_index = write_video(tmp_path / "late.mp4", 50)
        webm = write_video(tmp_path / "w.webm", 20, codec="libvpx-vp9", options={"cpu-used": "8"})
        avi = write_video(tmp_path / "a.avi", 20, codec="mpeg4")
        empty, junk, text = tmp_path / "empty.mp4", tmp_path / "junk.mp4", tmp_path / "text.mp4"
        empty.touch()
        junk.write_bytes(np.random.default_rng(0).bytes(5000))
        text.write_text("<html>404 Not Found</html>")
        folder = tmp_path / "folder.mp4"
        folder.mkdir()
        return {
            "cut": truncate(clip, tmp_path / "cut.mp4", 0.6),
            "cut late": truncate(late_index, tmp_path / "cut_late.mp4", 0.6),
            "cut webm": truncate(webm, tmp_path / "cut.webm", 0.7),
            "cut avi": truncate(avi, tmp_path / "cut.avi", 0.7),
            "empty": empty,
            "junk": junk,
            "text": text,
            "zero": write_video(tmp_path / "zero.mkv", 0),
            "audio": write_audio(tmp_path / "audio.mp4"),
            "missing": tmp_path / "missing.mp4",
            "folder": folder,
        }

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("cut", "cut off: its 'mdat' box should end"),
            ("cut late", "cut off: its"),
            ("cut webm", "cut off: it should hold"),
            ("cut avi", "cut off: it should hold"),
            ("empty", "the file is empty"),
            ("junk", "Invalid data"),
            ("text", "Invalid data"),
            ("zero", "holds no frame"),
            ("audio", "holds no video stream"),
            ("missing", "No such file"),
            ("folder", "directory"),
        ],
    )
    def test_reason(self, bad: dict[str, Path], name: str, reason: str) -> None:
        with pytest.raises(DecodeError) as caught:
            decode_video(bad[name], 8)
        assert str(caught.value).startswith(f"{bad[name]}: ") and reason in str(caught.value)

    def test_every_truncation_of_an_mp4_is_refused(self, tmp_path: Path, clip: Path) -> None:
        for share in np.linspace(0, 0.999, 23):
            with pytest.raises(DecodeError):
                decode_video(truncate(clip, tmp_path / "cut.mp4", float(share)), 8)

    def test_damage_inside_is_refused(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        path = tmp_path / "noise.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=10, options={"threads": "1"})  # the same bytes each time
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(30):
                image = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 400] = b"\xff" * 400
        path.write_bytes(content)
        with pytest.raises(DecodeError, match=r"damaged|failed after"):
            decode_video(path, 30)

    def test_empty_and_late_clips(self, clip: Path) -> None:
        with pytest.raises(DecodeError, match=r"no frame between 1\.01 and 1\.05 s"):
            decode_video(clip, 8, (1.01, 1.05))
        with pytest.raises(DecodeError, match=r"last frame is at 4\.90 s, before the clip's end at 9 s"):
            decode_video(clip, 8, (2.0, 9.0))

    def test_frames_that_change_size(self, clip: Path) -> None:
        sizes = iter(range(8, 60))
        with pytest.raises(DecodeError, match="change size"):
            decode_video(clip, 4, transform=lambda frame: frame[: next(sizes)])


def test_complete_files_are_not_truncated(tmp_path: Path, clip: Path) -> None:
    assert truncation(clip) is None
    # Junk after the last box, which players ignore.
    padded = tmp_path / "padded.mp4"
    padded.write_bytes(clip.read_bytes() + b"\x7f" * 100)
    assert truncation(padded) is None and len(decoded(padded, 4)) == 4
    zeros = tmp_path / "zeros.mp4"
    zeros.write_bytes(clip.read_bytes() + b"\0" * 100)
    assert truncation(zeros) is None
    fragmented = write_video(tmp_path / "f.mp4", 30, container_options={"movflags": "frag_keyframe+empty_moov"})
    assert truncation(fragmented) is None and decoded(fragmented, 5) == frame_indices(30, 5).tolist()


class TestImages:
    def test_decodes_rgb(self, tmp_path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        assert (decode_image(tmp_path / "a.png") == pixels).all()

    def test_other_modes_become_rgb(self, tmp_path: Path) -> None:
        for mode in ("L", "RGBA", "P", "CMYK"):
            path = tmp_path / f"{mode}.tiff"
            Image.new(mode, (5, 4)).save(path)
            assert decode_image(path).shape == (4, 5, 3)

    def test_orientation_tag_is_applied(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
        assert decode_image(tmp_path / "a.jpg").shape == (30, 20, 3)

    def test_bad_files(self, tmp_path: Path) -> None:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.jpg")
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "text.jpg").write_text("not an image")
        cases = {
            truncate(tmp_path / "a.jpg", tmp_path / "cut.jpg", 0.5): "truncated",
            tmp_path / "empty.jpg": "empty",
            tmp_path / "text.jpg": "not an image",
            tmp_path / "missing.jpg": "No such file",
        }
        for path, reason in cases.items():
            with pytest.raises(DecodeError) as caught:
                decode_image(path)
            assert str(path) in str(caught.value) and reason in str(caught.value)


class TestDuration:
    @pytest.mark.parametrize(
        ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")]
    )
    def test_is_that_of_the_video(self, tmp_path: Path, name: str, codec: str) -> None:
        path = write_video(tmp_path / name, 37, codec=codec)
        assert duration(path) == pytest.approx(3.7, abs=0.01)

    def test_index_at_the_end(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.mp4", 37, container_options={"movflags": "faststart"})
        assert duration(path) == pytest.approx(3.7)

    def test_damaged_headers(self, tmp_path: Path) -> None:
        """`duration` returns for any bytes and raises nothing."""
        rng = np.random.default_rng(0)
        contents = [write_video(tmp_path / name, 20).read_bytes() for name in ("a.mp4", "a.mkv", "a.avi")]
        path = tmp_path / "damaged"
        for i in range(150):
            content = bytearray(contents[i % 3])
            for place in rng.integers(0, min(len(content), 400), 12):
                content[place] = rng.integers(256)
            path.write_bytes(content[: int(rng.integers(0, len(content)))])
            found = duration(path)
            assert found is None or found == found
        path.write_bytes(b"")
        assert duration(path) is None


def test_frames_that_end_before_their_stream_are_damage(tmp_path: Path) -> None:
    """A demuxer that meets damage in a Matroska file stops there, as if the video were short."""
    path = write_video(tmp_path / "a.webm", 40, codec="libvpx-vp9", options={"cpu-used": "8"})
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        positions = [p.pos for p in container.demux(video=0) if p.size]
    content[positions[15] :] = b"\x00" * (len(content) - positions[15])
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=r"its frames end at 1\.\d+ s of 4\.00 s; the file is damaged"):
        decode_video(path, 5)


def test_stills_and_huge_frames_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.mp4", "JPEG")
    with pytest.raises(DecodeError, match=r"a\.mp4: a still image \(jpeg\), not a video"):
        decode_video(tmp_path / "a.mp4", 5)
    monkeypatch.setattr(packets, "MAX_PIXELS", 3000)
    with pytest.raises(DecodeError, match="frames of 64 x 48 pixels are more than can be decoded"):
        decode_video(clip, 5)


def test_pipes_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    assert duration(tmp_path / "a.mp4") is None
    with pytest.raises(DecodeError, match="a pipe or a device"):
        decode_video(tmp_path / "a.mp4", 5)
