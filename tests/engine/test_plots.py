"""Loss curves: how metrics.jsonl is read, and what the picture holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.plots import main, plot_losses, read_curves, smooth
from tests.commands import status_of


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_step_logged_again_after_a_resume_replaces_the_earlier_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        [{"step": 1, "ce": 3.0}, {"step": 2, "ce": 2.0, "l1": None}, {"step": 2, "ce": 1.0, "l1": 0.5}],
    )
    metrics = read_curves(path)
    np.testing.assert_array_equal(metrics["step"], [1, 2])
    np.testing.assert_array_equal(metrics["ce"], [3.0, 1.0])
    np.testing.assert_array_equal(metrics["l1"], [np.nan, 0.5])


def test_running_mean_leaves_gaps_out() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, np.nan, 3.0, 5.0]), 3), [1.0, 2.0, 4.0, 4.0])
    assert np.isnan(smooth(np.full(3, np.nan), 1)).all()


def test_one_column_per_stage_and_one_row_per_curve(tmp_path: Path) -> None:
    first = write(tmp_path / "stage1" / "metrics.jsonl", [{"step": i, "ce": 1 / i, "l1": 0.1} for i in range(1, 9)])
    last = write(tmp_path / "stage3" / "metrics.jsonl", [{"step": i, "ce": 1 / i, "l1": 0.0} for i in range(1, 9)])
    plot_losses({"one": first}, tmp_path / "one.png")
    assert main([str(tmp_path / "stage1"), str(last), "--output", str(tmp_path / "new" / "two.png")]) == 0
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "new" / "two.png") as two:
        assert two.width == pytest.approx(2 * one.width, abs=2)
        assert two.height == one.height


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"metrics\.jsonl: holds no step"),
        ('{"step": 1}\n{"ce": 2}\n', r"metrics\.jsonl:2: not a JSON object with a step"),
        ('{"step": 1, "l', r"metrics\.jsonl:1: not a JSON object with a step"),
        ('{"step": 1, "lr": 0.1}', r"none of .*metrics\.jsonl holds a loss"),
    ],
)
def test_unreadable_logs_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        plot_losses({"stage": tmp_path / "metrics.jsonl"}, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_missing_log_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.jsonl")]) == 1
    assert capsys.readouterr().err == f"engine.plots: STAGES {tmp_path / 'none.jsonl'}: no such file\n"


def test_a_picture_of_another_kind_is_refused(capsys) -> None:
    assert status_of(main, ["run/stage1", "--output", "curves.docx"]) == 2
    assert capsys.readouterr().err == (
        "engine.plots: --output curves.docx: a PNG is written, so give a name that ends in .png\n"
    )
