"""The text around frames, questions and answers: Vicuna v1's, or a tokenizer's own chat template.

Vicuna v1 is the published prompt. It is used for the bases of PiTe, which are Llama 2's: they have no chat template, or
Llama 2's own. Any other chat template is rendered once, with marks in the place of the frames, the question and the
answer, and split at them:

    <|im_start|>user\\n | frames | \\n | question | <|im_end|>\\n<|im_start|>assistant\\n | answer | <|im_end|>
    head                          first             reply                                             ends

Every turn has the form that the template gives the last one. So a prompt stays the beginning of the sample that
holds it, also where a template writes earlier answers in another form (Qwen3 removes an empty <think> block).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataloaders.errors import reason

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_DAY = {
    "%d": "26",
    "%-d": "26",
    "%m": "07",
    "%b": "Jul",
    "%B": "July",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
    "%a": "Fri",
}
_FIXED_DAY = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('{code}', '{text}')" for code, text in _DAY.items())
    + " }}{%- endmacro -%}"
)
"""Replaces the function of today's date in a template: a prompt has to be the same in training and years later."""

_FRAMES, _QUESTION, _ANSWER, _NEXT, _LAST = (
    f"PITE{name}MARK" for name in ("FRAMES", "QUESTION", "ANSWER", "NEXT", "LAST")
)


@dataclass(frozen=True)
class Layout:
    """The text of a conversation around its contents.

    head         before the frames; has_bos: the id of the token for the beginning of a text comes before it
    first        between the frames and the first question
    later        between the token that ends an answer and the next question
    reply        after a question; a prompt ends with it
    lead, trail  spaces around an answer, which the model generates
    end          the token that ends an answer, as text; None: the tokenizer's own for the end of a text
    """

    head: str
    first: str
    later: str
    reply: str
    lead: str = ""
    trail: str = ""
    end: str | None = None
    has_bos: bool = False

    def prompt(self, turn: int, question: str) -> str:
        """The text between the frames, or the end of the turn before, and the answer of turn number `turn`."""
        return f"{self.later if turn else self.first}{question}{self.reply}"

    def answer(self, text: str) -> str:
        """An answer as it follows the prompt."""
        return f"{self.lead}{text}{self.trail}"


VICUNA = Layout(f"{SYSTEM} USER: ", "\n", "USER: ", " ASSISTANT:", lead=" ", has_bos=True)


@lru_cache(maxsize=4)
def layout_of(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """The layout of a language model's conversations, by its tokenizer.

    Raises ValueError for a tokenizer without offsets, for one without the tokens that its layout needs, and for a chat
    template that cannot be split.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} does not give the character offsets of its tokens; use a fast tokenizer"
        )
    template = tokenizer.chat_template
    if template and "<<SYS>>" not in str(template):
        return _split(tokenizer)
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} lacks a token for the beginning or the end of a text")
    return VICUNA


def end_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that end an answer: the one that training teaches, then the tokenizer's own if it is another."""
    end, own = layout_of(tokenizer).end, tokenizer.eos_token_id
    taught = own if end is None else tokenizer.convert_tokens_to_ids(end)
    return (taught,) if own in (None, taught) else (taught, own)


def as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    r"""A question or an answer in which no token of the layout can be spelled: `<|im_end|>` becomes `\u2039|im_end|>`.

    The length stays, so positions of mentions do. Vicuna's texts have no `</s>` (`dataloaders.formats.fields`).
    """
    if layout_of(tokenizer) is VICUNA:
        return text
    for token in _special_tokens(tokenizer):
        text = text.replace(token, "\u2039" + token[1:])
    return text


def _split(tokenizer: PreTrainedTokenizerBase) -> Layout:
    user = {"role": "user", "content": f"{_FRAMES}\n{_QUESTION}"}
    turn = [user, {"role": "assistant", "content": _ANSWER}]
    following = [{"role": "user", "content": _NEXT}, {"role": "assistant", "content": _LAST}]
    head, first, reply, tail = _pieces(_render(tokenizer, turn), _FRAMES, _QUESTION, _ANSWER)
    trail, end, _ = _at_end_token(tokenizer, tail)
    between = _pieces(_render(tokenizer, turn + following), _ANSWER, _NEXT, _LAST)[1]
    _, same, later = _at_end_token(tokenizer, between)
    if same != end:
        raise ValueError(f"its chat template ends an answer with {end!r}, and with {same!r} before another question")
    # The space before an answer belongs to its first token in some vocabularies, so the model generates it.
    prompt = reply.rstrip(" ")
    return Layout(head, first, later, prompt, reply[len(prompt) :], trail, end)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    settings: dict[str, Any] = {"tokenize": False, "enable_thinking": False}
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _FIXED_DAY + template
        return str(tokenizer.apply_chat_template(messages, chat_template=template, **settings))
    except Exception as error:  # a template can raise anything
        raise ValueError(f"its chat template cannot render a question and an answer: {reason(error)}") from None


def _pieces(text: str, *marks: str) -> list[str]:
    """The text before, between and after the marks."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError("its chat template does not hold a question and its answer once each, in this order")
        pieces.append(before)
    return [*pieces, text]


def _at_end_token(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[str, str, str]:
    """What follows an answer, split at its first special token: the text before it, the token, the text after it."""
    positions = {token: text.find(token) for token in _special_tokens(tokenizer)}
    found = [(position, -len(token), token) for token, position in positions.items() if position >= 0]
    if not found or text[: min(found)[0]].strip():
        raise ValueError("its chat template ends an answer with no special token, so generation could not stop there")
    position, _, token = min(found)
    return text[:position], token, text[position + len(token) :]


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*tokenizer.all_special_tokens, *added}, key=lambda token: (-len(token), token)))
