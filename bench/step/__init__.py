"""The training step against its peers: `python -m bench.step`."""
