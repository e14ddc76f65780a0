"""Benchmarks: `pytest bench/` on a CPU, `python -m bench.gpu` on a GPU, `python -m bench.report` for the tables."""

import dataloaders  # noqa: F401  (sets how OpenMP threads wait, before torch is imported)
