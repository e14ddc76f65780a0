"""The kernel benchmark and its report: wrong results get no time, failed rows no speed-up, tables match the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import load, report, tables
from bench.gpu.report import session_report
from bench.gpu.results import SESSION
from bench.kernels import cases as kernel_cases
from bench.kernels import rows as kernel_rows
from bench.kernels.cases import BARE, IMPLEMENTATIONS, OURS, PLAIN
from bench.kernels.inputs import Case, Inputs
from bench.kernels.rows import Row
from bench.machine_code.__main__ import markdown
from bench.measure import Roofline, gate
from bench.step.rows import Row as StepRow

CPU = torch.device("cpu")
ROW = Row("a case", "trajectory", 8, 16, 1.0, "float32", OURS, None, 2.0, 1.9, 2.2, 10.0, 0.5)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_ours_passes_the_gate_for_every_op(op):
    case = Case(op, 64, 128, 0.5, vocabulary=90, dtype=torch.float32)
    assert kernel_rows.find_problem(case, OURS, CPU) is None
    assert all(w > 0 for w in case.work)


def test_wrong_results_are_not_timed(monkeypatch):
    def wrong(x: Inputs):
        right = kernel_cases.trajectory_ours(x)
        return lambda: [right()[0] * 1.01, *right()[1:]]

    broken = {OURS: wrong, PLAIN: IMPLEMENTATIONS["trajectory"][PLAIN]}
    monkeypatch.setitem(kernel_rows.IMPLEMENTATIONS, "trajectory", broken)
    case = Case("trajectory", 32, 16, 0.5, dtype=torch.float32)
    rows = {r.implementation: r for r in kernel_rows.measure(case, CPU, Roofline(1e10, 1e10), 2, {})}
    assert rows[OURS].median_ms is None and rows[OURS].problem.startswith("wrong")
    assert rows[PLAIN].median_ms is not None
    assert tables.speedup(list(rows.values())) is None


def test_a_peer_that_fails_at_the_real_shape_gets_a_row(monkeypatch):
    def brittle(x: Inputs):
        right = kernel_cases.trajectory_eager(x)

        def step():
            if x.case.rows % 8:
                raise RuntimeError("rows must be a multiple of 8\nand so on")
            return right()

        return step

    some = {OURS: kernel_cases.trajectory_ours, PLAIN: kernel_cases.trajectory_eager, "brittle": brittle}
    monkeypatch.setitem(kernel_rows.IMPLEMENTATIONS, "trajectory", some)
    case = Case("trajectory", 32, 16, 0.1, dtype=torch.float32)
    rows = {r.implementation: r for r in kernel_rows.measure(case, CPU, Roofline(1e10, 1e10), 1, {})}
    assert rows["brittle"].problem == "fails: RuntimeError: rows must be a multiple of 8"
    assert rows["brittle"].median_ms is None and rows[OURS].median_ms is not None


def test_the_gate_compares_with_plain_pytorch():
    exact = [torch.linspace(0, 1, 5, dtype=torch.float64)]
    plain = [exact[0].float() + 1e-3]
    assert gate([exact[0].float() + 1.9e-3], plain, exact) is None
    assert "off by" in gate([exact[0].float() + 2.1e-3], plain, exact)
    assert "off by nan" in gate([torch.full((5,), float("nan"))], plain, exact)


def test_report(tmp_path, capsys):
    rows = [
        ROW,
        replace(ROW, implementation="eager", median_ms=5.0),
        replace(ROW, implementation="x", problem="fails", median_ms=None),
        replace(ROW, implementation=BARE, median_ms=1.6),
    ]
    content = {"environment": {"device": "a device", "commit": "abc"}, "rows": [r.to_json() for r in rows]}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "a device" in printed and "2.50 times the best peer" in printed and "| x | fails |" in printed
    assert "25% over the bare GEMMs" in printed
    assert report.main([str(path), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "bad.json")])
    assert "bad.json: has neither" in capsys.readouterr().err


def test_the_report_begins_with_one_line_per_case(tmp_path):
    rows = [ROW, replace(ROW, implementation=PLAIN, median_ms=5.0), replace(ROW, implementation="x", median_ms=4.0)]
    failed = [replace(ROW, case="another", problem="wrong: off by 3", median_ms=None)]
    kernels, steps = (tmp_path / name for name in ("k.json", "step_a.json"))
    about = {"device": "a device", "commit": "abc"}
    kernels.write_text(json.dumps({"environment": about, "rows": [r.to_json() for r in rows + failed]}))
    ours = StepRow("7b", OURS, 18e3, 17e3, 19e3, 20.0, 0.4, 70.0)
    peer = StepRow("7b", "peer", problem="not installed")
    steps.write_text(json.dumps({"environment": about, "rows": [vars(ours), vars(peer)]}))
    assert report.main([str(kernels), str(steps), "--output", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| a case | 2.00 (1.90 to 2.20) | 5.00 | 4.00 (x) |" in text
    assert "| another | wrong: off by 3 | | |" in text
    assert "| 7b: ours | 18,000 (17,000 to 19,000) | 20.0 |  | 40.0% | 70.0 |" in text
    assert "| 7b: peer | not installed |" in text


def test_the_table_of_costs_is_rewritten(tmp_path, monkeypatch):
    """Hours are measured where bench/results has a step of the device, else estimated."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    environment = {"device": "NVIDIA H100 80GB HBM3"}
    rows = [{"model": "7b", "implementation": "pite", "mfu": 0.5}]
    (tmp_path / "NVIDIA_H100").mkdir()
    (tmp_path / "NVIDIA_H100" / "step_7b.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for _ in range(2):
        assert report.main(["--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    lines = {tuple(line.split(" | ")[:2]): line for line in text.splitlines() if line.startswith("| ")}
    assert "measured, 50% of the bf16 peak" in lines["| 7b", "H100"]
    assert "estimated, 45% of the bf16 peak" in lines["| 13b", "H100"]
    assert "(paper: about 10 h)" in lines["| 7b", "A100-80GB"]
    with pytest.raises(ValueError, match="no marks"):
        report.fill("nothing", "table")


def test_the_committed_tables_are_those_of_the_files():
    """After new measurements, run `python -m bench.report` with --output bench/results/report and --readme README.md."""
    root = Path(__file__).parents[2]
    results = (root / "bench" / "results" / "report.md").read_text()
    for path in sorted((root / "bench" / "results").glob("*.json")):
        if steps := report.read_steps(path):
            assert tables.step_table(*steps) in results
        elif report.of_load(path):
            page = (root / "docs" / "install.md").read_text()
            assert load.table(json.loads(path.read_text())) in page
        elif report.of_annotation(path):
            rows = json.loads(path.read_text())["annotation"]
            page = (root / "docs" / "data.md").read_text()
            assert f"| **{rows['held out']['inside']:.0%}** |" in page and f"| {rows['tuning']['inside']:.0%} |" in page
        elif report.of_machine_code(path):
            assert path.with_suffix(".md").read_text() == markdown(json.loads(path.read_text())["rows"])
        elif not path.name.startswith("encode_"):
            assert tables.summary(*report.read(path)) in results
    for path in (root / "bench" / "results").glob(f"*/{SESSION}"):
        assert session_report(path.parent) in results
    assert report.cost_table(root / "bench" / "results") in (root / "README.md").read_text()
