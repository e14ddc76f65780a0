"""The tiny CLIP and Vicuna that come with the package, made by `python -m engine.tiny` with its default settings."""

from __future__ import annotations

from pathlib import Path

PARTS = Path(__file__).resolve().parent / "parts"
"""Folder of `clip` and `vicuna`, as `python -m engine.tiny PARTS` writes it; each holds a manifest, tiny.json."""
