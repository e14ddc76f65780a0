"""Where the things are that an answer names: a video with their boxes and masks, a list of phrases, and a JSON file."""

from __future__ import annotations

import json
import shutil
import tempfile
from html import escape
from pathlib import Path
from typing import Protocol

from dataloaders.annotation.tracking import Check
from dataloaders.files import write_atomically
from pite.draw import COLORS
from pite.ground.grounding import Grounded
from pite.ground.overlay import save_overlay
from pite.web.scene import css_color, file_address


class Ground(Protocol):
    """Video and answer -> the objects of its phrases. Raises ValueError (one sentence), and what `check` raises."""

    def __call__(self, video: Path, text: str, *, check: Check) -> Grounded: ...


_OVERLAY, _JSON = "overlay.mp4", "grounded.json"
_SHOWN = """<div class="pite-grounded">
<div class="pite-screen"><video src="{video}" controls muted playsinline preload="auto"></video></div>
<div class="pite-legend">{phrases}</div>
<a href="{json}" download="{name}">boxes and masks (JSON)</a>
</div>"""


class GroundedAnswer:
    """The files of a grounded answer, in a folder of their own that `remove` deletes.

    parent  a folder whose files the server gives out
    check   called before each frame: what it raises ends the work, and leaves no file
    """

    def __init__(self, ground: Ground, video: Path, text: str, parent: Path, check: Check) -> None:
        self._grounded = ground(video, text, check=check)
        self._folder = Path(tempfile.mkdtemp(prefix="grounded-", dir=parent))
        try:
            save_overlay(self._folder / _OVERLAY, video, self._grounded, check)
            write_atomically(self._folder / _JSON, json.dumps(self._grounded.as_dict(), ensure_ascii=False) + "\n")
        except BaseException:
            self.remove()
            raise

    def html(self) -> str:
        """The video, and the phrases with the seconds between which they are found."""
        phrases = "".join(self._phrase(phrase.text, own) for phrase, own in self._grounded.phrases)
        return _SHOWN.format(
            video=escape(file_address(self._folder / _OVERLAY)),
            json=escape(file_address(self._folder / _JSON)),
            name=_JSON,
            phrases=phrases or "The answer names no thing.",
        )

    def _phrase(self, text: str, own: tuple[int, ...]) -> str:
        if not own:
            return f'<span class="pite-object">{escape(text)}: not found</span>'
        frames = [frame for number in own for frame in self._grounded.objects[number].found]
        times = self._grounded.times
        start, end = (times[frame] - times[self._grounded.span[0]] for frame in (min(frames), max(frames)))
        dots = "".join(f'<i style="background: {css_color(COLORS[n % len(COLORS)])}"></i>' for n in own)
        return f'<span class="pite-object">{dots}{escape(text)}: {start:.1f} to {end:.1f} s</span>'

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
