"""Files to frames: frame sampling, pre-processing, decoders, worker processes."""

TIME_LIMIT = 600.0
"""Timeout for one file, in seconds. An hour of 720p takes about two minutes of a core."""
