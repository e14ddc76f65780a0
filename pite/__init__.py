"""PiTe: CLIP encoder, adapter, packed decoder with LoRA, heads, checkpoints, chat and evaluation."""

import sys
from importlib.metadata import distributions

import dataloaders  # noqa: F401  (sets how OpenMP threads wait, before torch is imported)

# Before anything imports transformers, which takes our `kernels` for this one, or `kernels`, which may be this one.
for _other in distributions(name="kernels"):
    _sentence = (
        f"PiTe's package `kernels` and the distribution `kernels` {_other.version} (Hugging Face's) have the same name "
        "and cannot be in one environment: run `pip uninstall kernels`, which transformers does without, and install "
        "PiTe again unless it was installed with -e"
    )
    # While `python -m` looks for its module there is no caller to catch anything, and a traceback would say no more.
    raise SystemExit(_sentence) if sys.argv[:1] == ["-m"] else ImportError(_sentence)
