"""The models that ground a text, from flags, and what their results depend on."""

from __future__ import annotations

from typing import Any

from dataloaders.annotation.choices import open_tracker
from dataloaders.annotation.phrases import INSTALL, SpacyPhrases, StanzaPhrases, has_spacy
from dataloaders.files import folder_checksum
from pite import devices
from pite.ground import coco_ssd
from pite.ground.detectors import CocoThings, OpenVocabulary, People
from pite.ground.flags import GrounderFlags, MaskFlags
from pite.ground.grounding import Grounder
from pite.ground.objects import Detector


def open_grounder(flags: GrounderFlags) -> Grounder:
    """The models of the flags. Raises ValueError for one that cannot be loaded or is not installed."""
    device = str(devices.resolve(flags.device))
    if flags.stanza is None and not has_spacy():
        raise ValueError(f"noun phrases need spaCy or --stanza: {INSTALL}")
    parser = StanzaPhrases(flags.stanza, device) if flags.stanza else SpacyPhrases()
    tracker = None if flags.tracker is None else open_tracker(flags.tracker, device)
    return Grounder(parser, detector_of(flags, device), flags.every, tracker)


def detector_of(flags: GrounderFlags, device: str) -> Detector:
    """What the files in the folder of --detector are, or OpenCV's people detector. Raises ValueError as `open_grounder`."""
    if flags.detector is None:
        return People()
    segmenter = flags.segmenter if isinstance(flags, MaskFlags) else None
    if not (flags.detector / coco_ssd.FILE).exists():
        return OpenVocabulary(flags.detector, segmenter, device, flags.least_score)
    if segmenter is not None:
        raise ValueError(
            f"--segmenter needs the boxes of a GroundingDINO, and --detector {flags.detector} is a coco-ssd"
        )
    return CocoThings(flags.detector, device, flags.least_score)


def grounder_settings(flags: GrounderFlags) -> dict[str, Any]:
    """What boxes and masks depend on: the flags, and checksums of the models."""
    names = ["detector", "tracker", "stanza", *(["segmenter"] if isinstance(flags, MaskFlags) else [])]
    folders = {name: getattr(flags, name) for name in names}
    sums = {name: None if path is None else f"{path.name} ({folder_checksum(path)})" for name, path in folders.items()}
    return {**sums, "least_score": flags.least_score, "every": flags.every}
