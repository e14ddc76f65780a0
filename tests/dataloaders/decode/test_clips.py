"""A file is the source of a clip, or the clip itself, which is then used whole; where it may be either, it is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from dataloaders.decode.clips import clip_in
from dataloaders.decode.dali import request
from dataloaders.decode.decoder import DecodePool, decode_file
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.video import iter_frames, probe, sample_video
from dataloaders.records import Media
from tests.media import which_frame, write_video

FILE = Path("v.mp4")
SPLIT = (129.8, 184.0)
"""A clip of 54.2 s."""


@pytest.mark.parametrize(
    ("clip", "ends"),
    [
        (SPLIT, (600.0, 600.0)),
        (SPLIT, (184.0, 184.0)),
        (SPLIT, (150.0, 184.0)),
        (SPLIT, (183.1, 183.1)),
        ((0.0, 40.0), (40.0, 40.0)),
        ((0.0, 40.0), (39.1, 39.1)),
        ((0.3, 40.0), (39.5, 39.5)),
    ],
)
def test_sources(clip: tuple[float, float], ends: tuple[float, float]) -> None:
    """Also one that ends a little before the clip, and one that the sound makes long enough."""
    assert clip_in(FILE, clip, ends, 1.0) == clip


@pytest.mark.parametrize(
    ("clip", "ends"),
    [
        (SPLIT, (54.2, 54.2)),
        (SPLIT, (53.3, 53.3)),
        (SPLIT, (54.2, 60.0)),
        (SPLIT, (40.0, 54.3)),
        ((5.0, 20.0), (15.0, 15.0)),
        ((0.5, 10.0), (9.5, 9.5)),
    ],
)
def test_files_that_are_the_clip(clip: tuple[float, float], ends: tuple[float, float]) -> None:
    assert clip_in(FILE, clip, ends, 1.0) is None


@pytest.mark.parametrize(
    ("clip", "ends", "reason"),
    [
        (
            (5.0, 20.0),
            (15.8, 15.8),
            r"^v\.mp4: lasts 15\.80 s, so it may be the clip from 5 to 20 s or the start of its source",
        ),
        ((0.5, 10.0), (9.8, 9.8), "so it may be the clip from 0.5 to 10 s"),
        (SPLIT, (80.0, 80.0), r"^v\.mp4: its last frame is at 1\.00 s, before the clip's end at 184 s"),
        (SPLIT, (20.0, 20.0), "before the clip's end at 184 s"),
        ((0.0, 40.0), (20.0, 20.0), "before the clip's end at 40 s"),
    ],
)
def test_files_that_are_neither_or_may_be_both(
    clip: tuple[float, float], ends: tuple[float, float], reason: str
) -> None:
    with pytest.raises(DecodeError, match=reason):
        clip_in(FILE, clip, ends, 1.0)


def test_every_decoder_uses_it_whole(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 40)  # 4 s
    sampled = sample_video(path, 8, (129.8, 133.8))
    assert [which_frame(frame) for frame in sampled.frames] == [0, 5, 11, 16, 22, 27, 33, 39]
    assert sampled.facts.cut_before and not sample_video(path, 8, (1.0, 3.0)).facts.cut_before
    assert [which_frame(f) for f in sample_video(path, 8, (129.8, 133.8), sampling="time").frames][-1] == 39
    found = probe(path, (129.8, 133.8))
    assert (found.first, found.total) == (0, 40)
    media = Media("k", path, clip=(129.8, 133.8))
    prepared = request.prepare(
        Media("k", path.rename(tmp_path / "w.mp4"), clip=(129.8, 133.8)), 8, Preprocess(32, 32), "cuda"
    )
    assert isinstance(prepared, request.DecodeRequest) and prepared.facts.cut_before
    (tmp_path / "needed.mp4").write_bytes(prepared.content)
    needed = list(iter_frames(tmp_path / "needed.mp4", range(40)))
    assert [which_frame(needed[i]) for i in prepared.indices] == [0, 5, 11, 16, 22, 27, 33, 39]
    media = prepared.media
    with DecodePool(partial(decode_file, num_frames=8, preprocess=Preprocess(32, 32)), 0) as pool:
        (decoded,) = pool.map([media])
    assert decoded.facts.cut_before and decoded.media == media
