"""The page: its components, and what happens at each click.

Each visitor has a `Visit` on the server, with a conversation and a video of their own. The browser never sends the path
of a video, except that of its own upload, which Gradio checks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol, Self

# Gradio reads it when it is imported. It would send the version and a random identifier to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from gradio.utils import get_upload_folder

from dataloaders.errors import sentence
from pite.chat.reply import Reply
from pite.web.examples import MOST, QUESTIONS, Example, thumbnail
from pite.web.grounded import Ground, GroundedAnswer
from pite.web.scene import heading, notice, player, scene
from pite.web.upload import RefusedVideo, accept

log = logging.getLogger(__name__)

_BUTTONS = 3
_FIND = "Find what the answer names in the video"
_FORGOTTEN_AFTER = 6 * 3600
"""Seconds after which an upload, and the state of a visitor who has left, are deleted."""


class Chat(Protocol):
    """What the page uses of a `pite.chat.session.Session`."""

    last: Reply | None

    def fork(self) -> Self: ...

    def forget(self, video: Path | str) -> None: ...

    def stream(
        self, video: Path | str, question: str, *, max_new_tokens: int = ..., temperature: float = ...
    ) -> Iterator[str]: ...


@dataclass
class Visit:
    """One visitor's conversation: the video, the last answer while it is shown, and where what it names is.

    A visitor who is gone has no answer, so that one which is still grounded is dropped like that of an earlier question.
    """

    chat: Chat
    video: Path | None = None
    reply: Reply | None = None
    grounded: GroundedAnswer | None = None

    def forget_grounded(self) -> None:
        """Remove the files of the last grounded answer."""
        if self.grounded is not None:
            self.grounded.remove()
            self.grounded = None

    def end(self) -> None:
        """The visitor is gone: remove the files, and those of an answer that is still grounded."""
        self.reply = None
        self.forget_grounded()


class _NotShown(Exception):
    """The answer that is grounded is not shown any more."""


def upload_box() -> gr.File:
    """Gradio's file component, without its ability to fetch an address that a visitor gives instead of a file."""
    # No subclass: Gradio writes a type stub next to the module of each.
    box = gr.File(label="Upload a video", height=150, scale=5, elem_id="upload")
    move = box.async_move_resource_to_block_cache

    async def moved(path: Any) -> str | None:
        if "://" in str(path):
            raise gr.Error("An address is no upload: download the video, and upload the file.", print_exception=False)
        return await move(path)

    box.async_move_resource_to_block_cache = moved  # type: ignore[method-assign, assignment]
    return box


