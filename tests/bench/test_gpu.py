"""`python -m bench.gpu` needs torch, Triton, transformers and peft: a GPU machine has nothing else of ours installed."""

from __future__ import annotations

import os
import subprocess
import sys

from tests import SOURCE_PATH
from tests.test_arrows import ROOT

ABSENT = ("av", "pyarrow", "nvidia", "liger_kernel", "cv2", "torchcodec", "tensorboard")


def test_it_starts_without_what_reads_videos_and_data() -> None:
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT!r}))\n"  # what is None there cannot be imported
        "sys.argv = ['bench.gpu', '--help']; runpy.run_module('bench.gpu', run_name='__main__')"
    )
    variables = {**os.environ, "PYTHONPATH": SOURCE_PATH}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "--skip-steps" in done.stdout, done.stderr
