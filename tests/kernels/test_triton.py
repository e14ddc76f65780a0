"""Runs the `*_checks.py` of this folder in a new process: on a GPU if there is one, else with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CHECKS = [Path(__file__).with_name(f"{name}_checks.py") for name in ("triton", "triton_lora", "rope")]


def test_triton_kernels():
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    environment = dict(os.environ) if torch.cuda.is_available() else os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *map(str, CHECKS),
    ]
    root = CHECKS[0].parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
