"""Decode and encode media once, into a feature store: `python -m engine.encode`."""
