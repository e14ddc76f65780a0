"""Training: configuration, loop, checkpoints, metrics, feature encoding."""
