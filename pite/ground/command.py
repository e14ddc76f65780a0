"""What `python -m pite.ground` does: answers, grounds and draws, one video after the other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from dataloaders.annotation.phrases import INSTALL, SpacyPhrases, StanzaPhrases, has_spacy
from dataloaders.errors import reason
from dataloaders.files import write_atomically
from pite import devices
from pite.ground.detectors import OpenVocabulary, People
from pite.ground.flags import GroundFlags
from pite.ground.grounding import Grounder
from pite.ground.objects import Detector
from pite.ground.overlay import save_overlay

log = logging.getLogger(__name__)

_LONGEST_REPLY = 200
"""Tokens of a matcher's reply."""


def ground(flags: GroundFlags) -> None:
    """Write the files that lack. Raises ValueError."""
    settings = flags.settings()
    lacking = [video for video in flags.video if not _is_done(flags.output / f"{video.stem}.json", settings)]
    if not lacking:
        log.info("all %d videos are grounded already", len(flags.video))
        return
    grounder, answer = open_grounder(flags), _open_answerer(flags)
    flags.output.mkdir(parents=True, exist_ok=True)
    for video in lacking:
        text = answer(video)
        grounded = grounder(video, text, flags.seconds)
        save_overlay(flags.output / f"{video.stem}.mp4", video, grounded)
        # Written last: it marks the video as done.
        content = {"video": video.name, "settings": settings, **grounded.as_dict()}
        write_atomically(flags.output / f"{video.stem}.json", json.dumps(content, ensure_ascii=False) + "\n")
        print(text)
        for phrase, own in grounded.phrases:
            seen = [grounded.objects[number].boxes() for number in own]
            shown = ", ".join(f"frames {min(boxes)} to {max(boxes)}" for boxes in seen)
            print(f"  {phrase.text}: {shown or 'not found'}")


def open_grounder(flags: GroundFlags) -> Grounder:
    """The models of the flags. Raises ValueError for one that cannot be loaded or is not installed."""
    device = str(devices.resolve(flags.device))
    if flags.stanza is None and not has_spacy():
        raise ValueError(f"noun phrases need spaCy or --stanza: {INSTALL}")
    parser = StanzaPhrases(flags.stanza, device) if flags.stanza else SpacyPhrases()
    detector: Detector = (
        OpenVocabulary(flags.detector, flags.segmenter, device, flags.threshold) if flags.detector else People()
    )
    return Grounder(parser, detector, _open_matcher(flags.matcher, device) if flags.matcher else None, flags.every)


def _open_answerer(flags: GroundFlags) -> Callable[[Path], str]:
    """Video -> the text to ground. Each video has a conversation of its own."""
    if flags.answer is not None:
        given = flags.answer
        return lambda video: given
    from pite.chat.session import Session

    assert flags.model is not None and flags.query is not None, "GroundFlags requires one of the two"
    query = flags.query
    session = Session.load(flags.model, clip=flags.clip, device=flags.device, history=False, family=flags.family)
    return lambda video: session.fork().answer(video, query, max_new_tokens=flags.max_new_tokens).text


def _open_matcher(directory: Path, device: str) -> Callable[[str], str]:
    """A causal language model: prompt -> its greedy continuation. Raises ValueError if the folder holds none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (directory / "config.json").is_file():
        raise ValueError(f"--matcher {directory} has no config.json: give a model's folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--matcher {directory} cannot be loaded: {reason(error)}") from None
    model = model.to(device).eval()

    def complete(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt").to(device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=_LONGEST_REPLY)
        return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return complete


def _is_done(path: Path, settings: dict[str, object]) -> bool:
    """Whether a video's file exists. Raises ValueError for one that was made with other settings."""
    if not path.exists():
        return False
    try:
        known = json.loads(path.read_bytes()).get("settings")
    except (ValueError, AttributeError):
        known = None
    if known != settings:
        raise ValueError(f"{path} was made with other settings: give another --output")
    return True
