"""Scores of a model or of a file of predictions: `python -m pite.evaluate`."""
