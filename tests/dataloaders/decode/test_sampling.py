"""Sampling by index is the published rule; sampling by time shows frame k of N at k / N of the video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataloaders.decode.decoder import DecodePool, decode_file
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.sampling import frame_indices, is_uneven, sampled_indices
from dataloaders.decode.video import decode_video, probe, sample_video
from dataloaders.records import Media
from tests.media import which_frame, write_video

TWO_SPEEDS = np.concatenate([np.arange(20) * 0.5, 10 + np.arange(80) * 0.05])
"""Twenty frames in 10 s, then eighty in 4 s."""


@pytest.mark.parametrize("rate", [10, 24, 25, 29.97, 60])
@pytest.mark.parametrize("digits", [3, 9], ids=["Matroska", "MP4"])
def test_both_rules_agree_at_a_constant_rate(rate: float, digits: int) -> None:
    for total in (1, 2, 3, 40, 100, 301, 1560):
        times, end = np.round(np.arange(total) / rate, digits), total / rate
        for n in (1, 5, 100):
            by_index, by_time = frame_indices(total, n), sampled_indices(times, end, n, "time")
            # Where a multiple of the step falls on a frame, linspace may be just below it.
            assert np.abs(by_index - by_time).max() <= 1 and (by_index != by_time).mean() <= 0.1
            assert not is_uneven(times, end, n)


def test_two_speeds() -> None:
    n, end = 100, 14.0
    moments = np.arange(n) / n * end
    by_index = TWO_SPEEDS[sampled_indices(TWO_SPEEDS, end, n, "index")]
    by_time = TWO_SPEEDS[sampled_indices(TWO_SPEEDS, end, n, "time")]
    assert np.abs(by_index - moments).max() > 7 and is_uneven(TWO_SPEEDS, end, n)
    assert np.abs(by_time - moments).max() <= 0.5, "no more than the time for which a frame is shown"


def test_unknown_times_are_sampled_by_index() -> None:
    times = np.array([0.0, np.nan, 0.2])
    assert sampled_indices(times, 0.3, 6, "time").tolist() == frame_indices(3, 6).tolist()
    assert not is_uneven(times, 0.3, 6)
    assert sampled_indices(np.zeros(0), 0.0, 6, "time").tolist() == []
    assert sampled_indices(np.zeros(4), 0.0, 4, "time").tolist() == [0, 1, 2, 3]


def test_a_video(tmp_path: Path) -> None:
    """Ten frames in five seconds, thirty in the sixth: by time, most frames come from the first five seconds."""
    times = [500 * i for i in range(10)] + [5000 + 33 * i for i in range(30)]
    path = write_video(tmp_path / "v.mp4", 40, times=times)
    frames = [which_frame(frame) for frame in decode_video(path, 12, sampling="time")]
    lasts = probe(path).packets.end
    moments = np.linspace(0, 39, 12) / 40 * lasts
    assert frames == [sum(time <= 1000 * moment + 1 for time in times) - 1 for moment in moments]
    assert frames[8] < 10, "most frames come from the slow part"
    assert [which_frame(frame) for frame in decode_video(path, 12)] == frame_indices(40, 12).tolist()
    assert sample_video(path, 12).facts.uneven and sample_video(path, 12, (0.0, 4.9)).facts.uneven is False


def test_uneven_files_are_marked(tmp_path: Path) -> None:
    even = write_video(tmp_path / "even.mp4", 20)
    uneven = write_video(
        tmp_path / "uneven.mp4", 40, times=[10 * i for i in range(20)] + [1000 * i for i in range(1, 21)]
    )
    media = [Media("e", even), Media("u", uneven)]
    with DecodePool(lambda m: decode_file(m, 10, Preprocess(32, 32)), 0) as pool:
        assert [decoded.facts.uneven for decoded in pool.map(media)] == [False, True]


def test_segments_leave_out_the_last_frame_and_repeat_frames_of_short_videos() -> None:
    """Properties of PG-Video-LLaVA's rule; tests/golden holds its tables."""
    for total in range(1, 400):
        chosen = sampled_indices(np.arange(total) / 25, total / 25, 100, "segments")
        assert len(chosen) == min(total, 100) and (np.diff(chosen) >= 0).all()
        assert chosen[0] >= 0 and (total == 1 or chosen[-1] < total - 1)
        assert not 2 <= total <= 100 or len(set(chosen)) < total
    assert len(sampled_indices(np.zeros(0), 0.0, 100, "segments")) == 0
