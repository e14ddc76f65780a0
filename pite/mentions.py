"""Finds the objects that a generated answer names, with a simple rule whose failures are known.

Training data has noun phrases from a constituency parser; a chat must not need a parser. The rule: a phrase is a
determiner and the words after it, up to `MAX_WORDS`. It ends before punctuation, before a function word, and before any
word but the first that ends like a verb (-s, -ed, -ing). "From 04 to 20, a red circle moves right." gives
"a red circle". The rule misses nouns without a determiner, and cuts plurals after an adjective short.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pite.evaluate.metrics import Interval, parse_interval

MAX_WORDS = 3
_DETERMINER = re.compile(
    "a|an|the|this|that|these|those|some|another|each|both|two|three|four|five|six|his|her|its|their|our|my|your"
)
_FUNCTION_WORD = re.compile(
    "and|or|but|of|in|on|at|to|from|with|without|by|for|as|into|onto|over|under|near|between|behind|through|then|while|"
    "when|where|who|which|that|is|are|was|were|be|has|have|had|can|could|will|would|may|might|not|it|he|she|they|"
    "there|before|after|during|until|up|down|left|right|first|last|next"
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_SENTENCE = re.compile(r"[^.!?]+")
_CANDIDATE = re.compile(r"\d{1,3} (?:to|and) \d{1,3}")


@dataclass(frozen=True)
class Phrase:
    """A noun phrase at characters `start` to `end` (exclusive) of an answer, with the interval of its sentence."""

    text: str
    start: int
    end: int
    interval: Interval | None


def find_phrases(answer: str, num_frames: int) -> list[Phrase]:
    """Noun phrases of an answer in order; each has its sentence's `a to b`, if any, as fractions of the video."""
    phrases = []
    for sentence in _SENTENCE.finditer(answer):
        interval = parse_interval(sentence[0], num_frames, "published")
        words = list(_WORD.finditer(sentence[0]))
        position = 0
        while position < len(words):
            length = _phrase_length(sentence[0], words[position:])
            if length:
                start, end = words[position].start(), words[position + length].end()
                offset = sentence.start()
                phrases.append(Phrase(sentence[0][start:end], offset + start, offset + end, interval))
            position += length + 1
    return phrases


def _phrase_length(text: str, words: Sequence[re.Match[str]]) -> int:
    """How many words after the first belong to the phrase that it starts; 0 if it starts none."""
    if not _DETERMINER.fullmatch(words[0][0].lower()):
        return 0
    length = 0
    for before, word in pairwise(words[: MAX_WORDS + 1]):
        lowered = word[0].lower()
        interrupted = text[before.end() : word.start()].strip() != ""
        outside = _FUNCTION_WORD.fullmatch(lowered) or _DETERMINER.fullmatch(lowered)
        if interrupted or outside or (length and _looks_like_verb(lowered)):
            break
        length += 1
    return length


def _looks_like_verb(word: str) -> bool:
    return word.endswith(("ed", "ing")) or (word.endswith("s") and not word.endswith(("ss", "us", "is")))


@dataclass(frozen=True)
class FrameInterval:
    """`a to b` or `a and b` in an answer: the frames `first` to `last`, in order, and the sentence around it."""

    first: int
    last: int
    sentence: str


def find_intervals(answer: str, num_frames: int) -> list[FrameInterval]:
    """Every interval of an answer whose indices are frames, in the order of the text; `parse_interval`'s strict rule."""
    found = []
    for sentence in _SENTENCE.finditer(answer):
        for match in _CANDIDATE.finditer(answer, sentence.start(), sentence.end()):
            # The strict rule looks at one character before the first index and two after the second.
            interval = parse_interval(answer[max(match.start() - 1, 0) : match.end() + 2], num_frames, "strict")
            if interval is not None and max(interval) < 1:
                first, last = sorted(round(time * num_frames) for time in interval)
                found.append(FrameInterval(first, last, sentence[0].strip()))
    return found


def find_named(answer: str, names: Sequence[str], num_frames: int) -> list[Phrase]:
    """Every occurrence of one of `names` in the answer, in any case; for phrases that the rule cannot find."""
    phrases = []
    for sentence in _SENTENCE.finditer(answer):
        interval = parse_interval(sentence[0], num_frames, "published")
        for name in names:
            for match in re.finditer(re.escape(name), sentence[0], flags=re.IGNORECASE):
                offset = sentence.start()
                phrases.append(Phrase(match[0], offset + match.start(), offset + match.end(), interval))
    return sorted(phrases, key=lambda phrase: phrase.start)
