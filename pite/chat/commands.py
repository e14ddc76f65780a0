"""What `python -m pite.chat` prints: an answer to each question, about one video or each of a folder."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataloaders.decode.video import probe
from dataloaders.errors import sentence
from dataloaders.transcripts import read_transcript
from pite import devices
from pite.chat.flags import ChatFlags
from pite.chat.reply import Reply
from pite.chat.session import Session
from pite.draw import save_strip, save_video
from pite.evaluate.trajectories import trajectory_head_warning

log = logging.getLogger(__name__)

_DRAWN_WIDTH = 960
"""Pixels of the frames that are drawn on; the drawing is half as wide, without the steps that Pillow's lines have."""


def chat(flags: ChatFlags) -> int:
    """Answer the questions of the flags, or those of stdin; returns the exit status. Raises ValueError."""
    device = devices.select(flags.device)
    if not flags.video.is_dir():
        probe(flags.video)  # before a model is loaded
    transcript = None if flags.transcript is None else read_transcript(flags.transcript)
    session = Session.load(
        flags.model, clip=flags.clip, device=device, adapters=flags.adapter, history=flags.history, family=flags.family,
        transcript=transcript,
    )  # fmt: skip
    if flags.trajectory is not None and session.model.config.choices.marks:
        raise ValueError(f"{flags.model} predicts no trajectories: leave --trajectory out")
    if flags.trajectory is not None and (warning := trajectory_head_warning(flags.model)):
        log.warning(warning)
    chat = Chat(session, flags)
    if flags.video.is_dir():
        return chat.answer_folder()
    for question in flags.query:
        chat.answer(flags.video, question)
    if not flags.query:
        chat.interact()
    return 0


class Chat:
    """Prints the answers of a session."""

    def __init__(self, session: Session, flags: ChatFlags) -> None:
        self.session, self.flags = session, flags
        self._options: dict[str, Any] = {"max_new_tokens": flags.max_new_tokens, "temperature": flags.temperature}

    def answer(self, video: Path, question: str) -> None:
        """Print and draw the answer to one question. Raises ValueError."""
        reply = self._print_json(video, question) if self.flags.json else self._print_text(video, question)
        if self.flags.trajectory is not None:
            self._draw(video, reply, self.flags.trajectory)

    def interact(self) -> None:
        """Answer each line of stdin; Ctrl-C ends an answer, and at the prompt the chat."""
        for question in _lines():
            try:
                self.answer(self.flags.video, question)
            except KeyboardInterrupt:
                print(flush=True)
                print("stopped; Ctrl-C again or Ctrl-D ends the chat", file=sys.stderr)
            except ValueError as error:
                print(f"pite.chat: {sentence(error)}", file=sys.stderr)

    def answer_folder(self) -> int:
        """Print one JSON line per video and question; a video that fails has an "error" in its lines. Exit status."""
        failed = 0
        for video in self.flags.videos:
            try:
                for question in self.flags.query:
                    self._print_json(video, question)
            except ValueError as error:
                failed += 1
                _print({"video": str(video), "question": question, "error": sentence(error)})
        if failed:
            log.error("%d of %d videos have no answer; their lines hold an error", failed, len(self.flags.videos))
        return int(failed > 0)

    def _print_json(self, video: Path, question: str) -> Reply:
        reply = self.session.answer(video, question, phrases=self.flags.phrase, **self._options)
        _print({"video": str(video), "question": question, **reply.as_dict()})
        return reply

    def _print_text(self, video: Path, question: str) -> Reply:
        for piece in self.session.stream(video, question, phrases=self.flags.phrase, **self._options):
            print(piece, end="", flush=True)
        print(flush=True)
        reply = self.session.last
        assert reply is not None
        for event in reply.events:
            if event.seconds is not None:
                (first, last), (start, end) = event.frames, event.seconds
                print(f"  from {first:02d} to {last:02d}: {start:.1f} to {end:.1f} s of {reply.duration:.1f} s")
        return reply

    def _draw(self, video: Path, reply: Reply, path: Path) -> None:
        tracks, phrases = reply.tracks, self.flags.phrase
        if not tracks and phrases:
            raise ValueError(f"the answer does not contain {' or '.join(map(repr, phrases))}: nothing was drawn")
        frames = self.session.model.videos.frames(video, _DRAWN_WIDTH)
        if path.suffix.lower() == ".png":
            save_strip(path, frames, tracks, title=reply.text)
        else:
            save_video(path, frames, tracks)
        if tracks:
            log.info("%s: %s", path, ", ".join(track.label for track in tracks))
        else:
            log.warning(
                "%s: written without points, because no object was found in the answer; name one with --phrase", path
            )


def _print(values: dict[str, object]) -> None:
    print(json.dumps(values, ensure_ascii=False), flush=True)


def _lines() -> Iterator[str]:
    """The lines of stdin that hold text; with a prompt on a terminal, where Ctrl-C ends them."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return
        if not terminal and not line:
            return
        if line.strip():
            yield line.strip()
