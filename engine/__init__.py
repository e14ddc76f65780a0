"""Training: configuration, loop, checkpoints, metrics, feature encoding."""

import pite  # noqa: F401  (sets how OpenMP threads wait; refuses an environment with another package `kernels`)
