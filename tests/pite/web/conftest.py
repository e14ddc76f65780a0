"""A running page with a fake chat, and a real headless browser."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.media import write_video

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
ARGUMENTS += ["--disable-sync", "--no-first-run"]
SECONDS = 60_000
"""Limit of each wait, in milliseconds: for hanging pages, not for slow machines."""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("examples") / "first.mp4", 19, rate=2)


@contextmanager
def running(chat: Any, uploads: Path, *paths: Path, ground: Any = None, **flags: Any) -> Iterator[Any]:
    """The started page of a chat with example videos; `address` is its URL."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'pite-engine[web]'")
    from pite.web.examples import Example
    from pite.web.flags import WebFlags
    from pite.web.page import Page
    from pite.web.server import start

    chosen = WebFlags(model=Path("model"), port=free_port(), **flags)
    examples = [Example(path.resolve()) for path in paths]
    page = Page(chat, examples, title="model", max_seconds=chosen.max_seconds, ground=ground)
    blocks = start(page, chosen, uploads)
    blocks.address = f"http://127.0.0.1:{chosen.port}"
    try:
        yield blocks
    finally:
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def page_of() -> Callable[..., Any]:
    return running


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright, which is not here")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: apt install chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield started
        started.close()


class Visitor:
    """One user's window, with the addresses that it requests and the errors of its scripts."""

    def __init__(self, browser: Any, address: str) -> None:
        self.address, self.requests, self.errors = address, [], []
        self.page = browser.new_context(viewport={"width": 1280, "height": 930}).new_page()
        self.page.set_default_timeout(SECONDS)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#question textarea")

    def send(self, question: str) -> None:
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")

    def wait_for(self, text: str) -> None:
        """Wait until the page shows a text."""
        self.page.get_by_text(text, exact=False).first.wait_for()

    def upload(self, path: Path) -> None:
        self.page.set_input_files("#upload input[type=file]", str(path))

    def close(self) -> None:
        self.page.context.close()

    @property
    def elsewhere(self) -> list[str]:
        """Requests to any other host."""
        own = (self.address, "data:", "blob:")
        return [url for url in self.requests if not url.startswith(own)]
