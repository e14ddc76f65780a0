"""Points are drawn at the trajectory's positions, and absent points are not drawn."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pite.draw import COLORS, Track, draw_frame, save_strip, save_video

FRAMES = np.zeros((5, 40, 60, 3), dtype=np.uint8)


def trajectory(x: float, y: float) -> np.ndarray:
    return np.broadcast_to(np.array([x, y], dtype=np.float32), (1, 5, 2)).copy()


def centre_of(picture: Image.Image, color: tuple[int, int, int]) -> tuple[float, float]:
    """Centre of the pixels of one colour, as fractions of width and height."""
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    rows, columns = np.nonzero(np.abs(pixels - color).sum(-1) < 60)
    assert len(rows)
    return (columns.mean() + 0.5) / pixels.shape[1], (rows.mean() + 0.5) / pixels.shape[0]


@pytest.mark.parametrize(("x", "y"), [(0.25, 0.75), (0.5, 0.5), (0.8, 0.2)])
def test_dot_at_the_prediction_and_ring_at_the_truth(x: float, y: float) -> None:
    picture = draw_frame(FRAMES[0], [Track("a dog", trajectory(x, y), trajectory(1 - x, y))], 0)
    assert picture.size == (320, 213)
    assert centre_of(picture, COLORS[0]) == pytest.approx((x, y), abs=0.01)
    if x != 0.5:
        assert centre_of(picture, (255, 255, 255)) == pytest.approx((1 - x, y), abs=0.01)


def test_absent_points_and_other_times_are_not_drawn() -> None:
    true = trajectory(0.5, 0.5)
    true[0, 2:] = -1.0
    known = Track("a dog", trajectory(0.5, 0.5), true)
    spanned = Track("a dog", trajectory(0.5, 0.5), span=(0, 1))
    for track in (known, spanned):
        assert np.asarray(draw_frame(FRAMES[1], [track], 1)).any()
        assert not np.asarray(draw_frame(FRAMES[2], [track], 2)).any()


def test_tracks_get_colours_of_their_own() -> None:
    tracks = [Track("a", trajectory(0.2, 0.5)), Track("b", trajectory(0.8, 0.5))]
    picture = draw_frame(FRAMES[0], tracks, 0)
    assert centre_of(picture, COLORS[0])[0] == pytest.approx(0.2, abs=0.01)
    assert centre_of(picture, COLORS[1])[0] == pytest.approx(0.8, abs=0.01)


def test_strip_is_a_png_of_the_frames_with_tracks(tmp_path: Path) -> None:
    path = tmp_path / "new" / "strip.png"
    tracks = [Track("a very long noun phrase that needs a row of its own", trajectory(0.5, 0.5)) for _ in range(3)]
    save_strip(path, FRAMES, tracks, columns=2, title="During which frames can we see it? " * 5, width=160)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == 2 * (160 + 12) + 12
        assert centre_of(picture, COLORS[2])


@pytest.mark.parametrize("width", [101, 160])
def test_video_holds_every_frame(tmp_path: Path, width: int) -> None:
    path = tmp_path / "overlay.mp4"
    save_video(path, FRAMES, [Track("a dog", trajectory(0.25, 0.5), trajectory(0.25, 0.5))], fps=4, width=width)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 4
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(decoded) == len(FRAMES)
    assert decoded[0].shape[1] == width + width % 2


def test_nothing_to_draw_still_shows_the_video(tmp_path: Path) -> None:
    save_strip(tmp_path / "strip.png", FRAMES, [], columns=3)
    save_video(tmp_path / "video.mp4", FRAMES, [])
    assert Image.open(tmp_path / "strip.png").width == 3 * 332 + 12
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == len(FRAMES)


def test_frames_of_another_size_are_scaled_to_the_first(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    frames = [*FRAMES[:2], np.full((90, 30, 3), 200, np.uint8)]
    save_video(path, frames, [])
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 3 and len({frame.shape for frame in shown}) == 1
    height = round(480 * FRAMES.shape[1] / FRAMES.shape[2])
    assert abs(int(shown[2][: height - 4].mean()) - 200) < 4
