"""The published grounding numbers, their bounds, and the errors for malformed files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataloaders.ranks import ALONE, Ranks
from pite.evaluate import metrics, trajectories
from pite.evaluate.__main__ import main
from pite.evaluate.commands import score_answers
from pite.evaluate.flags import GroundingFlags
from pite.evaluate.grounding import read_answers, read_truth
from pite.evaluate.predictions import Prediction, PredictionWriter
from pite.evaluate.protocols import Protocol
from pite.export.card import read_scores

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "evaluation"


def test_published_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    expected = json.loads((GOLDEN / "expected.json").read_text())["grounding"]
    files = ["--predictions", f"{GOLDEN}/predictions.jsonl", "--ground-truth", f"{GOLDEN}/ground_truth.json"]
    status = main(["grounding", *files, "--protocol", "published"])
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[:4])
    assert status == 0
    for name in ("mIoU", "R1@0.3", "R1@0.5", "R1@0.7"):
        assert float(printed[name]) == pytest.approx(expected[name], abs=expected["tolerance"])


def test_the_scores_file_holds_the_printed_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--predictions", f"{GOLDEN}/predictions.jsonl", "--ground-truth", f"{GOLDEN}/ground_truth.json"]
    assert main(["grounding", *files, "--metrics", f"{tmp_path}/grounding.json"]) == 0
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[:4])
    scores = json.loads((tmp_path / "grounding.json").read_text())["grounding"]
    assert {name: f"{scores[name]:.2f}" for name in printed} == printed
    card = dict(read_scores(tmp_path / "grounding.json").rows)
    assert card["grounding, answers"] == str(scores["answers"]) == "49"
    assert main(["grounding", *files, "--metrics", f"{tmp_path}/grounding.json/none.json"]) == 1
    assert capsys.readouterr().err.startswith(
        f"pite.evaluate: --metrics {tmp_path}/grounding.json/none.json cannot be "
    )


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("grounding", ["--metrics", "p.jsonl"]),
        ("grounding", ["--metrics", "g.json"]),
        ("grounding", ["--histogram", "a.png", "--timeline", "a.png"]),
        ("captioning", ["--metrics", "g.json"]),
        ("qa", ["--metrics", "p.jsonl", "--benchmark", "msvd_qa"]),
    ],
)
def test_no_output_replaces_an_input_or_another_output(tmp_path, monkeypatch, capsys, command, flags) -> None:
    monkeypatch.chdir(tmp_path)
    for name, source in (("p.jsonl", "predictions.jsonl"), ("g.json", "ground_truth.json")):
        (tmp_path / name).write_bytes((GOLDEN / source).read_bytes())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert main([command, "--predictions", "p.jsonl", "--ground-truth", "g.json", *flags]) == 1
    assert "names the same file, which would be lost" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_of_several_processes_one_scores_a_file(monkeypatch, capsys) -> None:
    flags = GroundingFlags(predictions=GOLDEN / "predictions.jsonl", ground_truth=(GOLDEN / "ground_truth.json",))
    assert score_answers(flags, Ranks(rank=1, size=2, local=1, local_size=2)) is None
    assert score_answers(flags, ALONE) is not None


@pytest.mark.parametrize(
    ("answer", "published", "strict"),
    [
        ("From 05 to 31, a man walks.", (0.05, 0.31), (0.05, 0.31)),
        ("This occurs between 72 and 83.", (0.72, 0.83), (0.72, 0.83)),
        ("A man of 30 years is there from 10 to 20", (0.10, 0.20), (0.10, 0.20)),
        ("From 5 to 31.", None, (0.05, 0.31)),
        ("From 100 to 200.", (0.0, 0.20), (1.0, 2.0)),
        ("From 1000 to 2000.", (0.0, 0.20), None),
        ("From 12.05 to 15.50 seconds.", (0.05, 0.15), None),
        ("From 12 to 15.5 s, so from 40 to 50, 2 or 3.", (0.12, 0.15), (0.40, 0.50)),
        ("From 05% to 15%, 05-15, 20 seconds until 40.", None, None),
        ("From \u0661\u0662 to \u0663\u0664.", (0.12, 0.34), None),
        ("I do not know.", None, None),
    ],
)
def test_intervals_are_read_from_answers(
    answer: str, published: tuple[float, float] | None, strict: tuple[float, float] | None
) -> None:
    assert metrics.parse_interval(answer, protocol="published") == published
    assert metrics.parse_interval(answer) == strict


def test_frame_indices_count_the_models_own_frames() -> None:
    assert metrics.parse_interval("from 08 to 16", num_frames=32) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("predicted", "true", "published", "strict"),
    [
        ((0.0, 0.5), (0.0, 0.5), 1.0, 1.0),
        ((0.0, 0.5), (0.25, 0.75), 0.33, 1 / 3),
        ((0.0, 0.2), (0.5, 0.9), 0.0, 0.0),
        ((0.6, 0.2), (0.0, 1.0), 0.0, 0.0),
        ((0.3, 0.3), (0.3, 0.3), 0.0, 0.0),
        ((0.0, 0.497), (0.0, 1.0), 0.5, 0.497),
    ],
)
def test_interval_iou(predicted: metrics.Interval, true: metrics.Interval, published: float, strict: float) -> None:
    assert metrics.interval_iou(predicted, true, "published") == published
    assert metrics.interval_iou(predicted, true) == strict


def test_an_iou_that_is_a_threshold_counts() -> None:
    """0.7 - 0.4 is less than 0.3 in float64."""
    iou = metrics.interval_iou((0.4, 0.7), (0.1, 0.7))
    assert iou < 0.5
    assert metrics.grounding_scores([iou]).recall == {0.3: 100.0, 0.5: 100.0, 0.7: 0.0}


@pytest.mark.parametrize("protocol", ["published", "strict"])
def test_bounds_equal_an_exhaustive_search(protocol: Protocol) -> None:
    rng = np.random.default_rng(0)
    videos = [[tuple(np.sort(rng.uniform(size=2)).tolist()) for _ in range(int(rng.integers(1, 4)))] for _ in range(5)]
    candidates = [(a / 16, b / 16) for a in range(16) for b in range(a, 16)]

    def best(intervals: list[metrics.Interval]) -> float:
        return max(sum(metrics.interval_iou(guess, true, protocol) for true in intervals) for guess in candidates)

    every = [interval for intervals in videos for interval in intervals]
    interval, miou = metrics.best_fixed_interval(every, num_frames=16, protocol=protocol)
    assert miou == pytest.approx(best(every) / len(every))
    assert np.mean([metrics.interval_iou(interval, true, protocol) for true in every]) == pytest.approx(miou)
    blind = metrics.question_blind_bound(videos, num_frames=16, protocol=protocol)
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
    assert metrics.motion_scores(true[2:], true[2:]) is None, "no true point moves"
    report = trajectories.report(true[2:], true[2:], 1)
    assert "L1            0.0000" in report.text and "slope" not in report.text


TRUTH = {"v": {"duration": 10.0, "timestamps": [[1, 2]], "sentences": ["A dog runs."]}}
LINE = {"video_id": "v", "task": "grounding", "query_id": 0, "answer": "From 10 to 20.", "info": {"sentence_id": 0}}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(json.dumps(TRUTH))
    info = {"sentence_id": 0, "num_frames": 8}
    predictions = [Prediction("v", "grounding", 0, 'From 10 to 20, "a d\u00f6g" runs.', info)]
    with PredictionWriter(tmp_path / "deep" / "p.jsonl") as log:
        log.append(predictions)
    assert read_answers(tmp_path / "deep" / "p.jsonl", read_truth(tmp_path / "g.json")) == predictions


def score(folder: Path, answers: list[str], info: list[dict[str, object]], *more: str) -> int:
    """Score answers to the events of one video; returns the exit status."""
    truth = {"duration": 10.0, "timestamps": [[1, 5]] * len(answers), "sentences": ["A dog runs."] * len(answers)}
    (folder / "g.json").write_text(json.dumps({"v": truth}))
    lines = [{**LINE, "answer": a, "info": {"sentence_id": i, **x}} for i, (a, x) in enumerate(zip(answers, info))]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = ["--predictions", f"{folder}/p.jsonl", "--ground-truth", f"{folder}/g.json"]
    return main(["grounding", *files, "--metrics", f"{folder}/s.json", *more])


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
    assert json.loads((tmp_path / "s.json").read_text())["grounding"]["mIoU"] == pytest.approx(100 * expected)


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
        assert json.loads((tmp_path / "s.json").read_text())["grounding"]["answers without an interval"] == lacking
        assert (f"{lacking} of 2 answers name no interval, such as 'A dog" in printed) == bool(lacking)
        assert max(map(len, printed.splitlines())) < 140
        assert [record.levelname for record in caplog.records] == ["WARNING"] * (lacking == 2)


def test_odd_answers_are_counted_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [
        "From 10 to 50.",
        "From 100 to 200.",
        "From 50 to 10.",
        "From 5 to 50.",
        "12.05 to 15.50 seconds",
        "A dog.",
    ]
    kinds = ("answers without an interval", "answers past the end", "answers reversed")
    for protocol, counts in (("strict", (2, 1, 1)), ("published", (2, 0, 1))):
        assert score(tmp_path, answers, [{}] * 6, "--protocol", protocol) == 0
        printed, numbers = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())["grounding"]
        assert tuple(numbers[kind] for kind in kinds) == counts and numbers["protocol"] == protocol
        past = "1 of 6 answers name a frame past the last one, 99, such as 'From 100 to 200.'"
        assert (past in printed) == (protocol == "strict")
        assert "1 of 6 answers name a reversed interval, such as 'From 50 to 10.'" in printed


def test_odd_events_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = [[15, 5], [5, 5], [-5, 10], [0, 50], [1, 2]]
    truth = {"v": {"duration": 12.0, "timestamps": times, "sentences": ["A dog runs."] * 5}}
    (tmp_path / "g.json").write_text(json.dumps(truth), encoding="utf-8-sig")
    (tmp_path / "p.jsonl").write_text(json.dumps(LINE))
    files = ["--predictions", f"{tmp_path}/p.jsonl", "--ground-truth", f"{tmp_path}/g.json"]
    assert main(["grounding", *files, "--metrics", f"{tmp_path}/s.json"]) == 0
    printed, numbers = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())["grounding"]
    assert (numbers["events reversed or empty"], numbers["events outside the video"]) == (2, 3)
    assert "2 events of the ground truth are reversed or empty, so each answer to them scores 0" in printed
    assert "such as v sentence 0 [15, 5]" in printed
    assert "3 events of the ground truth are not within their video, such as v sentence 0 [15, 5] of 12 s" in printed


@pytest.mark.parametrize("protocol", ["strict", "published"])
@pytest.mark.parametrize("seed", range(4))
def test_random_answers_never_break_a_parser(protocol: Protocol, seed: int) -> None:
    """Texts of digits, words and signs: an interval has the digits of the answer, and the IoU is a share."""
    rng = np.random.default_rng(seed)
    pieces = ["0", "7", "12", "100", "2025", " to ", " and ", "from ", ".", ",", "%", " ", "-", "to", "\n", "a"]
    for _ in range(400):
        answer = "".join(rng.choice(pieces, int(rng.integers(1, 12))))
        interval = metrics.parse_interval(answer, 50, protocol)
        if interval is None:
            continue
        start, end = (round(time * 50) for time in interval)
        width = 2 if protocol == "published" else 1
        texts = {f"{a} {word} {b}" for word in ("to", "and") for a in _forms(start, width) for b in _forms(end, width)}
        assert any(text in answer for text in texts)
        assert 0 <= metrics.interval_iou(interval, (0.2, 0.6), protocol) <= 1


def _forms(index: int, width: int) -> set[str]:
    """The ways in which an index is written with at least `width` digits, at most three."""
    return {f"{index:0{n}d}" for n in range(width, 4)}


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
        read_truth(tmp_path / "g.json")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps({**LINE, "video_id": "\ud83d"})], r"p\.jsonl:1: field 'video_id': \\ud83d is half of a surrogate"),
        (["{", ""], r"p\.jsonl:1: not valid JSON"),
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
        read_answers(tmp_path / "p.jsonl", read_truth(tmp_path / "g.json"))


def test_a_missing_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["grounding", "--predictions", f"{tmp_path}/p.jsonl", "--ground-truth", f"{tmp_path}/none.json"])
    assert status == 1
    assert capsys.readouterr().err == f"pite.evaluate: --ground-truth {tmp_path}/none.json: no such file\n"
