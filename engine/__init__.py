"""Training: configuration, loop, checkpoints, metrics, feature encoding."""

import dataloaders  # noqa: F401  (sets how OpenMP threads wait, before torch is imported)
