"""Training: configuration, loop, checkpoints, metrics, feature encoding."""

import pite  # noqa: F401  (refuses an environment in which another package is called `kernels`)
