"""Things that change their shape are followed as wholes; rigid ones stay with Lucas-Kanade where it has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataloaders.annotation.appearance import Appearance, Candidates, object_pixels
from dataloaders.annotation.background import Background, background_of, known_pixels
from dataloaders.annotation.linking import link
from dataloaders.annotation.objects import follow_objects, track_all
from dataloaders.annotation.tracking import Moments, track_events
from dataloaders.records import ABSENT
from dataloaders.synthetic.render import write_mp4

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-contrib-python-headless")

HEIGHT, WIDTH, LAST = 120, 240, 30
RNG = np.random.default_rng(0)
COAT, TROUSERS, STRANGER = (150, 40, 40), (40, 40, 130), (40, 140, 60)


def walker(frame: np.ndarray, left: int, top: int, upper: tuple[int, ...], lower: tuple[int, ...]) -> None:
    """Draw 16 x 40 pixels in two colours, with another texture in each frame, so that no small piece can be tracked."""
    for rows, colour in ((slice(top, top + 20), upper), (slice(top + 20, top + 40), lower)):
        texture = RNG.integers(-35, 36, (10, 8, 1)).repeat(2, 0).repeat(2, 1)
        area = frame[rows, max(left, 0) : max(left + 16, 0)]
        area[:] = np.clip(
            np.array(colour) + texture[:, 16 - area.shape[1] :] if left < 0 else colour + texture, 0, 255
        )[:, : area.shape[1]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A walker goes left, behind a pole and past a stranger, and leaves; with the left edge in each frame."""
    path = tmp_path_factory.mktemp("objects") / "walker.mp4"
    lefts = 130 - 6 * np.arange(LAST + 1)
    background = RNG.integers(110, 150, (HEIGHT // 4, WIDTH // 4, 1), np.uint8).repeat(3, 2).repeat(4, 0).repeat(4, 1)
    frames = np.tile(background, (LAST + 1, 1, 1, 1))
    for k, frame in enumerate(frames):
        walker(frame, int(lefts[k]), 40, COAT, TROUSERS)
        walker(frame, 10 + 5 * k, 44, STRANGER, STRANGER)
        frame[:, 92:104] = 220
    write_mp4(path, frames)
    return path, lefts


def first_mask(lefts: np.ndarray) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[40:80, lefts[0] : lefts[0] + 16] = True
    return mask


def test_a_walker_is_followed_past_a_pole_and_a_stranger_and_is_absent_once_outside(clip) -> None:
    path, lefts = clip
    moments, masks = Moments(np.arange(LAST + 1)), [[first_mask(lefts)]]
    lost = track_events(path, [moments], masks).get((0, 0))
    assert lost is None or (lost[:, 5:] == ABSENT).all()
    tracks = track_all(path, [moments], masks)[0, 0]
    assert tracks.shape[1:] == (LAST + 1, 2)
    present = (tracks != ABSENT).all(-1)
    x, y = tracks[..., 0] * WIDTH, tracks[..., 1] * HEIGHT
    inside = present & (x >= lefts - 2) & (x <= lefts + 18) & (y >= 38) & (y <= 82)
    clear = (lefts > 0) & ((lefts > 106) | (lefts < 74)) & (np.abs(lefts - (10 + 5 * np.arange(LAST + 1))) > 20)
    assert clear.sum() >= 10
    assert inside[:, clear].mean() > 0.9
    assert not present[:, lefts < -14].any()


def test_a_rigid_thing_has_the_tracks_of_lucas_kanade(tmp_path) -> None:
    texture = RNG.integers(0, 256, (12, 12, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.full((12, 120, 160, 3), 90, np.uint8)
    for k, frame in enumerate(frames):
        frame[30:78, 20 + 4 * k : 68 + 4 * k] = texture
    write_mp4(tmp_path / "rigid.mp4", frames)
    mask = np.zeros((120, 160), bool)
    mask[30:78, 20:68] = True
    moments = [Moments(np.arange(12))]
    expected = track_events(tmp_path / "rigid.mp4", moments, [[mask]])
    assert (track_all(tmp_path / "rigid.mp4", moments, [[mask]])[0, 0] == expected[0, 0]).all()
    # Lost by Lucas-Kanade, it would be followed as a whole, and as exactly.
    followed = follow_objects(tmp_path / "rigid.mp4", moments, [[mask]], [(0, 0)])[0, 0]
    truth = followed[:, :1] + np.stack((4 * np.arange(12) / 160, np.zeros(12)), -1)
    assert np.abs((followed - truth) * (160, 120)).max() < 0.3


def test_a_place_that_shows_the_background_is_none_of_the_objects(tmp_path) -> None:
    """A dark walker on a dark road leaves, and a pole of its colours stays: only the background separates them."""
    road = RNG.integers(40, 60, (HEIGHT // 4, WIDTH // 4, 1), np.uint8).repeat(3, 2).repeat(4, 0).repeat(4, 1)
    road[40:80, 20:36] = (150, 40, 40)
    frames = np.tile(road, (LAST + 1, 1, 1, 1))
    for k, frame in enumerate(frames[:8]):
        walker(frame, 130 + 14 * k, 40, COAT, COAT)
    background = background_of(frames)
    assert background is not None and (background.picture == road).all() and background.settled.all()
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[38:82, 128:148] = True
    appearance = Appearance(cv2, frames[0], mask, background)
    assert (appearance.pixels[:, 128:130] == 0).all() and appearance.pixels[60, 138]
    assert any(np.abs(centre - (152, 60)).max() < 4 for centre in appearance.find(frames[1]).centres)
    assert not len(appearance.find(frames[20]).scores)
    assert len(Appearance(cv2, frames[0], mask).find(frames[20]).scores)
    # A median that contains the object itself is not used for it.
    box, settled = np.array([128, 38, 148, 82]), np.ones(mask.shape, bool)
    assert known_pixels(frames[0], Background(frames[0], settled), box) is None
    known = known_pixels(frames[0], background, box)
    assert known is not None and known[60, 138] and not known[60, 128] and known[60, 28]
    # Nor does one in which its surroundings change halfway.
    settled[20:100, 140:] = False
    assert known_pixels(frames[0], Background(road, settled), box) is None


def test_a_moving_camera_has_no_background() -> None:
    scene = RNG.integers(0, 256, (60, 400, 3), np.uint8)
    assert background_of([scene[:, 8 * k : 8 * k + 80] for k in range(25)]) is None
    assert background_of([scene[:, :80]] * 2) is None


def found(*places: tuple[float, float, float]) -> Candidates:
    """Candidates at (x, 0) with a score and a velocity along x."""
    x, scores, speeds = np.array(places, float).reshape(-1, 3).T
    zero = np.zeros(len(x))
    return Candidates(np.stack((x, zero), -1), np.full(len(x), 4), scores, np.stack((speeds, zero), -1))


def test_the_best_way_leaves_out_frames_in_which_the_object_is_hidden_and_ends_when_it_is_gone() -> None:
    size, frame = np.array([20.0, 20.0]), np.array([500, 100])
    going = [found((5 * t, 1, 5)) for t in range(20)]
    assert link(going, size, frame) == dict.fromkeys(range(20), 0)
    hidden = [*going[:4], found(), found(), found(), *going[7:]]
    assert link(hidden, size, frame) == dict.fromkeys([*range(4), *range(7, 20)], 0)
    # Then a stranger who looks the same stands where the object came from: the motion decides.
    stranger = [*going[:4], *[found()] * 3, *[found((-15, 1, 0), (5 * t, 1, 5)) for t in range(7, 20)]]
    assert [link(stranger, size, frame)[t] for t in range(7, 20)] == [1] * 13
    assert link([*going[:4], *[found((400, 1, 0))] * 16], size, frame) == dict.fromkeys(range(4), 0)
    # What leaves the picture is not mixed up with a stranger at its edge.
    leaving = [*going[:4], found(), *[found((17, 1, 0))] * 15]
    assert link(leaving, size, frame) == dict.fromkeys([*range(4), *range(5, 20)], 0)
    assert link(leaving, size, np.array([18, 100])) == dict.fromkeys(range(4), 0)


def test_a_box_is_separated_from_its_background_and_a_mask_is_kept() -> None:
    frame = RNG.integers(100, 130, (80, 80, 3), np.uint8)
    frame[20:60, 34:46] = RNG.integers(0, 40, (40, 12, 3))
    box = np.zeros((80, 80), bool)
    box[18:62, 26:54] = True
    pixels = object_pixels(cv2, frame, box)
    thing = np.zeros_like(box)
    thing[20:60, 34:46] = True
    assert (pixels & thing).sum() > 0.9 * thing.sum() and (pixels & ~thing).sum() < 0.1 * thing.sum()
    assert (object_pixels(cv2, frame, np.tril(box)) == np.tril(box)).all()
    plain = object_pixels(cv2, np.full_like(frame, 90), box)  # Nothing to separate: the middle of the box.
    assert plain[40, 40] and not plain[18, 26] and (plain <= box).all()
