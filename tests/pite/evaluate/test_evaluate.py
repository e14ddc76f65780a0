"""The published grounding numbers, their bounds, and the errors for malformed files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pite.evaluate import metrics
from pite.evaluate.__main__ import main
from pite.evaluate.grounding import Prediction, read_ground_truth, read_predictions, write_predictions
from pite.export.card import read_scores

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "evaluation"


def test_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["grounding"]
    status = main(
        ["grounding", "--predictions", f"{GOLDEN}/predictions.jsonl", "--ground-truth", f"{GOLDEN}/ground_truth.json"]
    )
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[:4])
    assert status == 0
    for name in ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7"):
        assert float(printed[name]) == pytest.approx(expected[name], abs=expected["tolerance"])


def test_the_scores_file_holds_the_printed_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--predictions", f"{GOLDEN}/predictions.jsonl", "--ground-truth", f"{GOLDEN}/ground_truth.json"]
    assert main(["grounding", *files, "--scores", f"{tmp_path}/grounding.json"]) == 0
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[:4])
    scores = json.loads((tmp_path / "grounding.json").read_text())
    assert {name: f"{scores[name]:.2f}" for name in printed} == printed
    card = dict(read_scores(tmp_path / "grounding.json").rows)
    assert card["task"] == "grounding" and card["answers"] == str(scores["answers"])
    assert main(["grounding", *files, "--scores", f"{tmp_path}/grounding.json/none.json"]) == 1
    assert capsys.readouterr().err.startswith(f"pite.evaluate: --scores {tmp_path}/grounding.json/none.json cannot be ")


@pytest.mark.parametrize(
    ("answer", "interval"),
    [
        ("From 05 to 31, a man walks.", (0.05, 0.31)),
        ("This occurs between 72 and 83.", (0.72, 0.83)),
        ("A man of 30 years is there from 10 to 20", (0.10, 0.20)),
        ("From 5 to 31.", None),
        ("I do not know.", None),
    ],
)
def test_intervals_are_read_from_answers(answer: str, interval: tuple[float, float] | None) -> None:
    assert metrics.parse_interval(answer) == interval


def test_frame_indices_count_the_models_own_frames() -> None:
    assert metrics.parse_interval("from 08 to 16", num_frames=32) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("predicted", "true", "iou"),
    [
        ((0.0, 0.5), (0.0, 0.5), 1.0),
        ((0.0, 0.5), (0.25, 0.75), 0.33),
        ((0.0, 0.2), (0.5, 0.9), 0.0),
        ((0.6, 0.2), (0.0, 1.0), 0.0),
        ((0.3, 0.3), (0.3, 0.3), 0.0),
        ((0.0, 0.497), (0.0, 1.0), 0.5),
    ],
)
def test_interval_iou(predicted: metrics.Interval, true: metrics.Interval, iou: float) -> None:
    assert metrics.interval_iou(predicted, true) == iou


def test_bounds_equal_an_exhaustive_search() -> None:
    rng = np.random.default_rng(0)
    videos = [[tuple(np.sort(rng.uniform(size=2)).tolist()) for _ in range(int(rng.integers(1, 4)))] for _ in range(5)]
    candidates = [(a / 16, b / 16) for a in range(16) for b in range(a, 16)]

    def best(intervals: list[metrics.Interval]) -> float:
        return max(sum(metrics.interval_iou(guess, true) for true in intervals) for guess in candidates)

    every = [interval for intervals in videos for interval in intervals]
    interval, miou = metrics.best_fixed_interval(every, num_frames=16)
    assert miou == pytest.approx(best(every) / len(every))
    assert np.mean([metrics.interval_iou(interval, true) for true in every]) == pytest.approx(miou)
    blind = metrics.question_blind_bound(videos, num_frames=16)
    assert blind == pytest.approx(sum(map(best, videos)) / len(every))
    assert blind > miou


def test_trajectory_l1_counts_present_coordinates_only() -> None:
    true = np.full((2, 1, 3, 2), -1.0, dtype=np.float32)
    true[0, 0, 0] = (0.2, 0.4)
    true[1, 0, 2] = (1.0, 0.0)
    predicted = np.full_like(true, 0.5)
    assert metrics.trajectory_l1(predicted, true) == pytest.approx((0.3 + 0.1 + 0.5 + 0.5) / 4)
    with pytest.raises(ValueError, match="no trajectory has a present point"):
        metrics.trajectory_l1(predicted, np.full_like(true, -1.0))
    with pytest.raises(ValueError, match=r"predicted trajectories are \(1, 1, 3, 2\)"):
        metrics.trajectory_l1(predicted[:1], true)


def test_no_constant_beats_the_best_constant() -> None:
    rng = np.random.default_rng(1)
    true = rng.uniform(size=(40, 2, 5, 2)).astype(np.float32)
    true[rng.uniform(size=(40, 2, 5)) < 0.3] = -1.0
    true[:, 1, 4] = -1.0
    constant = metrics.best_constant_trajectory(true)
    best = metrics.best_constant_l1(true)
    assert np.isfinite(constant).all()
    for _ in range(50):
        other = np.broadcast_to(constant + rng.normal(scale=0.05, size=constant.shape), true.shape)
        assert metrics.trajectory_l1(other, true) > best


def test_static_oracle_error_is_the_motion() -> None:
    true = np.full((2, 1, 4, 2), -1.0, dtype=np.float32)
    true[0, 0] = [[0.1, 0.5], [0.2, 0.5], [0.9, 0.5], [-1.0, -1.0]]
    assert metrics.static_oracle_l1(true) == pytest.approx((0.1 + 0.7) / 6)
    true[1] = 0.25
    assert metrics.static_oracle_l1(true) == pytest.approx((0.1 + 0.7) / 14)
    assert metrics.best_constant_l1(true) > metrics.static_oracle_l1(true)


def test_motion_is_measured_where_the_true_points_are_present() -> None:
    true = np.full((3, 1, 5, 2), -1.0, dtype=np.float32)
    true[0, 0, 1:4] = [[0.2, 0.5], [0.5, 0.9], [0.8, 0.5]]
    true[1, 0, :4] = [[0.5, 0.8], [0.5, 0.7], [-1.0, -1.0], [0.5, 0.4]]
    true[2, 0, 2] = 0.25
    assert metrics.motion_scores(true, true) == metrics.MotionScores(pytest.approx(1.0), 1.0, 2)
    still = np.full_like(true, 0.5)
    assert metrics.motion_scores(still, true) == metrics.MotionScores(0.0, 0.0, 2)
    half = np.where(true == -1, true, 0.5 + (true - 0.5) / 2)
    half[1] = 0.5 - (half[1] - 0.5)
    scores = metrics.motion_scores(half, true)
    assert scores.slope == pytest.approx((0.3 * 0.6 - 0.2 * 0.4) / (0.6**2 + 0.4**2))
    assert scores.directions == 0.5
    with pytest.raises(ValueError, match="no true point moves"):
        metrics.motion_scores(true[2:], true[2:])


TRUTH = {"v": {"duration": 10.0, "timestamps": [[1, 2]], "sentences": ["A dog runs."]}}
LINE = {"video_id": "v", "task": "grounding", "query_id": 0, "answer": "From 10 to 20.", "info": {"sentence_id": 0}}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(json.dumps(TRUTH))
    predictions = [Prediction("v", 0, 'From 10 to 20, "a dög" runs.', 8)]
    write_predictions(tmp_path / "deep" / "p.jsonl", predictions)
    assert read_predictions(tmp_path / "deep" / "p.jsonl", read_ground_truth(tmp_path / "g.json")) == predictions


def score(folder: Path, answers: list[str], info: list[dict[str, object]], *more: str) -> int:
    """Score answers to the events of one video; returns the exit status."""
    truth = {"duration": 10.0, "timestamps": [[1, 5]] * len(answers), "sentences": ["A dog runs."] * len(answers)}
    (folder / "g.json").write_text(json.dumps({"v": truth}))
    lines = [{**LINE, "answer": a, "info": {"sentence_id": i, **x}} for i, (a, x) in enumerate(zip(answers, info))]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = ["--predictions", f"{folder}/p.jsonl", "--ground-truth", f"{folder}/g.json"]
    return main(["grounding", *files, "--scores", f"{folder}/s.json", *more])


@pytest.mark.parametrize(
    ("info", "flags", "frames"),
    [
        ([{"num_frames": 8}], [], 8),
        ([{"num_frames": 8}], ["--num-frames", "8"], 8),
        ([{}], ["--num-frames", "8"], 8),
        ([{}], [], 100),
        ([{"num_frames": 100}], [], 100),
    ],
)
def test_indices_count_the_frames_of_the_file(tmp_path: Path, info: list, flags: list[str], frames: int) -> None:
    assert score(tmp_path, ["From 01 to 05."], info, *flags) == 0
    expected = metrics.interval_iou((1 / frames, 5 / frames), (0.1, 0.5))
    assert json.loads((tmp_path / "s.json").read_text())["mIoU"] == pytest.approx(100 * expected)


def test_another_number_of_frames_than_the_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for info, flags, message in (
        (
            [{"num_frames": 8}],
            ["--num-frames", "100"],
            f"--num-frames 100: the answers in {tmp_path}/p.jsonl are of a model",
        ),
        ([{"num_frames": 8}, {"num_frames": 16}], [], "p.jsonl: holds answers of models with 8 and with 16 frames"),
        ([{"num_frames": 0}], [], "field 'info.num_frames' must be a whole number of at least 1, not 0"),
    ):
        assert score(tmp_path, ["From 01 to 05."] * len(info), info, *flags) == 1
        assert message in capsys.readouterr().err


def test_answers_without_an_interval_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for answers, lacking in (
        (["From 10 to 50."] * 2, 0),
        (["From 10 to 50.", "A\ndog " + "x" * 99], 1),
        (["A dog."] * 2, 2),
    ):
        caplog.clear()
        assert score(tmp_path, answers, [{}] * 2) == 0
        printed = capsys.readouterr().out
        assert json.loads((tmp_path / "s.json").read_text())["answers without an interval"] == lacking
        assert (f"{lacking} of 2 answers name no interval, such as 'A dog" in printed) == bool(lacking)
        assert max(map(len, printed.splitlines())) < 140
        assert [record.levelname for record in caplog.records] == ["WARNING"] * (lacking == 2)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("[1, 2", r"g\.json: not valid JSON"),
        ("[]", r"g\.json: expected an object of videos"),
        ('{"v": {"sentences": ["A \\ud83d"]}}', r"field 'v.sentences\[0\]': \\ud83d is half of a surrogate pair"),
        ('{"v": []}', r"g\.json: video 'v': expected an object"),
        ('{"v": {"duration": 1.0, "sentences": []}}', r"video 'v': field 'timestamps' is missing"),
        (
            '{"v": {"duration": 0, "timestamps": [], "sentences": []}}',
            r"video 'v': field 'duration' must be positive",
        ),
        ('{"v": {"duration": NaN, "timestamps": [], "sentences": []}}', r"'duration' .* nan"),
        ('{"v": {"duration": 9, "timestamps": [[1, 2]], "sentences": []}}', r"1 'timestamps' for 0 'sentences'"),
        (
            '{"v": {"duration": 9, "timestamps": [[1]], "sentences": ["a"]}}',
            r"field 'timestamps\[0\]' must be \[start, end\] in seconds, not \[1\]",
        ),
    ],
)
def test_malformed_ground_truth_is_named(tmp_path: Path, truth: str, message: str) -> None:
    (tmp_path / "g.json").write_text(truth)
    with pytest.raises(ValueError, match=message):
        read_ground_truth(tmp_path / "g.json")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps({**LINE, "video_id": "\ud83d"})], r"p\.jsonl:1: field 'video_id': \\ud83d is half of a surrogate"),
        (["{"], r"p\.jsonl:1: not valid JSON"),
        ([json.dumps(LINE), "", "3"], r"p\.jsonl:3: expected an object"),
        ([json.dumps({**LINE, "video_id": "w"})], r"p\.jsonl:1: field 'video_id' names 'w'"),
        ([json.dumps({**LINE, "answer": None})], r"p\.jsonl:1: field 'answer' must be a string, not None"),
        ([json.dumps({**LINE, "info": {}})], r"p\.jsonl:1: field 'info': field 'sentence_id' is missing"),
        ([json.dumps({**LINE, "info": {"sentence_id": 1}})], r"'info\.sentence_id' is 1, .* sentences 0 to 0"),
        ([json.dumps(LINE), json.dumps(LINE)], r"p\.jsonl:2: answers the same question as line 1"),
        ([json.dumps({**LINE, "task": "captioning"})], r"p\.jsonl: holds no line whose task is 'grounding'"),
    ],
)
def test_malformed_predictions_are_named(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "g.json").write_text(json.dumps(TRUTH))
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "p.jsonl", read_ground_truth(tmp_path / "g.json"))


def test_a_missing_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["grounding", "--predictions", f"{tmp_path}/p.jsonl", "--ground-truth", f"{tmp_path}/none.json"])
    assert status == 1
    assert capsys.readouterr().err == f"pite.evaluate: --ground-truth {tmp_path}/none.json: no such file\n"
