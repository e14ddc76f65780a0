"""HTML of the player, and what player.js draws on it. All text from videos, answers and visitors is escaped."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pite.chat.reply import Reply
from pite.draw import COLORS

_NEUTRAL = (148, 156, 172)
_PLAYER = """<div class="pite-player">
<div class="pite-screen"><video src="{source}" controls muted playsinline preload="auto"></video><canvas></canvas></div>
<div class="pite-legend"></div>
<div class="pite-timeline" title="click to jump"></div>
</div>"""
_EMPTY = '<div class="pite-player"><div class="pite-screen pite-empty">Upload a video, or pick an example.</div></div>'


def heading(model: str) -> str:
    """The top of the page."""
    return (
        '<div class="pite-title"><h1>PiTe: when and where</h1><p>The answer to a question about a video, its intervals on '
        f"the time line, and the predicted trajectories of its objects. Model: {escape(model)}</p></div>"
    )


def player(path: Path | None) -> str:
    """The player of a file that the server gives out; without one an invitation."""
    return _EMPTY if path is None else _PLAYER.format(source=escape(file_address(path)))


def file_address(path: Path) -> str:
    """The address of a file that the server gives out."""
    # Relative, so that it also works under the path of a proxy.
    return f"gradio_api/file={quote(str(path))}"


def scene(reply: Reply | None) -> str:
    """A hidden element with the intervals and trajectories of an answer, as JSON that player.js reads."""
    text = json.dumps({} if reply is None else values(reply))
    return f'<div class="pite-scene" data-scene="{escape(text)}"></div>'


def values(reply: Reply) -> dict[str, Any]:
    """Intervals and trajectories with their colours: an interval has that of the first object in its sentence."""
    tracks = [{**track.as_dict(), "color": css_color(COLORS[i % len(COLORS)])} for i, track in enumerate(reply.tracks)]
    events = []
    for event in reply.events:
        own = (track["color"] for track in tracks if track["phrase"] in event.text and track["frames"] == event.frames)
        events.append({**event.as_dict(), "color": next(own, css_color(_NEUTRAL))})
    times = list(reply.times)
    return {"tracks": tracks, "events": events, "times": times, "frames": reply.num_frames, "duration": reply.duration}


def notice(text: str = "", kind: str = "info") -> str:
    """One sentence above the chat."""
    return f'<div class="pite-notice pite-{kind}" role="status">{escape(text)}</div>' if text else ""


def css_color(color: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in color)
