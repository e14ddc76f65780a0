"""The encoding benchmark: its parts on a CPU, what they import, its results as they come, and its projection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.encode import __main__ as command
from bench.encode import decode, features, files
from bench.encode.results import Results, Row, projection, saturated, table
from bench.encode.settings import Clock, rates
from bench.media import write_video
from bench.report import encoding
from dataloaders.decode.dali.agreement import Agreement
from tests import SOURCE_PATH
from tests.clips import save_clip

DEVICE = {"device": "NVIDIA H100 80GB HBM3"}
BLOCKED = {
    "nvdec": ("av", "PIL", "pyarrow", "transformers", "tokenizers", "nvidia.dali", "torchcodec", "engine", "pite"),
    "decode": ("pyarrow", "transformers", "tokenizers", "engine", "pite"),
    "clip": ("av", "pyarrow", "nvidia.dali", "torchcodec"),
}
"""Part -> packages without which it runs."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(2):
        write_video(folder / str(i), "VP9", "360p", frames=12 * (i + 1))
    return folder


def test_one_call_measures_all_parts(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_clip(tmp_path / "clip")
    output = tmp_path / "results.json"
    flags = ["--device", "cpu", "--clip", str(tmp_path / "clip"), "--files", str(videos), "--output", str(output)]
    assert command.main(flags) == 0
    content = json.loads(output.read_text())
    assert content["nvdec"][0]["problem"] is None or "NVIDIA_DRIVER_CAPABILITIES" in content["nvdec"][0]["problem"]
    measured = {row["implementation"]: row for row in content["decode"]}
    assert measured[decode.PYAV]["frames_per_second"] > 0 and "within 0.0/255" in measured[decode.PYAV]["agreement"]
    assert [row["problem"] for row in content["clip"]] == [None] * 3
    (whole,) = content["encode"]
    # On a busy machine the smaller run may take longer than the larger one, because the start-up dominates.
    assert whole["problem"] is None or "too few to measure" in whole["problem"]
    assert content["projection"] is None, "there is no projection from a CPU"
    assert encoding(output) == content and f"| {videos.name}: PyAV |" in capsys.readouterr().out
    assert command.main([*flags, "--parts", "nvdec"]) == 0
    assert json.loads(output.read_text())["clip"] == content["clip"], "other parts are kept"


@pytest.mark.parametrize("part", BLOCKED)
def test_a_part_imports_only_what_it_uses(part: str, videos: Path, tmp_path: Path) -> None:
    save_clip(tmp_path / "clip")
    flags = ["--device", "cpu", "--parts", part, "--clip", str(tmp_path / "clip"), "--files", str(videos)]
    code = (
        "import sys\nfrom importlib.abc import MetaPathFinder\n"
        "class Absent(MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if any(name == b or name.startswith(b + '.') for b in {BLOCKED[part]!r}):\n"
        "            raise ImportError(f'{name} is absent')\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from bench.encode.__main__ import main\n"
        f"if __name__ == '__main__':\n    sys.exit(main({[*flags, '--output', str(tmp_path / 'r.json')]!r}))\n"
    )
    (tmp_path / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": SOURCE_PATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())[part]


def test_files_of_several_kinds_and_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str, int]] = []

    def write(path: Path, codec: str, size: str, frames: int) -> Path:
        written.append((codec, size, frames // 30))
        path.touch()
        return path

    monkeypatch.setattr(files, "write_video", write)
    monkeypatch.setattr(files, "count", lambda path: int(path.resolve().name == path.name))
    settings = command.Settings("cuda", tmp_path, number=32, kinds=("mixed", "H.264-544"))
    mixed, single = files.videos(settings)
    assert len(mixed.paths) == len(single.paths) == 32 == len(set(mixed.paths))
    assert {seconds for *_, seconds in written} == {10, 22, 52, 120} and sum(files.SECONDS) / 4 == 51
    assert {("H.264", "544"), ("H.264", "536"), ("HEVC", "360p"), ("VP9", "360p")} <= {w[:2] for w in written}
    assert len(written) == len(set(written)), "each file is written once"


def test_results_are_saved_as_they_come(tmp_path: Path) -> None:
    results = Results.open(tmp_path / "r.json", DEVICE)
    results.begin("decode")
    results.add("decode", Row("mixed", "DALI", 4, 100_000.0))
    saved = json.loads((tmp_path / "r.json").read_text())
    assert [row["frames_per_second"] for row in saved["decode"]] == [100_000.0]
    assert Results.open(tmp_path / "r.json", DEVICE).content["decode"] == saved["decode"]
    assert not Results.open(tmp_path / "r.json", {"device": "other"}).content["decode"], "another device starts anew"


def content(decoded: list[Row], clip: float | None = 10_000.0, device: str = DEVICE["device"]) -> dict:
    rows = [vars(row) for row in decoded]
    return {"environment": {"device": device}, "decode": rows, "clip": [vars(Row("CLIP", "pite", None, clip))]}


def test_projection() -> None:
    """An H100 that decodes 140,000 frames/s with 7 and 14 sessions, and encodes 10,000 frames/s at 989 TFLOP/s."""
    rows = [Row("mixed", "DALI", n, 20_000.0 * min(n, 7)) for n in (1, 4, 7, 14)] + [Row("mixed", "PyAV", None, 1e9)]
    found = projection(content(rows))
    assert found is not None and (found["decoder"], found["files"]) == ("DALI", "mixed")
    assert found["H100"]["decode"] == pytest.approx(143_640 / (8 * 140_000 / 1560) / 3600)
    assert found["H100"]["clip"] == pytest.approx(143_640 / (8 * 100) / 3600)
    assert found["A100"]["decode"] == pytest.approx(143_640 / (8 * 100_000 / 1560) / 3600)
    assert found["A100"]["hours"] == max(found["A100"]["clip"], found["A100"]["decode"])
    unsaturated = projection(content(rows[:3]))
    assert unsaturated is not None and "A100" not in unsaturated, "only a saturated rate is one of the engines"
    assert projection(content(rows, device="AMD EPYC")) is None and projection(content([])) is None
    assert projection(content([Row("mixed", "DALI", 4, problem="no NVDEC")])) is None
    printed = table({**content(rows), "nvdec": [], "encode": [], "projection": found})
    assert "PiTe-143k on 8 H100" in printed and "| mixed: DALI, 14 sessions | 140,000 |" in printed


def test_saturation() -> None:
    rows = [vars(Row("mixed", "DALI", n, rate)) for n, rate in ((1, 10.0), (7, 70.0), (14, 71.0))]
    assert saturated(rows) == 71.0 and saturated(rows[:2]) is None and saturated(rows[:1]) is None


def test_what_does_not_agree_is_not_timed(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "compare", lambda *_: Agreement(9.0, 3))
    results = Results.open(tmp_path / "r.json", {"device": "cpu"})
    decode.measure(command.replace(command.CPU, folder=tmp_path, files=videos), results)
    assert {row["frames_per_second"] for row in results.content["decode"]} == {None}
    assert "differs from PyAV's by 9.0 of 255 and 3 of its frames are others" in results.content["decode"][0]["problem"]


def test_a_part_ends_when_its_budget_is_used_up(videos: Path, tmp_path: Path) -> None:
    results = Results.open(tmp_path / "r.json", {"device": "cpu"})
    decode.measure(command.replace(command.CPU, folder=tmp_path, files=videos, budget=0.0), results)
    assert {row["problem"] for row in results.content["decode"]} == {"not run: the budget is used up"}
    assert not Clock(100.0).is_up and (found := rates(lambda: 5, 3))["slow"] <= found["fast"]


def test_a_failing_encode_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, videos: Path) -> None:
    def fail(settings: object) -> Path:
        raise ValueError("no CLIP")

    monkeypatch.setattr(features, "clip_folder", fail)
    results = Results.open(tmp_path / "r.json", {"device": "cpu"})
    features.measure_encoding(command.replace(command.CPU, folder=tmp_path, files=videos), results)
    assert results.content["encode"][0]["problem"] == "ValueError: no CLIP"
