"""One folder of a trained model for transformers, peft or the hub: `python -m pite.export`."""

RECORD = "export.json"
"""What `pite.export` leaves in its folder: the format, and what is remembered of each stage."""
