"""The tiny CLIP and Vicuna that the demo starts from: `python -m engine.tiny`."""
