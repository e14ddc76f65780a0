"""Times files to features on this machine, by parts: `python -m bench.encode --parts nvdec decode clip encode`."""
