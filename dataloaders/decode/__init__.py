"""Files to frames: frame sampling, pre-processing, decoders, worker processes."""
