"""The steps of grounding an answer at a click, without a browser: faults, visitors who are gone, later answers, times."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from pite.ground.grounding import Check, Footage, Grounded, Grounder, go_on
from tests.pite.ground.squares import Colours, parse, place, write_squares
from tests.pite.web.fakes import FakeChat

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'pite-engine[web]'")

from pite.web.grounded import GroundedAnswer
from pite.web.page import Page, Visit, _end

GROUNDER = Grounder(parse, Colours())


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", f"{folder}")
    return folder


@pytest.fixture
def visit(tmp_path: Path) -> Visit:
    video = write_squares(tmp_path / "a.mp4", "red")
    reply: Any = SimpleNamespace(text="a red square")
    return Visit(FakeChat(), video, reply)


def places(visit: Visit, before: Callable[[], None], go: Check | None = None) -> Iterator[tuple[Any, ...]]:
    """What the page shows. `before` is called when the grounding starts, `go` before each frame, with the page's check."""

    def ground(video: Path, text: str, *, check: Check) -> Grounded:
        before()

        def both() -> None:
            (go or go_on)()
            check()

        return GROUNDER(video, text, check=both)

    return Page(FakeChat(), ground=ground)._show_places(visit)


def test_what_is_found_is_shown(visit: Visit, uploads: Path) -> None:
    waiting, (button, shown) = places(visit, go_on)
    assert not waiting[0].interactive and "Looking for the things" in waiting[1]
    assert not button.visible and "a red square: 0.0 to 1.9 s" in shown
    (folder,) = uploads.iterdir()
    _end(visit)
    assert not folder.exists()


def test_a_second_click_replaces_the_files(visit: Visit, uploads: Path) -> None:
    clicks = [places(visit, go_on) for _ in range(2)]
    assert all(shown for click in clicks for shown in click)
    assert len(list(uploads.iterdir())) == 1


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), ValueError("a.mp4: ends")])
def test_any_fault_leaves_the_button_and_a_notice(visit: Visit, uploads: Path, caplog, error: Exception) -> None:
    def fail() -> None:
        raise error

    _, (button, shown) = places(visit, fail)
    assert button.interactive and not list(uploads.iterdir())
    if isinstance(error, ValueError):
        assert "A.mp4: ends." in shown and not caplog.records
    else:
        assert "This failed; the server&#x27;s log has the reason." in shown and "CUDA out of memory" in caplog.text


def test_a_fault_while_answering_is_a_notice(visit: Visit, monkeypatch, caplog) -> None:
    def fail(*rest: Any, **options: Any) -> Iterator[str]:
        raise RuntimeError("CUDA out of memory")
        yield

    monkeypatch.setattr(visit.chat, "stream", fail)
    *_, shown = Page(FakeChat())._answer(visit, "What moves?", [])
    assert "This failed" in shown[3] and shown[4] == "What moves?" and "CUDA out of memory" in caplog.text


@pytest.mark.parametrize("fault", [False, True])
def test_a_visitor_who_is_gone_leaves_no_files(visit: Visit, uploads: Path, fault: bool) -> None:
    def leave() -> None:
        _end(visit)
        if fault:
            raise ValueError("too late to be shown")

    _, last = places(visit, leave)
    assert last == nothing() and visit.grounded is None and not list(uploads.iterdir())


def test_a_visitor_who_goes_while_the_drawing_is_written_leaves_no_files(visit: Visit, uploads, monkeypatch) -> None:
    html = GroundedAnswer.html

    def leave(self: GroundedAnswer) -> str:
        _end(visit)
        return html(self)

    monkeypatch.setattr(GroundedAnswer, "html", leave)
    _, last = places(visit, go_on)
    assert last == nothing() and not list(uploads.iterdir())


def test_work_for_an_earlier_answer_ends_before_the_next_frame(visit: Visit, uploads: Path) -> None:
    looks = []

    def count() -> None:
        looks.append(1)
        if len(looks) == 2:
            visit.reply = None

    _, last = places(visit, go_on, count)
    assert last == nothing() and len(looks) == 2 and not list(uploads.iterdir())


def nothing() -> tuple[Any, ...]:
    import gradio as gr

    return gr.skip(), gr.skip()


def test_times_are_those_of_the_frames(tmp_path: Path) -> None:
    """Ten frames in the first second, then one a second; the red square comes with the eleventh frame."""
    video, moments = tmp_path / "uneven.mp4", [*range(10), *range(10, 110, 10)]
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index, moment in enumerate(moments):
            picture = np.full((96, 128, 3), 40, np.uint8)
            if index >= 10:
                left, top, right, bottom = place("red", index).astype(int)
                picture[top:bottom, left:right] = np.eye(3)[0] * 230
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    times = np.array(moments) / 10
    np.testing.assert_allclose(Footage.of(video).times, times, atol=1e-3)
    answer = GroundedAnswer(Grounder(parse, Colours(), every=0.1), video, "a red square", tmp_path, go_on)
    assert re.findall(r"a red square: ([^<]*)", answer.html()) == ["1.0 to 10.0 s"]
    (drawn,) = tmp_path.glob("grounded-*/overlay.mp4")
    np.testing.assert_allclose(Footage.of(drawn).times, times, atol=1e-3)
