"""Odd but legal videos decode as FFmpeg's command line and players show them."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.media import link_ffmpeg
from dataloaders.decode.dali import request
from dataloaders.decode.decoder import Decoded, DecodePool, decode_file
from dataloaders.decode.orientation import UPRIGHT, nearest, upright
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.video import decode_video, probe, sample_video
from dataloaders.media import wrong_duration
from dataloaders.records import Media
from tests.media import which_frame, write_video
from tests.odd_media import (
    CORNERS,
    MATRICES,
    Track,
    picture,
    write_matrix,
    write_piped,
    write_resized,
    write_tracks,
)

SLIDES = {".mov": "libx264", ".flv": "flv"}
"""Codecs of slides; others are in MPEG-4."""

FILM, COVER = Track(20, default=True), Track(1, size=(48, 80), offset=50, codec="mjpeg", default=False)
PREVIEW = Track(4, size=(32, 24), offset=50, default=False)


def decoded(path: Path, num_frames: int, clip: tuple[float, float] | None = None) -> list[int]:
    return [which_frame(frame) for frame in decode_video(path, num_frames, clip)]


class TestOrientation:
    @pytest.mark.parametrize("name", MATRICES)
    def test_display_matrices(self, tmp_path: Path, name: str) -> None:
        path = write_matrix(tmp_path / "v.mp4", MATRICES[name])
        assert probe(path).orientation == MATRICES[name]
        frame = decode_video(path, 1)[0]
        corners = {(y, x): frame[y, x].min() > 240 for y in (0, -1) for x in (0, -1)}
        assert [corner for corner, white in corners.items() if white] == [CORNERS[name]]

    @pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (-1, 0, 0, -1), (0, -1, 1, 0), *MATRICES.values()])
    def test_pixels_go_where_the_matrix_puts_them(self, matrix: tuple[int, int, int, int]) -> None:
        a, b, c, d = matrix
        frame = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
        shown = upright(frame, matrix)
        assert shown.shape == ((3, 5, 3) if a else (5, 3, 3)) and shown.flags["C_CONTIGUOUS"]
        for y in range(3):
            for x in range(5):
                # Negative coordinates count from the right and from the bottom.
                to_x, to_y = a * x + c * y, b * x + d * y
                flip_x, flip_y = min(a, c) < 0, min(b, d) < 0
                assert (shown[to_y - flip_y, to_x - flip_x] == frame[y, x]).all()

    def test_other_angles_go_to_the_nearest(self) -> None:
        assert nearest(65000, 3000, -3000, 65000) == UPRIGHT
        assert nearest(3000, -65000, 65000, 3000) == (0, -1, 1, 0)
        assert nearest(-65000, 3000, 3000, 65000) == (-1, 0, 0, 1)
        assert nearest(0, 0, 0, 0) == nearest(1, 1, 1, 1) == UPRIGHT


class TestTimes:
    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    def test_a_picture_that_starts_after_the_sound(self, tmp_path: Path, suffix: str) -> None:
        path = write_tracks(tmp_path / f"v{suffix}", [Track(20, start=3.0)], sound=5.0)
        assert decoded(path, 20) == list(range(20))
        assert decoded(path, 8, (3.55, 4.35)) == list(range(6, 14))
        with pytest.raises(DecodeError, match="no frame between 0 and 2 s"):
            decode_video(path, 5, (0.0, 2.0))

    def test_a_file_without_sound_starts_with_its_first_frame(self, tmp_path: Path) -> None:
        path = write_tracks(tmp_path / "v.ts", [Track(20, start=1000.0)])
        assert decoded(path, 5, (0.5, 1.0)) == [5, 6, 7, 8, 9]

    def test_reordered_frames_in_avi(self, tmp_path: Path) -> None:
        """AVI stores no display times, and FFmpeg's guess is wrong by a frame."""
        path = write_video(tmp_path / "v.avi", 40, options={"bf": "3", "x264-params": "b-adapt=0"})
        assert not probe(path).regular
        assert decoded(path, 40) == list(range(40))
        assert decoded(path, 10, (2.0, 3.0)) == list(range(20, 30))
        assert [which_frame(f) for f in sample_video(path, 10, (2.0, 3.0), sampling="time").frames] == list(
            range(20, 30)
        )

    @pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".flv"])
    def test_a_last_slide_that_is_shown_long(self, tmp_path: Path, suffix: str) -> None:
        path = write_tracks(tmp_path / f"v{suffix}", [Track(6, codec=SLIDES.get(suffix, "mpeg4"))], last=6.0)
        assert decoded(path, 6) == list(range(6))
        assert decoded(path, 4, (0.4, 6.0)) == [4, 4, 4, 5]
        by_time = [which_frame(frame) for frame in sample_video(path, 13, sampling="time").frames]
        assert by_time == [0, 4] + 11 * [5], "frame k of 13 is the one at 0.45 k seconds"
        with pytest.raises(DecodeError, match=r"last frame is at 0\.50 s, before the clip's end at 19 s"):
            decode_video(path, 5, (0.4, 19.0))

    @pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".flv"])
    def test_a_last_slide_with_music(self, tmp_path: Path, suffix: str) -> None:
        """Players hold the last picture until the end of the sound."""
        path = write_tracks(tmp_path / f"v{suffix}", [Track(6, codec=SLIDES.get(suffix, "mpeg4"))], sound=8.0)
        facts = sample_video(path, 6).facts
        pictures, whole = facts.ends
        assert pictures < 0.8 and whole == pytest.approx(8, abs=0.2) and facts.uneven
        assert decoded(path, 4, (0.4, 6.0))[-1] == 5
        assert [which_frame(frame) for frame in sample_video(path, 4, sampling="time").frames] == [0, 5, 5, 5]
        wrong = partial(wrong_duration, ends=facts.ends)
        assert wrong(Media("k", path, duration=8.0)) is None and wrong(Media("k", path, duration=0.6)) is None
        assert "is it another video?" in (wrong(Media("k", path, duration=20.0)) or "")

    def test_sound_that_is_a_little_longer_changes_nothing(self, tmp_path: Path) -> None:
        path = write_tracks(tmp_path / "v.mp4", [Track(20)], sound=2.9)
        assert probe(path).packets.end == 2.0 and not sample_video(path, 5).facts.uneven

    def test_avi_written_into_a_pipe(self, tmp_path: Path) -> None:
        assert decoded(write_piped(tmp_path / "v.avi"), 20) == list(range(20))


