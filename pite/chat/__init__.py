"""One question about one video: `python -m pite.chat`."""