class Page:
    """Builds the page.

    chat         a session; each visitor gets a fork of it
    examples     videos to pick
    title        what is shown under the heading, such as the model's name
    options      of each answer: max_new_tokens, temperature
    max_seconds  longest video
    ground       finds what an answer names, at a click; None: the page has no button for it
    """

    def __init__(
        self,
        chat: Chat,
        examples: Sequence[Example] = (),
        *,
        title: str = "",
        options: dict[str, Any] | None = None,
        max_seconds: float = 600,
        ground: Ground | None = None,
    ) -> None:
        self._ground = ground
        self._chat, self._title, self._options, self._max_seconds = chat, title, options or {}, max_seconds
        self.examples = [(example, picture) for example in examples if (picture := thumbnail(example.path))]

    def build(self) -> gr.Blocks:
        """The page, to be launched (`pite.web.server`)."""
        with gr.Blocks(
            title="PiTe", analytics_enabled=False, delete_cache=(_FORGOTTEN_AFTER, _FORGOTTEN_AFTER), fill_width=True
        ) as blocks:
            self._visit = gr.State(None, time_to_live=_FORGOTTEN_AFTER, delete_callback=_end)
            gr.HTML(heading(self._title))
            with gr.Row(equal_height=False):
                with gr.Column(scale=7):
                    self._player = gr.HTML(player(None), elem_id="player")
                    self._scene = gr.HTML(scene(None), elem_id="scene")
                    self._find = gr.Button(_FIND, size="sm", visible=False, elem_id="find")
                    self._places = gr.HTML("", elem_id="places")
                with gr.Column(scale=5):
                    self._make_chat()
            with gr.Row(equal_height=True):
                self._make_choice()
            self._connect(blocks)
        return blocks

    def _make_chat(self) -> None:
        self._notice = gr.HTML("", elem_id="notice")
        self._history = gr.Chatbot(
            height=330,
            render_markdown=False,
            show_label=False,
            elem_id="chat",
            buttons=[],
            feedback_options=None,
            placeholder="Type a question about the video.",
        )
        self._question = gr.Textbox(
            show_label=False,
            placeholder="When does the red circle move?",
            submit_btn="Send",
            max_length=2000,
            elem_id="question",
        )
        self._suggestions = [gr.Button(size="sm", visible=False, elem_classes="pite-question") for _ in range(_BUTTONS)]

    def _make_choice(self) -> None:
        self._gallery = gr.Gallery(
            [picture for _, picture in self.examples],
            show_label=False,
            columns=MOST,
            height=150,
            allow_preview=False,
            object_fit="cover",
            scale=7,
            visible=bool(self.examples),
            elem_id="examples",
            buttons=[],
            interactive=False,
        )
        self._upload = upload_box()

    def _connect(self, blocks: gr.Blocks) -> None:
        places = [self._find, self._places]
        shown = [self._visit, self._player, self._scene, self._history, self._notice, *places, *self._suggestions]
        first = self.examples[0][0] if self.examples else None
        blocks.load(lambda: self._show(None, first), None, shown, api_visibility="private")
        self._gallery.select(self._pick, [self._visit], shown, api_visibility="private")
        self._upload.upload(
            self._receive, [self._visit, self._upload], shown, api_visibility="private", concurrency_limit=2
        )
        self._history.clear(
            self._forget, [self._visit], [self._visit, self._scene, self._notice, *places], api_visibility="private"
        )
        # One at a time, in a line of its own: an answer never waits for it.
        self._find.click(
            self._show_places,
            [self._visit],
            places,
            api_visibility="private",
            concurrency_limit=1,
            concurrency_id="grounding",
            show_progress="hidden",
            # The button of a later answer works while the one before is still grounded.
            trigger_mode="multiple",
        )
        answers = [self._visit, self._scene, self._history, self._notice, self._question, *places]
        for event, text in [(self._question.submit, self._question), *((b.click, b) for b in self._suggestions)]:
            # One answer at a time: the others wait in the queue.
            event(
                self._answer,
                [self._visit, text, self._history],
                answers,
                api_visibility="private",
                concurrency_limit=1,
                concurrency_id="model",
                show_progress="hidden",
            )

    def _visitor(self, visit: Visit | None) -> Visit:
        return visit or Visit(self._chat.fork())

    def _show(self, visit: Visit | None, example: Example | None, playable: Path | None = None) -> list[Any]:
        """A video without a conversation."""
        visit = self._visitor(visit)
        visit.video = example.path if example else None
        if visit.video is not None:
            visit.chat.forget(visit.video)
        questions = list(example.questions if example else ())[:_BUTTONS]
        buttons = [gr.Button(text, visible=True) for text in questions]
        buttons += [gr.Button(visible=False)] * (_BUTTONS - len(buttons))
        return [visit, player(playable or visit.video), scene(None), [], "", *self._no_places(visit), *buttons]

    def _pick(self, visit: Visit | None, chosen: gr.SelectData) -> list[Any]:
        return self._show(visit, self.examples[int(chosen.index)][0])

    def _forget(self, visit: Visit | None) -> list[Any]:
        """The visitor has cleared the conversation."""
        visit = self._visitor(visit)
        if visit.video is not None:
            visit.chat.forget(visit.video)
        return [visit, scene(None), "", *self._no_places(visit)]

    def _no_places(self, visit: Visit, reply: Reply | None = None) -> list[Any]:
        """No grounded answer, and with an answer the button for one."""
        visit.forget_grounded()
        visit.reply = reply
        can_find = self._ground is not None and reply is not None and bool(reply.text.strip())
        return [gr.Button(_FIND, visible=can_find, interactive=True), ""]

    def _show_places(self, visit: Visit | None) -> Iterator[tuple[Any, ...]]:
        """Find what the last answer names. The work for an answer that is not shown any more ends, or its result is dropped."""
        visit = self._visitor(visit)
        reply, video = visit.reply, visit.video
        if self._ground is None or reply is None or video is None:
            return
        yield gr.Button(_FIND, interactive=False), notice("Looking for the things that the answer names ...")

        def check() -> None:
            if visit.reply is not reply:
                raise _NotShown

        # Gradio sends what a generator gave last once more at its end.
        shown = nothing = gr.skip(), gr.skip()
        try:
            found = GroundedAnswer(self._ground, video, reply.text, Path(get_upload_folder()), check)
            visit.forget_grounded()
            visit.grounded = found
            shown = gr.Button(_FIND, visible=False), found.html()
        except _NotShown:
            pass
        except Exception as error:
            shown = gr.Button(_FIND, interactive=True), _reason(error, video)
        if visit.reply is not reply:
            visit.forget_grounded()
            shown = nothing
        yield shown

    def _receive(self, visit: Visit | None, file: str | None) -> list[Any]:
        """A visitor's upload; one that cannot be used changes nothing but the notice."""
        if file is None:
            return [self._visitor(visit), *[gr.skip()] * (6 + _BUTTONS)]
        try:
            playable = accept(Path(file), self._max_seconds)
        except RefusedVideo as error:
            return [self._visitor(visit), *[gr.skip()] * 3, notice(str(error), "error"), *[gr.skip()] * (2 + _BUTTONS)]
        return self._show(visit, Example(Path(file), QUESTIONS), playable)

    def _answer(self, visit: Visit | None, question: str, history: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
        """Stream an answer into the conversation; then its intervals and trajectories."""
        visit, same = self._visitor(visit), [gr.skip()] * 2
        if visit.video is None or not question.strip():
            why = "Type a question first." if visit.video else "Upload a video, or pick an example, first."
            yield visit, gr.skip(), gr.skip(), notice(why, "error"), gr.skip(), *same
            return
        talk = [*history, _message("user", question)]
        yield visit, scene(None), talk, notice("Looking at the video ..."), "", *self._no_places(visit)
        text = ""
        try:
            for piece in visit.chat.stream(visit.video, question, **self._options):
                text += piece
                yield visit, gr.skip(), [*talk, _message("assistant", text)], "", gr.skip(), *same
        except Exception as error:
            yield visit, gr.skip(), history, _reason(error, visit.video), question, *same
            return
        places = self._no_places(visit, visit.chat.last)
        text = text or "(no answer)"
        yield visit, scene(visit.chat.last), [*talk, _message("assistant", text)], "", gr.skip(), *places


def _end(visit: Visit | None) -> None:
    if visit is not None:
        visit.end()


def _reason(error: Exception, video: Path) -> str:
    """A notice of an error without the video's path on the server. What is no ValueError is no sentence for users: it is logged."""
    why = sentence(error).replace(str(video), video.name)
    if not isinstance(error, ValueError):
        log.error("%s", video.name, exc_info=error)
        why = "this failed; the server's log has the reason"
    return notice(f"{why[:1].upper()}{why[1:]}.", "error")


def _message(role: str, text: str) -> dict[str, str]:
    """A message whose text is shown as it is: Gradio's chat drops what looks like HTML."""
    return {"role": role, "content": escape(text, quote=False)}
