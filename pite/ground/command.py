"""What `python -m pite.ground` does: answers, grounds and draws, one video after the other."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataloaders.files import write_atomically
from pite.ground.flags import GroundFlags
from pite.ground.models import grounder_settings, open_grounder
from pite.ground.overlay import save_overlay

log = logging.getLogger(__name__)


def ground(flags: GroundFlags) -> None:
    """Write the missing files. A video that fails does not end the run; raises ValueError after the last one."""
    settings = _settings(flags)
    missing = [video for video in flags.video if not _is_done(flags.output, video, settings)]
    if not missing:
        log.info("all %d videos are grounded already", len(flags.video))
        return
    grounder, answer = open_grounder(flags), _open_answerer(flags)
    flags.output.mkdir(parents=True, exist_ok=True)
    failures = []
    for video in missing:
        try:
            text = answer(video)
            grounded = grounder(video, text, flags.seconds)
            save_overlay(flags.output / f"{video.stem}.mp4", video, grounded)
        except ValueError as error:
            log.error("%s", error)
            failures.append(str(error))
            continue
        # Written last: it marks the video as done.
        content = {**_source(video), "settings": settings, **grounded.as_dict()}
        write_atomically(flags.output / f"{video.stem}.json", json.dumps(content, ensure_ascii=False) + "\n")
        print(text)
        for phrase, own in grounded.phrases:
            seen = [grounded.objects[number].boxes() for number in own]
            shown = ", ".join(f"frames {min(boxes)} to {max(boxes)}" for boxes in seen)
            print(f"  {phrase.text}: {shown or 'not found'}")
    if failures:
        raise ValueError(f"{len(failures)} of {len(missing)} videos failed; the first: {failures[0]}")


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


def _settings(flags: GroundFlags) -> dict[str, Any]:
    """What a video's files depend on: the flags, and checksums of the models."""
    model = None
    if flags.model is not None:
        from pite import checkpoint

        model = f"{flags.model.name} ({checkpoint.identity(checkpoint.resolve(flags.model))})"
    own = {name: getattr(flags, name) for name in ("query", "answer", "clip", "max_new_tokens")}
    seconds = None if flags.seconds is None else list(flags.seconds)
    return {**own, "seconds": seconds, "model": model, **grounder_settings(flags)}


def _source(video: Path) -> dict[str, Any]:
    return {"video": video.name, "bytes": video.stat().st_size}


def _is_done(folder: Path, video: Path, settings: dict[str, Any]) -> bool:
    """Whether a video's two files exist. Raises ValueError for a JSON of another video or of other settings."""
    path = folder / f"{video.stem}.json"
    if not path.exists():
        return False
    try:
        known = json.loads(path.read_bytes())
        source, made_with = {name: known[name] for name in ("video", "bytes")}, known["settings"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path}: not written by pite.ground, or damaged: remove it or give another --output"
        ) from None
    if source != _source(video):
        raise ValueError(f"{path} was made from another video than {video}: remove it or give another --output")
    if made_with != settings:
        raise ValueError(f"{path} was made with other settings: give another --output")
    return path.with_suffix(".mp4").exists()
