"""Scores as the printed text, and as numbers by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

EXAMPLE = 80
"""Most characters of an answer that is quoted."""


@dataclass(frozen=True)
class Report:
    """The scores of one benchmark.

    name     its key in the file of --metrics, such as "grounding" or "dense_captioning"
    text     what is printed
    numbers  scores and counts by name: "mIoU", "answers"
    """

    name: str
    text: str
    numbers: Mapping[str, str | float]

    def adding(self, lines: Sequence[str], numbers: Mapping[str, str | float]) -> Report:
        """The report with more lines at its end, and more numbers."""
        return replace(self, text="\n".join([self.text, *lines]), numbers={**self.numbers, **numbers})

    def metrics(self) -> dict[str, dict[str, str | float]]:
        """What the file of --metrics holds."""
        return {self.name: dict(self.numbers)}


def quoted(answer: str) -> str:
    """An answer as an example in a message: on one line, in quotes, at most EXAMPLE characters."""
    text = " ".join(answer.split())
    return repr(text if len(text) <= EXAMPLE else f"{text[: EXAMPLE - 3]}...")
