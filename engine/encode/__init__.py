"""Decodes and encodes media once, into a feature store: `python -m engine.encode`."""
