"""The page in a real browser: upload, question, answer, time line, drawing, two visitors, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.media import write_video
from tests.pite.web.conftest import Visitor, running
from tests.pite.web.fakes import TEXT, FakeChat


@pytest.fixture(scope="module")
def server(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with running(FakeChat(), tmp_path_factory.mktemp("uploads"), example, max_seconds=60) as blocks:
        yield blocks


@pytest.fixture
def visitor(browser: Any, server: Any) -> Iterator[Visitor]:
    visitor = Visitor(browser, server.address)
    yield visitor
    assert visitor.elsewhere == []
    assert visitor.errors == []
    visitor.close()


def current_time(visitor: Visitor) -> float:
    return float(visitor.page.eval_on_selector("video", "video => video.currentTime"))


def test_from_an_upload_to_when_and_where(visitor: Visitor, tmp_path: Path) -> None:
    """Another codec than browsers play, so it is converted."""
    visitor.upload(write_video(tmp_path / "mine.avi", 19, rate=2, codec="mpeg4"))
    visitor.page.wait_for_selector("video[src*='mine.avi.shown.mp4']")
    visitor.page.wait_for_function("document.querySelector('video').readyState >= 2")
    assert float(visitor.page.eval_on_selector("video", "video => video.duration")) == pytest.approx(9.5, abs=0.1)
    visitor.wait_for("The intervals of the answer appear here.")
    visitor.send("When does the circle move?")
    visitor.wait_for(TEXT)
    bars = visitor.page.locator(".pite-event")
    bars.nth(1).wait_for()
    assert bars.count() == 2
    assert "2.4 to 5.9 s" in visitor.page.locator(".pite-label").first.inner_text()
    assert "a red circle moves right" in visitor.page.locator(".pite-label").first.inner_text()
    assert visitor.page.locator(".pite-object").all_inner_texts() == ["a red circle", "a blue square"]
    assert points(visitor) == 0, "no object at the start"
    bars.nth(1).click()
    visitor.page.wait_for_function("Math.abs(document.querySelector('video').currentTime - 7.126) < 0.01")
    visitor.page.wait_for_function("document.querySelector('.pite-screen canvas').dataset.points == 3")
    assert drawn(visitor, (64, 196, 255)), "the second object is drawn in its colour"
    assert not drawn(visitor, (255, 176, 0))
    line = visitor.page.locator(".pite-timeline").bounding_box()
    visitor.page.locator(".pite-ruler").click(position={"x": line["width"] * 0.4, "y": 10})
    visitor.page.wait_for_function("Math.abs(document.querySelector('video').currentTime - 3.8) < 0.1")
    visitor.page.wait_for_function("document.querySelector('.pite-screen canvas').dataset.points == 3")
    assert drawn(visitor, (255, 176, 0))


def points(visitor: Visitor) -> int:
    return int(visitor.page.eval_on_selector(".pite-screen canvas", "canvas => canvas.dataset.points"))


def drawn(visitor: Visitor, color: tuple[int, int, int]) -> bool:
    """Whether the canvas over the video holds pixels of a colour."""
    count = visitor.page.eval_on_selector(
        ".pite-screen canvas",
        """(canvas, color) => {
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            let count = 0;
            for (let i = 0; i < pixels.length; i += 4)
                count += color.every((part, k) => Math.abs(pixels[i + k] - part) < 8) && pixels[i + 3] === 255;
            return count;
        }""",
        list(color),
    )
    return int(count) > 50


def test_the_first_example_and_its_questions_are_there_at_once(visitor: Visitor) -> None:
    visitor.page.wait_for_selector("video[src*='first.mp4']")
    visitor.page.get_by_text("What happens in the video?").click()
    visitor.wait_for(TEXT)
    visitor.page.locator("#examples button").first.click()
    visitor.page.wait_for_selector(".pite-event", state="detached")
    assert TEXT not in visitor.page.inner_text("#chat"), "another video is another conversation"


def test_two_visitors_at_once_get_their_own_answers(browser: Any, server: Any, tmp_path: Path) -> None:
    visitors = [Visitor(browser, server.address) for _ in range(2)]
    visitors[1].upload(write_video(tmp_path / "second.mp4", 10))
    visitors[1].page.wait_for_selector("video[src*='second.mp4']")
    visitors[0].page.wait_for_selector("video[src*='first.mp4']")
    for turn in ("one", "two"):
        for name, visitor in zip("AB", visitors, strict=True):
            visitor.send(f"{turn} of {name}")
        for visitor in visitors:
            visitor.page.wait_for_function("document.querySelectorAll('.pite-event').length == 2")
        if turn == "two":
            for name, visitor in zip("AB", visitors, strict=True):
                visitor.wait_for(f"Question 2: two of {name}")
                shown = visitor.page.inner_text("#chat")
                assert f"one of {name}" in shown and f"of {'BA'['AB'.index(name)]}" not in shown
    for visitor in visitors:
        visitor.close()


@pytest.mark.parametrize("kind", ["text", "cut", "long"])
def test_an_upload_that_is_no_video_is_one_sentence(visitor: Visitor, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}.mp4"
    write_video(path, 70 if kind == "long" else 10, rate=1 if kind == "long" else 10)
    if kind == "text":
        path.write_text("<b>no video</b>")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:900])
    visitor.page.wait_for_selector("video[src*='first.mp4']")
    visitor.upload(path)
    found = visitor.page.wait_for_selector(".pite-notice.pite-error").inner_text()
    if kind == "long":
        assert found == "The video lasts 70 s, and this page takes 60 s at most: upload a part of it."
    else:
        assert found.startswith(f"This file is no video that can be shown ({kind}.mp4: ") and found.endswith(").")
    assert "/" not in found, "no path of the server"
    assert visitor.page.locator("video[src*='first.mp4']").count() == 1, "the video before is still there"
    visitor.send("What happens?")
    visitor.wait_for(TEXT)


def test_an_error_of_the_chat_is_one_sentence(visitor: Visitor) -> None:
    visitor.page.wait_for_selector("video[src*='first.mp4']")
    visitor.send("fail <img src=x onerror=alert(1)>")
    found = visitor.page.wait_for_selector(".pite-notice.pite-error").inner_text()
    assert found == "First.mp4: frame 3 is damaged."
    assert visitor.page.input_value("#question textarea").startswith("fail"), "the question can be changed"
    question = 'Is <img src=x onerror=alert(1)> & "this" seen?'
    visitor.send(question)
    visitor.wait_for(question)


def test_the_real_session_answers_on_the_page(
    browser: Any, page_of: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From the example to the answer of random weights, which is that of the session."""
    from pite.chat.session import Session
    from tests.held_out import make_held_out

    made = make_held_out(tmp_path_factory.mktemp("made"))
    session = Session.load(made / "model", clip=f"{made}/clip", device="cpu")
    video = made / "data/evaluation/videos/e000000.mp4"
    expected = session.fork().answer(video, "What happens?", max_new_tokens=64).text
    with page_of(session, tmp_path_factory.mktemp("uploads"), video) as blocks:
        visitor = Visitor(browser, blocks.address)
        visitor.page.wait_for_selector("video[src*='e000000.mp4']")
        visitor.send("What happens?")
        beginning = expected.split("�")[0][:12]
        visitor.page.wait_for_function(
            "text => document.querySelector('#chat').innerText.includes(text)", arg=beginning
        )
        visitor.close()
