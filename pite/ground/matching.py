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
_SHOWS = frozenset(["video", "image", "scene", "footage"])
_MAY_SHOW = frozenset(["picture", "photo", "photograph", "frame", "clip"])
"""Nouns for what shows the things, and those of them that name a thing as well."""
_INTERROGATIVES = frozenset(["who", "whom", "whose", "what", "which", "where", "when", "why", "how"])


def _pairs(text: str) -> dict[str, str]:
    """The text a/b, c/d as {a: b, c: d}."""
    return dict(pair.strip().split("/") for pair in text.replace("\n", ",").split(","))


_PLURALS = _pairs(
    """people/person, men/man, women/woman, children/child, policemen/policeman, firemen/fireman, mice/mouse, geese/goose
    feet/foot, teeth/tooth, tvs/tv, knives/knife, wives/wife, leaves/leaf, shelves/shelf, wolves/wolf, calves/calf, halves/half
    loaves/loaf, scarves/scarf, thieves/thief, skis/ski, taxis/taxi, movies/movie, cookies/cookie, hoodies/hoodie, shoes/shoe
    canoes/canoe, toes/toe"""
)
_ENDINGS = _pairs("ouses/ouse, uses/us, sses/ss, shes/sh, ches/ch, xes/x, oes/o, ies/y, ss/ss, us/us, is/is, s/")
"""Endings of plurals, and of words that are none, to those of the singular; the first that fits counts."""
_SYNONYMS = _pairs(
    """bike/bicycle, motorbike/motorcycle, plane/airplane, aeroplane/airplane, sofa/couch, television/tv, cellphone/cell phone
    smartphone/cell phone, fridge/refrigerator, doughnut/donut, dryer/drier, puppy/dog, kitten/cat, purse/handbag, mug/cup"""
)
"""Nouns of answers -> COCO's for the same things."""


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


def _singular(word: str) -> str:
    if word in _PLURALS:
        return _PLURALS[word]
    if len(word) <= 3:
        return word
    if len(word) == 4 and word.endswith("ies"):
        return word[:-1]
    end = next((end for end in _ENDINGS if word.endswith(end)), "")
    return word.removesuffix(end) + _ENDINGS.get(end, "")


def head(phrase: str) -> str:
    """The last word of a phrase, in the singular."""
    return _singular(plain(phrase).rpartition(" ")[2])


def is_plural(phrase: str) -> bool:
    return head(phrase) != plain(phrase).rpartition(" ")[2]


def names_picture(phrase: Phrase) -> bool:
    """Whether a phrase names what shows the things, as in "This video shows a dog" and "A picture of a dog".

    "He hangs a picture" and "the hair clip" name things.
    """
    if head(phrase.text) in _SHOWS:
        return True
    starts, words = _words(phrase.text)
    opens = phrase.start == 0 or not _POINTING.isdisjoint(starts)
    return opens and {_singular(word) for word in words} <= _SHOWS | _MAY_SHOW


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


def answering(question: str, phrases: Sequence[tuple[Phrase, Sequence[int]]]) -> Phrase | None:
    """The phrase that answers a question.

    phrases  each with the numbers of its objects
    To "What does the adult hold?", "The adult holds a ball." has the answer "a ball": phrases whose noun is in the question
    are left out, where others remain. Of a text that is no question, such as a caption, all nouns may be in the answer.
    The first phrase that has an object counts, or without one the first.
    """
    words = re.findall(r"[\w-]+", question.lower())
    is_question = "?" in question or not _INTERROGATIVES.isdisjoint(words[:1])
    known = {head(word) for word in words} if is_question else set()
    chosen = [each for each in phrases if head(each[0].text) not in known] or phrases
    return next((phrase for phrase, own in chosen if own), chosen[0][0] if chosen else None)


def match_words(phrases: Sequence[str], tags: Sequence[str]) -> list[str | None]:
    """The tag of each phrase, if it has one.

    It is the phrase itself; else the longest tag that the phrase ends with ("a big hot dog" is a hot dog, and no dog); else
    one with the same noun ("the racket" is a tennis racket); else "person" for a word for one. Singular and plural are
    the same, and so are a few synonyms ("a bike" is a bicycle).
    """
    same = {_canonical(tag): tag for tag in reversed(tags)}
    nouns = {canonical.rpartition(" ")[2]: tag for canonical, tag in same.items()}
    return [_tag(phrase, tags, same, nouns) for phrase in phrases]


def _tag(phrase: str, tags: Sequence[str], same: Mapping[str, str], nouns: Mapping[str, str]) -> str | None:
    if plain(phrase) in tags:
        return plain(phrase)
    words = _canonical(phrase).split()
    for start in range(len(words)):
        if (tag := same.get(" ".join(words[start:]))) is not None:
            return tag
    if words and words[-1] in nouns:
        return nouns[words[-1]]
    return "person" if "person" in tags and names_person(phrase) else None


def _canonical(phrase: str) -> str:
    """The words of a phrase with the last one in the singular, and as COCO names it."""
    *others, _ = plain(phrase).split() or [""]
    noun = head(phrase)
    return " ".join([*others, _SYNONYMS.get(noun, noun)])


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
