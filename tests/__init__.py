import os
from pathlib import Path

import dataloaders  # noqa: F401  (sets how OpenMP threads wait, before torch is imported)

_ROOT = Path(__file__).resolve().parents[1]
SOURCE_PATH = os.pathsep.join(map(str, (_ROOT, _ROOT / "kernels")))
"""PYTHONPATH for a process that imports everything from the source tree."""
