"""Which phrase of an answer is which object, by words.

Phrases are mentions of things: "a man" and "another man" are two things, "an old man" and later "the man" are one. A
thing gets a tag, one of the names that a detector looks for, and then objects with this tag. An object belongs to one
thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dataloaders.annotation.people import names_person
from dataloaders.annotation.steps import Phrase

MAX_OBJECTS = 20
"""Objects of a phrase such as "people"."""

_POINTING = frozenset(["the", "this", "that", "these", "those", "both", "his", "her", "its", "their"])
_NEW = frozenset(["another", "other"])
_NUMBERS = {"no": 0, "one": 1, "both": 2} | {
    word: number
    for number, word in enumerate(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], 2)
}
_STARTS = frozenset(["a", "an", "some", "several", "many", "all", "my", "our", "your", *_POINTING, *_NEW, *_NUMBERS])
_PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child", "ladies": "lady"}


def _words(phrase: str) -> tuple[list[str], list[str]]:
    """Articles, numbers and the like at the start of a phrase, and its other words; in lower case."""
    words = re.findall(r"[\w'-]+", phrase.lower())
    count = 0
    while count < len(words) - 1 and (words[count] in _STARTS or words[count].isdecimal()):
        count += 1
    return words[:count], words[count:]


def plain(phrase: str) -> str:
    """A phrase in lower case, without articles, numbers and the like at its start."""
    return " ".join(_words(phrase)[1])


def head(phrase: str) -> str:
    """The last word of a phrase, in the singular."""
    word = plain(phrase).rpartition(" ")[2]
    if word in _PLURALS:
        return _PLURALS[word]
    return word[:-1] if is_plural(phrase) else word


def is_plural(phrase: str) -> bool:
    word = plain(phrase).rpartition(" ")[2]
    return word in _PLURALS or (len(word) > 3 and word.endswith("s") and not word.endswith("ss"))


def number(phrase: str) -> int | None:
    """How many things a phrase names: 2 for "the two men", 1 for "a man", None for "people"."""
    for word in _words(phrase)[0]:
        if word in _NUMBERS:
            return _NUMBERS[word]
        if word.isdecimal():
            return int(word)
    return None if is_plural(phrase) else 1


def mentions(phrases: Sequence[Phrase]) -> list[list[Phrase]]:
    """The phrases by the thing that they mention, in order.

    A phrase mentions what the last phrase with the same words does. Without one, a phrase that points ("the", "his")
    mentions the last thing with the same noun in the same number, unless their other words differ: "the man" may be "an
    old man", and "the red car" is not "a blue car". A plural that points to no such thing mentions each in the singular:
    after "a dog" and "another dog", "the dogs" is a phrase of both. "another man" and "the other man" are new things.
    """
    things: list[list[Phrase]] = []
    for i, phrase in enumerate(phrases):
        meant = _meant(phrase.text, phrases[:i], things)
        for thing in meant:
            thing.append(phrase)
        if not meant:
            things.append([phrase])
    return things


def _meant(phrase: str, before: Sequence[Phrase], things: Sequence[list[Phrase]]) -> list[list[Phrase]]:
    """The things that a phrase mentions, of those of the phrases before it."""
    starts, words = _words(phrase)
    if not _NEW.isdisjoint(starts):
        return []
    for other in reversed(before):
        if _words(other.text)[1] == words:
            return [thing for thing in things if other in thing]
    if _POINTING.isdisjoint(starts):
        return []
    alike = [thing for thing in things if _may_be(phrase, [other.text for other in thing])]
    same = [thing for thing in alike if is_plural(thing[0].text) == is_plural(phrase)]
    if same or not is_plural(phrase):
        return same[-1:]
    return alike if len(alike) > 1 and number(phrase) in (None, len(alike)) else []


def _may_be(phrase: str, earlier: Sequence[str]) -> bool:
    """Whether the nouns of a phrase and of a thing's phrases are the same, and their other words do not differ."""
    known = {word for other in earlier for word in _words(other)[1][:-1]}
    own = set(_words(phrase)[1][:-1])
    return head(phrase) == head(earlier[0]) and (known <= own or known >= own)


def answering(question: str, phrases: Sequence[Phrase]) -> Phrase | None:
    """The phrase that answers a question: the first whose noun is not in the question, else the first.

    To "What does the adult hold?", "The adult holds a ball." has the answer "a ball".
    """
    known = {head(word) for word in re.findall(r"[\w-]+", question)}
    return next((phrase for phrase in phrases if head(phrase.text) not in known), next(iter(phrases), None))


def match_words(phrases: Sequence[str], tags: Sequence[str]) -> list[str | None]:
    """The tag of each phrase, if it has one: the phrase itself, its last word, or "person" for a word for one."""
    found: list[str | None] = []
    for phrase in phrases:
        same = [tag for tag in tags if tag == plain(phrase)]
        same += [tag for tag in tags if head(tag) == head(phrase)]
        same += [tag for tag in tags if tag == "person" and names_person(phrase)]
        found.append(same[0] if same else None)
    return found


def assign(
    phrases: Sequence[str], tags: Sequence[str | None], objects: Sequence[str], same: Mapping[int, set[int]]
) -> list[list[int]]:
    """The indices of the objects of each thing; no two things share an object.

    phrases  the first mention of each thing
    tags     of each thing; None for one that no detector looks for
    objects  their tags, the surest first
    same     index of an object -> those of other tags that are the same thing
    Things with a number choose before those without ("people"), and of them those with the fewest objects: "a young man"
    before "a man". Otherwise the first one in the text does.
    """
    choices = [[i for i, of in enumerate(objects) if tag is not None and of == tag] for tag in tags]
    numbers = [number(phrase) for phrase in phrases]
    order = sorted(range(len(phrases)), key=lambda i: (numbers[i] is None, len(choices[i]), i))
    found: list[list[int]] = [[] for _ in phrases]
    taken: set[int] = set()
    for thing in order:
        most = MAX_OBJECTS if (given := numbers[thing]) is None else given
        for choice in choices[thing]:
            if len(found[thing]) < most and choice not in taken:
                found[thing].append(choice)
                taken |= {choice, *same.get(choice, ())}
    return found
