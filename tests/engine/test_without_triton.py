"""Without Triton and liger-kernel (no wheels for macOS) and extras: training and evaluation on PyTorch alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.engine.workspace import train_arguments

ROOT = Path(__file__).parents[2]
ABSENT = ("triton", "liger_kernel", "nvidia", "torchcodec", "cv2", "stanza", "flash_attn", "xformers")
CODE = (
    "import runpy, sys\n"
    f"sys.modules.update(dict.fromkeys({ABSENT!r}))\n"  # modules that are None cannot be imported
    "del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-c", CODE, module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def test_training_and_evaluation(workspace: Path, tmp_path: Path) -> None:
    run("engine.train", *train_arguments(workspace, tmp_path, epochs=1))
    given = ("--data", str(workspace / "data"), "--store", str(workspace / "features"))
    predictions = tmp_path / "predictions.jsonl"
    model = str(tmp_path / "stage3" / "final")
    run("pite.evaluate", "grounding", "--model", model, *given, "--predictions", str(predictions))
    assert [json.loads(line) for line in predictions.read_text().splitlines()]
