"""The plots of temporal grounding are pictures, and show what they are drawn from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pite.evaluate import plots
from pite.evaluate.__main__ import main
from pite.evaluate.grounding import Events
from pite.evaluate.predictions import Prediction
from tests.commands import status_of
from tests.pite.evaluate.test_evaluate import GOLDEN

FILES = ["--predictions", f"{GOLDEN}/predictions.jsonl", "--ground-truth", f"{GOLDEN}/ground_truth.json"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def share_of(picture: np.ndarray, colour: str) -> float:
    """Share of the pixels that have a colour, such as #1f77b4."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((picture == wanted).all(-1).mean())


def test_both_plots_are_drawn_by_flag(tmp_path: Path) -> None:
    drawn = ["--histogram", f"{tmp_path}/new/h.png", "--timeline", f"{tmp_path}/new/t.png"]
    assert main(["grounding", *FILES, *drawn]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["h.png", "t.png"]
    for name in ("h.png", "t.png"):
        picture = pixels(tmp_path / "new" / name)
        assert min(picture.shape[:2]) > 300
        assert share_of(picture, plots._TRUE) > 0.01


def test_a_time_line_shows_long_and_short_intervals(tmp_path: Path) -> None:
    """The predicted colour covers what the answers name: none, a tenth, all of the video."""
    truth = {"v": events()}
    shares = []
    for answer in ("It $is$ not there.", "From 45 to 55.", "From 0 to 100."):
        prediction = predicted(answer)
        plots.draw_timeline(tmp_path / "t.png", [prediction], truth, 100)
        shares.append(share_of(pixels(tmp_path / "t.png"), plots._PREDICTED))
    assert shares[0] == 0 < shares[1]
    assert shares[2] > 5 * shares[1]


def events() -> Events:
    return Events(((0.4, 0.6),), ("A $dog runs for $5.",), 10.0)


def predicted(answer: str) -> Prediction:
    return Prediction("v", "grounding", 0, answer, {"sentence_id": 0})


@pytest.mark.parametrize("flag", ["--histogram", "--timeline"])
def test_another_format_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, ["grounding", *FILES, flag, f"{tmp_path}/plot.jpg"]) == 2
    assert "a PNG is written, so give a name that ends in .png" in capsys.readouterr().err