class TestStreams:
    @pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
    @pytest.mark.parametrize("first", [COVER, PREVIEW], ids=["cover", "preview"])
    def test_the_default_stream_is_the_film(self, tmp_path: Path, suffix: str, first: Track) -> None:
        path = write_tracks(tmp_path / f"v{suffix}", [first, FILM])
        assert probe(path).packets.stream == 1
        assert decoded(path, 20) == list(range(20))
        assert decoded(path, 5, (0.5, 1.0)) == [5, 6, 7, 8, 9]

    def test_without_a_default_the_longest_is_the_film(self, tmp_path: Path) -> None:
        path = write_tracks(tmp_path / "v.mkv", [Track(5, offset=40, default=False), Track(20, default=False)])
        assert decoded(path, 20) == list(range(20))

    def test_of_equal_lengths_the_larger_is_the_film(self, tmp_path: Path) -> None:
        path = write_tracks(
            tmp_path / "v.mkv", [Track(20, size=(32, 24), offset=30, default=False), Track(default=False)]
        )
        assert decoded(path, 20) == list(range(20))

    def test_a_default_cover_is_no_film(self, tmp_path: Path) -> None:
        path = write_tracks(tmp_path / "v.mkv", [Track(1, offset=50, default=True), Track(20, default=False)])
        assert decoded(path, 20) == list(range(20))


