"""The end-to-end demo: `python -m engine.demo`."""
