"""One folder of a trained model for transformers, peft or the hub: `python -m pite.export`."""
