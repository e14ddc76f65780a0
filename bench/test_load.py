"""Other processes on the same cores may not stop training."""

from __future__ import annotations

from pathlib import Path

from bench.load import LEAST_SHARE, make_data, measure


def test_a_quarter_of_the_speed_is_left_under_load(tmp_path: Path) -> None:
    make_data(tmp_path)
    (row,) = measure(tmp_path, rounds=3, steps=15, loops=2, policies=("ours",))
    print(row)
    assert row["share"] >= LEAST_SHARE
