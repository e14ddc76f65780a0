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

_POINTING = frozenset(["the", "this", "that", "these", "those", "his", "her", "its", "their"])
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

    A phrase mentions the last thing with the same words. Without one, a phrase that points ("the", "his") mentions the last
    thing with the same noun in the same number, unless their other words differ: "the man" may be "an old man", and "the red car" is
    not "a blue car". "another man" and "the other man" are new things.
    """
    things: list[list[Phrase]] = []
    for phrase in phrases:
        last_first = things[::-1] if _NEW.isdisjoint(_words(phrase.text)[0]) else []
        same = [thing for thing in last_first if any(plain(phrase.text) == plain(other.text) for other in thing)]
        same += [thing for thing in last_first if _points_to(phrase.text, [other.text for other in thing])]
        if same:
            same[0].append(phrase)
        else:
            things.append([phrase])
    return things


def _points_to(phrase: str, earlier: Sequence[str]) -> bool:
    """Whether a phrase with "the" or the like may mention the thing of some phrases before it."""
    starts, words = _words(phrase)
    if _POINTING.isdisjoint(starts) or (head(phrase), is_plural(phrase)) != (head(earlier[0]), is_plural(earlier[0])):
        return False
    known = {word for other in earlier for word in _words(other)[1][:-1]}
    return known <= set(words[:-1]) or known >= set(words[:-1])


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