def test_frames_of_two_sizes(tmp_path: Path) -> None:
    path = write_resized(tmp_path / "v.ts")
    frames = sample_video(path, 20).frames
    assert {frame.shape[0] for frame in frames} == {48, 72}
    assert [which_frame(frame) for frame in frames] == list(range(20))


def test_names_that_look_like_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.mp4", "file:x.mp4", "concat:a|b.mp4"):
        write_video(tmp_path / "v.mp4", 5).rename(tmp_path / name)
        assert decoded(Path(name), 5) == list(range(5))


@pytest.mark.parametrize(("form", "name"), [("AVIF", "avif"), ("WEBP", "webp"), ("PNG", "png")])
def test_stills_in_place_of_videos(tmp_path: Path, form: str, name: str) -> None:
    Image.fromarray(picture(3)).save(tmp_path / "v.mp4", form)
    with pytest.raises(DecodeError, match=rf"a still image \({name}.*\), not a video"):
        decode_video(tmp_path / "v.mp4", 5)


def test_a_gif_is_a_video(tmp_path: Path) -> None:
    pictures = [Image.fromarray(picture(i)) for i in range(8)]
    pictures[0].save(tmp_path / "v.mp4", "GIF", save_all=True, append_images=pictures[1:], duration=100)
    assert decoded(tmp_path / "v.mp4", 8) == list(range(8))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Media]:
    """Videos that decoders treat differently: turned, with several streams, late, reordered in AVI."""
    d = tmp_path_factory.mktemp("odd")
    files = {name: write_matrix(d / f"{name}.mp4", matrix, 12, "mpeg4") for name, matrix in MATRICES.items()}
    files |= {
        "cover": write_tracks(d / "cover.mkv", [COVER, FILM]),
        "preview": write_tracks(d / "preview.mp4", [PREVIEW, FILM]),
        "late": write_tracks(d / "late.mp4", [Track(20, start=3.0)], sound=5.0),
        "reordered": write_video(d / "b.avi", 40, options={"bf": "3"}),
        "resized": write_resized(d / "resized.ts"),
        "narrow": write_video(d / "narrow.mp4", 5, size=(2, 640), codec="mpeg4"),
    }
    media = {name: Media(name, path) for name, path in files.items()}
    media["late, a clip"] = Media("late", files["late"], clip=(3.5, 4.0))
    media["reordered, a clip"] = Media("reordered", files["reordered"], clip=(2.0, 3.0))
    return media


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is None, reason="pip install torchcodec")
def test_torchcodec_gives_the_same_frames(
    odd: dict[str, Media], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_ffmpeg(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    decode = partial(decode_file, num_frames=9, preprocess=Preprocess(32, 32))
    with DecodePool(partial(decode, reader="torchcodec"), 1, by="torchcodec") as pool:
        for media, result in zip(odd.values(), pool.map(odd.values())):
            assert isinstance(result.frames, np.ndarray), result.reason
            np.testing.assert_array_equal(result.frames, decode(media).frames, err_msg=media.key)


def test_dali_leaves_odd_videos_to_pyav(odd: dict[str, Media], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(request.CODECS, "cpu", frozenset({"mpeg4", "h264"}))
    expected = {
        **dict.fromkeys(MATRICES, "PyAV (rotated or mirrored)"),
        **dict.fromkeys(("cover", "preview"), "PyAV (several video streams)"),
        **dict.fromkeys(("reordered", "reordered, a clip"), "PyAV (packets without a frame)"),
        "narrow": "PyAV (a long and narrow picture)",
    }
    for name, by in expected.items():
        found = request.prepare(odd[name], 9, Preprocess(32, 32), "cpu")
        assert isinstance(found, Decoded) and found.by == by, name
    late = request.prepare(odd["late, a clip"], 9, Preprocess(32, 32), "cpu")
    assert isinstance(late, Decoded) and late.by == "PyAV (mpeg4 packets)", "a codec whose packets are not read"
