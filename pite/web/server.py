"""Starts the page's server: limits, files that it gives out, and no request to any other host."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

# Before Gradio is imported: see pite.web.page.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import Request, Response
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from pite import devices
from pite.chat.session import Session
from pite.evaluate.trajectories import trajectory_head_warning
from pite.ground.models import open_grounder
from pite.web import examples
from pite.web.flags import WebFlags
from pite.web.page import Page

log = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)
"""Browsers load nothing from another host, whatever Gradio's page names. Its scripts are inline and use eval."""

Next = Callable[[Request], Awaitable[Response]]


def run_server(flags: WebFlags) -> None:
    """Load the model, start the page, and wait for Ctrl-C. Raises ValueError (one sentence)."""
    device = devices.select(flags.device)
    session = Session.load(
        flags.chosen_model, clip=flags.chosen_clip, device=device, adapters=flags.adapter, history=flags.chosen_history
    )
    if warning := trajectory_head_warning(flags.chosen_model):
        log.warning(warning)
    session.model.generator  # noqa: B018 (loads the weights before the first visitor)
    videos = examples.of_folder(flags.examples) if flags.examples else []
    if flags.model is None and flags.examples is None:
        videos = examples.of_demo(flags.demo)
    options = {"max_new_tokens": flags.max_new_tokens, "temperature": flags.temperature}
    ground = open_grounder(flags) if flags.ground else None
    page = Page(
        session, videos, title=str(flags.chosen_model), options=options, max_seconds=flags.max_seconds, ground=ground
    )
    if flags.host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("the page is open to everyone who can reach %s", flags.host)
    # A stop by systemd, Docker or kill ends like Ctrl-C, so that the uploads are removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="pite-web-") as uploads:
        blocks = start(page, flags, Path(uploads))
        print(f"http://{flags.host}:{flags.port}", flush=True)
        try:
            blocks.block_thread()
        finally:
            blocks.close()


def start(page: Page, flags: WebFlags, uploads: Path) -> gr.Blocks:
    """Start the server in a thread. Uploads and what is made of them are kept in the folder `uploads`.

    Raises ValueError for a port that is in use or an address that is not this machine's.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    blocks = page.build()
    blocks.queue(max_size=flags.queue)
    sans = ("system-ui", "sans-serif")
    try:
        blocks.launch(
            server_name=flags.host,
            server_port=flags.port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            max_file_size=f"{flags.max_upload_mb}mb",
            allowed_paths=[str(example.path) for example, _ in page.examples],
            footer_links=[],
            theme=gr.themes.Base(primary_hue="blue", font=sans, font_mono=("ui-monospace", "monospace")),
            css=(_HERE / "style.css").read_text(),
            head=f"<script>{(_HERE / 'player.js').read_text()}</script>",
            app_kwargs={"middleware": [Middleware(BaseHTTPMiddleware, dispatch=_guard)]},
        )
    except OSError as error:
        raise ValueError(f"--host {flags.host} --port {flags.port}: {error}") from None
    return blocks


async def _guard(request: Request, call_next: Next) -> Response:
    """Refuse addresses where a file of this server is meant, and add the policy to each answer."""
    path = request.url.path
    if "/proxy=" in path or ("file=" in path and ":/" in path.partition("file=")[2]):
        return Response("only files of this server are given out", status_code=403)
    response = await call_next(request)
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
