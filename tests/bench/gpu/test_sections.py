"""The sections of `python -m bench.gpu`: what they import, what they record, and a session on a CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

import pite_kernels
from bench import report
from bench.gpu import __main__ as command
from bench.gpu import sections, smoke
from bench.gpu.plan import ENVIRONMENT, SECTIONS
from bench.gpu.results import NotRun, Output
from bench.kernels import rows as kernel_rows
from bench.kernels.cases import BARE, IMPLEMENTATIONS, OURS
from bench.kernels.inputs import Case
from bench.measure import Roofline
from bench.step.problem import make_workload, tiny_shape
from tests import SOURCE_PATH
from tests.test_arrows import ROOT

CPU = torch.device("cpu")
INSTALLED = ("torch", "triton", "transformers", "peft", "liger-kernel")
"""What the machine of a session has, with what these require."""


def with_requirements(names: tuple[str, ...]) -> set[str]:
    """Installed distributions: `names` and all that they require without extras."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        try:
            needed = distribution(name).requires or [] if name not in found else []
        except PackageNotFoundError:  # for another platform
            continue
        found.add(name)
        left += [re.split(r"[ ;<>=!~(\[]", line)[0] for line in needed if "extra ==" not in line]
    return found


def make_site(folder: Path) -> None:
    """A folder with links to what INSTALLED consists of, in place of site-packages."""
    folder.mkdir()
    for name in with_requirements(INSTALLED):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {".."}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))


def test_a_session_on_a_cpu_needs_only_what_a_gpu_machine_has(tmp_path, capsys):
    site = tmp_path / "site"
    make_site(site)
    missing = ("av", "cv2", "pyarrow", "pebble", "pytest", "matplotlib")
    assert not [name for name in missing if (site / name).exists()] and (site / "liger_kernel").exists()
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCE_PATH, str(site)])}
    results = tmp_path / "results"
    chosen = ["smoke", "step_7b", "trace_7b", "peers_7b", "tests", "unsloth_7b"]
    program = [sys.executable, "-S", "-m", "bench.gpu", "--results", str(results), "--device", "cpu", "--commit", "abc"]
    done = subprocess.run(
        [*program, "--budget", "9999", "--only", *chosen],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    records = json.loads((results / "session.json").read_text())["sections"]
    problems = {name: record["problem"] for name, record in records.items() if record["state"] != "done"}
    assert problems == {"tests": "pytest is not installed", "unsloth_7b": "unsloth is not installed"}
    assert list(records) == chosen and command.done_before(results) == chosen[:4]
    names = ["pite loop", "pite", "pite unshared", "pite fp8"]
    steps = json.loads((results / "step_7b.json").read_text())
    assert steps["environment"]["commit"] == "abc"
    assert [(row["implementation"], row["problem"]) for row in steps["rows"]] == [
        *((name, None) for name in names[:3]),
        ("pite fp8", "a CPU only emulates float8"),
    ]
    peers = json.loads((results / "peers_7b.json").read_text())["rows"]
    assert [row["problem"] for row in peers] == [None] * 3, "their losses agree with ours"
    assert (results / "trace_7b.trace.json.gz").read_bytes().startswith(b"\x1f\x8b")
    assert report.main([str(results)]) == 0
    text = capsys.readouterr().out
    assert "| both heads | right | no |" in text and "| `aten::addmm_` | " in text
    assert "- tests: pytest is not installed" in text and "| tiny: hf packed |" in text


def test_the_processes_can_be_forked_after_the_imports():
    """CUDA does not work in a process that is forked from one that has started it."""
    code = (
        "import torch\n"
        "def started(*_, **__): raise AssertionError('an import starts CUDA')\n"
        "torch.cuda._lazy_init = torch.cuda.device_count = torch.cuda.get_device_capability = started\n"
        "import bench.gpu.sections\n"
        "assert not torch.cuda.is_initialized()"
    )
    variables = {**os.environ, "PYTHONPATH": SOURCE_PATH}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr


def test_every_section_of_the_plan_exists():
    assert all(callable(resolve_name(section.run)) for section in (ENVIRONMENT, *SECTIONS))
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"| `{s.name}` |" in page and f"| {s.gpu:.0f} |" in page for s in SECTIONS)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (["--device", "tpu"], "invalid choice"),
        (["--only", "nothing"], "invalid choice"),
        (["--budget", "-5"], "-5 is not a positive number of seconds"),
        (["--budget", "nan"], "nan is not a positive number of seconds"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_runs(option, problem, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--results", str(tmp_path), *option])
    assert problem in capsys.readouterr().err


def test_a_wrong_kernel_is_red_and_the_others_go_on(tmp_path, monkeypatch):
    right = pite_kernels.swiglu
    monkeypatch.setattr(pite_kernels, "swiglu", lambda both: right(both) * 1.01)

    def fails(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(pite_kernels, "rope_qkv", fails)
    output = Output(tmp_path / "smoke.json", {})
    sections.smoke("cpu", output)
    content = json.loads(output.path.read_text())
    wrong = {record["check"]: record["wrong"] for record in content["checks"] if record["wrong"]}
    assert wrong.keys() == {"SwiGLU", "rotary embedding"} and content["red"] == 2
    assert "is off by" in wrong["SwiGLU"] and wrong["rotary embedding"] == "RuntimeError: no such kernel"
    assert [record["check"] for record in content["checks"]] == list(smoke.CHECKS)


def test_smoke_runs_on_a_real_micro_batch():
    """With shared rows, in the dtype of a GPU too."""
    shapes = smoke.Shapes(tiny_shape(), make_workload(tiny_shape(), 2, None), CPU, torch.bfloat16)
    assert shapes.row_index is not None and len(shapes.row_index.rows) > shapes.batch.num_rows
    assert all(smoke.result(name, shapes)["wrong"] is None for name in smoke.CHECKS)


def test_kernels_are_timed_without_peers(tmp_path, monkeypatch):
    cases = [Case("lora", 64, 128, dtype=torch.float32), Case("attention", 64, 128, dtype=torch.float32)]
    monkeypatch.setattr(sections, "cpu_cases", lambda: cases)
    monkeypatch.setattr(sections, "roofline", lambda device, dtype: Roofline(1e10, 1e10))
    output = Output(tmp_path / "kernels.json", {})
    sections.kernels("cpu", output)
    content = json.loads(output.path.read_text())
    assert [row["implementation"] for row in content["rows"]] == [OURS, BARE, OURS] and content["red"] == 0
    monkeypatch.setitem(kernel_rows.IMPLEMENTATIONS["attention"], OURS, lambda x: lambda: [x.upstream.clone()] * 4)
    sections.kernel_peers("cpu", output)
    content = json.loads(output.path.read_text())
    rows = [row for row in content["rows"][3:] if row["op"] == "attention"]
    assert {row["implementation"] for row in rows} == set(IMPLEMENTATIONS["attention"])
    assert content["red"] == 1 and rows[0]["problem"].startswith("wrong")


def test_a_model_that_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(sections, "capacity", lambda device, shape: 1e6)
    with pytest.raises(NotRun, match="a micro-batch of 4,096 tokens needs"):
        sections.problem_on(CPU, "13b")


def test_the_layout_is_for_the_whole_device(monkeypatch):
    shape = replace(tiny_shape(), samples=2)
    assert sections.capacity(CPU, shape) is None
    properties = type("Properties", (), {"total_memory": 80e9})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert 79.9e9 < sections.capacity(torch.device("cuda"), shape) < 80e9
