"""Spatial grounding: where is what a question is about, in each frame? VidSTG and HC-STVG."""

from pite.evaluate.spatial.answers import TASK, Boxes, overlap, read_answers
from pite.evaluate.spatial.report import report
from pite.evaluate.spatial.truth import Tube, read_hc_stvg, read_vidstg, sampled

__all__ = [
    "TASK",
    "Boxes",
    "Tube",
    "overlap",
    "read_answers",
    "read_hc_stvg",
    "read_vidstg",
    "report",
    "sampled",
]
