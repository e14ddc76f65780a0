"""What the judge gets: our wording of Video-ChatGPT's criteria (Maaz et al., ACL 2024, section 4), and the reply's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pite.evaluate.qa.benchmarks import Item, Kind

Axis = Literal["match", "correctness", "detail", "context", "temporal", "consistency"]

AXES: Mapping[Kind, tuple[Axis, ...]] = {
    "short": ("match",),
    "generic": ("correctness", "detail", "context"),
    "temporal": ("temporal",),
    "consistency": ("consistency",),
}
"""What an item of each kind is judged for."""

CRITERIA: Mapping[Axis, str] = {
    "match": (
        "Decide whether the candidate means the same as the reference. Synonyms and paraphrases are correct; a candidate "
        "that contradicts the reference or misses it is not. The score grades how well the two agree."
    ),
    "correctness": (
        "Grade the factual correctness of the candidate. Every statement should agree with the reference; what "
        "misrepresents the video or contradicts the reference lowers the score. Synonyms and paraphrases are correct."
    ),
    "detail": (
        "Grade the level of detail of the candidate. It should be complete, with all main points of the reference, and "
        "specific: particular objects, actions and places instead of general phrases. Synonyms and paraphrases count."
    ),
    "context": (
        "Grade how well the candidate fits the context of the video as a whole. It should reflect the main themes and "
        "the mood, and nothing should be out of place in that context. Synonyms and paraphrases count."
    ),
    "temporal": (
        "Grade how well the candidate keeps the temporal order. Events and details should come in the sequence in which "
        "the reference has them. Paraphrases count if that order is kept."
    ),
    "consistency": (
        "Two similar questions have the same reference, and each has a candidate of its own. Grade how consistent the "
        "two candidates are: both should agree with the reference and with each other, without a contradiction or a "
        "large difference in what they state about the video. Paraphrases count."
    ),
}

_SCORE = "a number from 0 (worst) to 5 (best)"
_INTRODUCTION = "You grade answers of a model to questions about a video. You get the correct answer as the reference."


@dataclass(frozen=True)
class Prompt:
    """One request to the judge: system and user message, and the JSON schema of the reply."""

    axis: Axis
    system: str
    user: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]

    @property
    def schema(self) -> dict[str, Any]:
        return schema(self.axis)


def prompts(item: Item, candidates: Sequence[str]) -> list[Prompt]:
    """The requests about an item whose questions have these candidates as answers."""
    assert len(candidates) == len(item.questions), "one answer for each question"
    text = _text(item, candidates)
    return [Prompt(axis, f"{_INTRODUCTION} {CRITERIA[axis]}", f"{text}\n\n{_form(axis)}") for axis in AXES[item.kind]]


def schema(axis: Axis) -> dict[str, Any]:
    """JSON schema of a reply: {"pred": "yes" or "no", "score": 0..5} for a match, {"score": 0..5} for the others."""
    fields: dict[str, Any] = {"pred": {"type": "string", "enum": ["yes", "no"]}} if axis == "match" else {}
    fields["score"] = {"type": "number"}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def _form(axis: Axis) -> str:
    """The reply's form, at the end of the user message: small models follow what they read last."""
    pred = '"pred", which is "yes" for a correct candidate and "no" for another, and ' if axis == "match" else ""
    example = '{"pred": "yes", "score": 4}' if axis == "match" else '{"score": 4}'
    return f'Reply with one JSON object and nothing else. It has {pred}"score", {_SCORE}. Example: {example}'


def _text(item: Item, candidates: Sequence[str]) -> str:
    numbers = [""] if len(candidates) == 1 else [f" {i + 1}" for i in range(len(candidates))]
    lines = [f"Question{number}: {text}" for number, text in zip(numbers, item.questions)]
    lines.append(f"Reference: {item.answer}")
    # One line each, so that no candidate can write a line of another kind.
    lines += [f"Candidate{number}: {' '.join(text.split())}" for number, text in zip(numbers, candidates)]
    return "\n".join(lines)
