"""The button that finds what an answer names: video, phrases and JSON, while other questions are answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dataloaders.annotation.steps import Phrase
from pite.ground.grounding import Check, Grounded, Grounder
from tests.pite.ground.squares import Colours, write_squares
from tests.pite.web.conftest import Visitor, running
from tests.pite.web.fakes import TEXT, FakeChat

PHRASES = [Phrase("a red circle", TEXT.index("a red")), Phrase("a blue square", TEXT.index("a blue"))]


class Ground:
    """Grounds an answer when `gate` is open, and not one about "damaged" frames; `texts` are the answers."""

    def __init__(self) -> None:
        self.gate, self.texts = threading.Event(), list[str]()
        self._grounder = Grounder(lambda text: PHRASES, Colours())

    def __call__(self, video: Path, text: str, *, check: Check) -> Grounded:
        self.texts.append(text)
        assert self.gate.wait(60)
        if "damaged" in text:
            raise ValueError(f"{video}: ends before frame 3")
        return self._grounder(video, text, check=check)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def ground() -> Ground:
    return Ground()


@pytest.fixture(scope="module")
def server(ground: Ground, uploads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    video = write_squares(tmp_path_factory.mktemp("squares") / "squares.mp4", "red", "blue")
    with running(FakeChat(), uploads, video, ground=ground) as blocks:
        yield blocks
    assert not list(uploads.glob("grounded-*/*.tmp"))


@pytest.fixture
def visitor(browser: Any, server: Any) -> Iterator[Visitor]:
    visitor = Visitor(browser, server.address)
    visitor.page.wait_for_selector("video[src*='squares.mp4']")
    yield visitor
    assert visitor.elsewhere == [] and visitor.errors == []
    visitor.close()


def test_boxes_and_masks_are_shown_as_a_video(visitor: Visitor, server: Any, ground: Ground, uploads: Path) -> None:
    ground.gate.set()
    assert not visitor.page.locator("#find").is_visible()
    visitor.send("What moves?")
    visitor.page.locator("#find").click()
    visitor.page.wait_for_selector(".pite-grounded video")
    visitor.page.wait_for_function("document.querySelector('.pite-grounded video').readyState >= 2")
    assert visitor.page.eval_on_selector(".pite-grounded video", "video => video.videoWidth") == 128
    shown = visitor.page.locator(".pite-grounded .pite-object")
    assert shown.all_inner_texts() == ["a red circle: not found", "a blue square: 0.0 to 1.9 s"]
    assert not visitor.page.locator("#find").is_visible() and ground.texts[-1] == TEXT
    link = visitor.page.get_attribute(".pite-grounded a", "href")
    found = httpx.get(f"{server.address}/{link}", timeout=60).json()
    assert found["answer"] == TEXT and [each["tag"] for each in found["objects"]] == ["blue square"]
    assert len(list(uploads.glob("grounded-*"))) == 1
    visitor.send("And now?")
    visitor.page.wait_for_selector(".pite-grounded", state="detached")
    visitor.wait_for("Question 2: And now?")
    assert not list(uploads.glob("grounded-*")), "the files of the last one are removed"


def test_an_answer_does_not_wait_and_a_late_result_is_dropped(visitor: Visitor, ground: Ground, uploads: Path) -> None:
    ground.gate.clear()
    visitor.send("What moves?")
    visitor.page.locator("#find").click()
    visitor.wait_for("Looking for the things that the answer names ...")
    visitor.send("And now?")
    visitor.wait_for("Question 2: And now?")
    visitor.page.wait_for_selector("#places .pite-notice", state="detached")
    ground.gate.set()
    visitor.page.locator("#find").click()
    visitor.page.wait_for_selector(".pite-grounded video")
    assert ground.texts[-1] == f"{TEXT} Question 2: And now?"
    assert len(list(uploads.glob("grounded-*"))) == 1
    visitor.page.locator("#examples button").first.click()
    visitor.page.wait_for_selector(".pite-grounded", state="detached")
    assert not visitor.page.locator("#find").is_visible() and not list(uploads.glob("grounded-*"))


def test_an_error_is_one_sentence(visitor: Visitor, ground: Ground) -> None:
    ground.gate.set()
    visitor.send("What moves?")
    visitor.wait_for(TEXT)
    visitor.send("Is it damaged?")
    visitor.wait_for("Question 2: Is it damaged?")
    visitor.page.locator("#find").click()
    found = visitor.page.wait_for_selector("#places .pite-notice.pite-error").inner_text()
    assert found == "Squares.mp4: ends before frame 3."
    assert visitor.page.locator("#find").is_enabled()
