"""The two ways of reading and scoring answers."""

from __future__ import annotations

from typing import Literal

Protocol = Literal["strict", "published"]
"""strict: every index as written, exact thresholds; published: the predecessor's rules, to reproduce its numbers."""
