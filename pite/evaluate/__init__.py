"""Scores a model or a prediction file: `python -m pite.evaluate`."""
