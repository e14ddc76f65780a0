"""Exports a trained model as one folder for transformers, peft or the hub: `python -m pite.export`."""
