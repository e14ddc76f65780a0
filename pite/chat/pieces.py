"""The text of an answer in pieces, while its tokens are made."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pite.generate import Generator

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token of one byte. Llama's tokenizer decodes a run of them together: each is a character only if all of them are."""

_HALF = "\ufffd"
"""What other tokenizers write for a character whose last bytes are missing."""


class Pieces:
    """Cuts an answer into pieces that together are its text."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._given = ""

    def of(self, tokens: Sequence[int]) -> str:
        """The text that the last of the tokens so far completed; often empty.

        Spaces at the end wait for what follows, because an answer ends without them, and so do incomplete characters.
        """
        tokenizer, text = self._generator.tokenizer, self._generator.decoded(tokens).text
        incomplete = text.endswith(_HALF) or _BYTE.fullmatch(tokenizer.convert_ids_to_tokens(tokens[-1]))
        return "" if incomplete else self.rest(text)

    def rest(self, text: str) -> str:
        """What is left to give of `text`, which begins with what was given."""
        if not text.startswith(self._given):  # a tokenizer that changes spaces when the next word is there
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece
