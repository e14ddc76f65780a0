"""Which phrase of an answer is which object: by words, or by a local language model.

A phrase gets a tag, one of the names that a detector looks for, and then objects with this tag. An object belongs to one
thing that the answer names: "a man" and "another man" are two objects, "a man" and later "the man" are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from dataloaders.annotation.people import names_person
from dataloaders.annotation.steps import Phrase

_POINTING = frozenset(["the", "this", "that", "these", "those", "his", "her", "its", "their"])
_STARTS = _POINTING | frozenset(
    [
        "a",
        "an",
        "another",
        "other",
        "some",
        "two",
        "three",
        "four",
        "five",
        "several",
        "many",
        "all",
        "both",
        "my",
        "our",
        "your",
    ]
)
_PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child", "ladies": "lady"}

PROMPT = (
    "Give each phrase of a text the one name of a list that means the same thing. Write one line for each phrase, "
    "`phrase - name`, and no line for a phrase without such a name.\n"
    "Names: dog, field\nText: A brown dog runs in the grassy field. Phrases: A brown dog; the grassy field\n"
    "A brown dog - dog\nthe grassy field - field\n\n"
    "Names: {names}\nText: {text} Phrases: {phrases}\n"
)


def plain(phrase: str) -> str:
    """A phrase in lower case, without articles and other words of that kind at its start."""
    words = re.findall(r"[\w'-]+", phrase.lower())
    while len(words) > 1 and words[0] in _STARTS:
        words = words[1:]
    return " ".join(words)


def head(phrase: str) -> str:
    """The last word of a phrase, in the singular."""
    word = plain(phrase).rpartition(" ")[2]
    if word in _PLURALS:
        return _PLURALS[word]
    return word[:-1] if is_plural(phrase) else word


def is_plural(phrase: str) -> bool:
    word = plain(phrase).rpartition(" ")[2]
    return word in _PLURALS or (len(word) > 3 and word.endswith("s") and not word.endswith("ss"))


def match_words(phrases: Sequence[Phrase], tags: Sequence[str]) -> dict[Phrase, str]:
    """The tag of each phrase that has one: the phrase itself, its last word, or "person" for a word for one."""
    found = {}
    for phrase in phrases:
        same = [tag for tag in tags if tag == plain(phrase.text)]
        same += [tag for tag in tags if head(tag) == head(phrase.text)]
        same += [tag for tag in tags if tag == "person" and names_person(phrase.text)]
        if same:
            found[phrase] = same[0]
    return found


def match_by_model(
    phrases: Sequence[Phrase], tags: Sequence[str], text: str, complete: Callable[[str], str]
) -> dict[Phrase, str]:
    """The tags that a language model gives to phrases; a line of its reply with another name or phrase is left out.

    complete  prompt -> the text that the model continues it with
    """
    names, texts = ", ".join(tags), "; ".join(phrase.text for phrase in phrases)
    reply = complete(PROMPT.format(names=names, text=text, phrases=texts)).partition("\n\n")[0]
    given: dict[str, str] = {}
    for line in reply.splitlines():
        name, separator, tag = line.rpartition(" - ")
        if separator and tag.strip().lower() in tags:
            given.setdefault(plain(name), tag.strip().lower())
    return {phrase: given[plain(phrase.text)] for phrase in phrases if plain(phrase.text) in given}


def assign(phrases: Sequence[Phrase], tags: Mapping[Phrase, str], counts: Mapping[str, int]) -> dict[Phrase, list[int]]:
    """For each phrase with a tag, the places of its objects among those of the tag; no two things share an object.

    counts  number of objects of each tag
    """
    things: list[tuple[str, Phrase, list[int]]] = []
    used = dict.fromkeys(counts, 0)
    found: dict[Phrase, list[int]] = {}
    for phrase in phrases:
        tag = tags.get(phrase)
        if tag is None:
            continue
        before = _mentioned(phrase, [(first, places) for other, first, places in things if other == tag])
        if before is None:
            left = counts.get(tag, 0) - used[tag] if tag in used else 0
            number = left if is_plural(phrase.text) else min(1, left)
            before = list(range(used.get(tag, 0), used.get(tag, 0) + number))
            used[tag] = used.get(tag, 0) + number
            things.append((tag, phrase, before))
        found[phrase] = before
    return found


def _mentioned(phrase: Phrase, earlier: Sequence[tuple[Phrase, list[int]]]) -> list[int] | None:
    """The objects of an earlier mention: the same words, or "the" with the same last word."""
    first_word = phrase.text.lower().partition(" ")[0]
    for other, places in reversed(earlier):
        again = plain(other.text) == plain(phrase.text) and first_word not in ("another", "other")
        if again or (first_word in _POINTING and head(other.text) == head(phrase.text)):
            return places
    return None
