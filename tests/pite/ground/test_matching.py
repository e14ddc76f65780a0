"""Which phrase is which object: mentions of one thing, tags, and numbers of objects."""

from __future__ import annotations

import pytest

from dataloaders.annotation.phrases import INSTALL, SpacyPhrases, has_spacy
from dataloaders.annotation.steps import Phrase
from pite.ground.coco_ssd import NUMBERS
from pite.ground.grounding import Parser
from pite.ground.matching import (
    MAX_OBJECTS,
    answering,
    assign,
    head,
    is_plural,
    match_words,
    mentions,
    names_picture,
    number,
    plain,
)


def things(*texts: str) -> list[list[str]]:
    return [[p.text for p in thing] for thing in mentions([Phrase(text, 10 * i) for i, text in enumerate(texts)])]


@pytest.mark.parametrize(
    ("phrase", "words", "last", "count"),
    [
        ("A red car", "red car", "car", 1),
        ("the two men", "men", "man", 2),
        ("both dogs", "dogs", "dog", 2),
        ("12 dogs", "dogs", "dog", 12),
        ("Several dogs", "dogs", "dog", None),
        ("no people", "people", "person", 0),
        ("a glass", "glass", "glass", 1),
        ("The", "the", "the", 1),
    ],
)
def test_words_of_a_phrase(phrase: str, words: str, last: str, count: int | None) -> None:
    assert (plain(phrase), head(phrase), number(phrase)) == (words, last, count)
    assert is_plural(phrase) == (words in ("men", "dogs", "people"))


def test_mentions_of_one_thing() -> None:
    assert things("An old man", "a dog", "the man", "his dog") == [["An old man", "the man"], ["a dog", "his dog"]]
    assert things("a man", "another man", "the man") == [["a man"], ["another man", "the man"]]
    assert things("one man", "the other man") == [["one man"], ["the other man"]]
    assert things("two men", "the man", "the men") == [["two men", "the men"], ["the man"]]
    assert things("a man", "the old man", "the young man") == [["a man", "the old man"], ["the young man"]]
    assert things("a red car", "a blue car", "the red car", "the car") == [
        ["a red car", "the red car"], ["a blue car", "the car"]
    ]  # fmt: skip
    assert things("a young man", "an old man", "A young man") == [["a young man", "A young man"], ["an old man"]]


def test_a_plural_mentions_each_of_several_things() -> None:
    assert things("a dog", "another dog", "the dogs") == [["a dog", "the dogs"], ["another dog", "the dogs"]]
    assert things("a dog", "another dog", "the dogs", "a cat", "both dogs", "the dogs")[1:] == [
        ["another dog", "the dogs", "both dogs", "the dogs"], ["a cat"]
    ]  # fmt: skip
    assert things("a black dog", "a white dog", "the two dogs", "the black dog") == [
        ["a black dog", "the two dogs", "the black dog"], ["a white dog", "the two dogs"]
    ]  # fmt: skip
    assert things("a dog", "another dog", "the three dogs")[2] == ["the three dogs"]
    assert things("a dog", "another dog", "the other dogs", "dogs")[2:] == [["the other dogs", "dogs"]]
    assert things("a dog", "the dogs") == [["a dog"], ["the dogs"]]
    assert things("a black dog", "a white dog", "the black dogs")[2] == ["the black dogs"]


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        ("What does the adult hold?", ["The adult+", "a ball+"], "a ball"),
        ("What does the adult hold?", ["The adult+", "a hand", "a ball+"], "a ball"),
        ("What does the adult hold?", ["The adult+", "a ball"], "a ball"),
        ("what does the adult hold", ["The adult+", "a ball+"], "a ball"),
        ("Who is beneath the adult?", ["A child+", "the adult+"], "A child"),
        ("What is the adult's dog behind?", ["the dog+", "The adult+", "two cars+"], "two cars"),
        ("Where are the buses?", ["the bus+", "a street+"], "a street"),
        ("Where is the man?", ["The man+"], "The man"),
        ("The man goes to the women and turns.", ["The man+", "a door+"], "The man"),
        ("The man goes to the women and turns.", ["The stranger", "a woman+"], "a woman"),
        ("The man goes to the women and turns.", ["The man", "a woman"], "The man"),
        ("Who runs?", [], None),
    ],
)
def test_the_phrase_that_answers_a_question(question: str, answer: list[str], found: str | None) -> None:
    """A phrase with a plus has an object."""
    phrase = answering(
        question, [(Phrase(text.rstrip("+"), i), (0,) * text.count("+")) for i, text in enumerate(answer)]
    )
    assert (phrase and phrase.text) == found


def test_what_shows_the_things_is_no_thing() -> None:
    opening = ["The video", "This clip", "A picture", "a frame", "the video clip", "two scenes", "The photo"]
    assert [text for text in opening if not names_picture(Phrase(text, 0))] == []
    assert names_picture(Phrase("the picture", 9)) and names_picture(Phrase("the footage", 9))
    things = ["a picture", "the hair clip", "the window frame", "a video game"]
    assert not any(names_picture(Phrase(text, 9)) for text in things)


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        ("What does the adult hold?", "In this video, the adult holds a ball.", "a ball"),
        ("Who is walking the dog?", "The image shows a woman walking a dog.", "a woman"),
        ("Who is walking the dog?", "The scene is set in a park. A woman is walking a dog.", "A woman"),
        ("What is in the man's hand?", "In the footage, we can see a man with a knife in his hand.", "a knife"),
        ("What hangs on the wall?", "The frame shows that a picture hangs on the wall.", "a picture"),
        ("The man walks to the woman.", "A clip of a man who walks to the woman in a kitchen.", "a man"),
    ],
)
def test_openings_of_answers_name_no_thing(spacy: Parser, question: str, answer: str, found: str) -> None:
    """Everything but places is found, as by a detector of things."""
    phrases = [(phrase, () if head(phrase.text) == "park" else (0,)) for phrase in objects(spacy, answer)]
    phrase = answering(question, phrases)
    assert phrase is not None and phrase.text == found


def objects(parser: Parser, text: str) -> list[Phrase]:
    return [phrase for phrase in parser(text) if not names_picture(phrase)]


@pytest.fixture(scope="module")
def spacy() -> Parser:
    if not has_spacy():
        pytest.skip(f"spaCy and its English model are not installed: {INSTALL}")
    return SpacyPhrases()


def test_tags_by_words() -> None:
    found = match_words(["A man", "a red car", "the street", "a dog"], ["person", "red car", "dog", "car"])
    assert found == ["person", "red car", None, "dog"]
    assert match_words(["a hot dog", "a big dog", "dogs", "..."], ["hot dog", "dog"]) == ["hot dog", "dog", "dog", None]
    assert match_words(["a racket", "a woman"], ["tennis racket", "table racket"]) == ["tennis racket", None]


IRREGULAR = {"person": "people", "knife": "knives", "mouse": "mice"}
UNCHANGED = ("sheep", "skis", "scissors", "broccoli")


def plural(name: str) -> str:
    if name in UNCHANGED:
        return name
    return IRREGULAR.get(name, name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s"))


@pytest.mark.parametrize("name", NUMBERS)
def test_each_of_cocos_names_has_its_tag_in_singular_and_plural(name: str) -> None:
    every = [*NUMBERS]
    phrases = [f"the {name}", f"A big {name}", f"two {plural(name)}", f"big {plural(name)}", name.upper()]
    assert len(every) == 80 and match_words(phrases, every) == [name] * len(phrases)
    if name not in UNCHANGED:
        assert (number(f"the {name}"), is_plural(name), number(plural(name))) == (1, False, None)


@pytest.mark.parametrize(
    ("phrase", "tag"),
    [
        ("a bike", "bicycle"),
        ("two sofas", "couch"),
        ("the plane", "airplane"),
        ("a hair dryer", "hair drier"),
        ("his phone", "cell phone"),
        ("two motorbikes", "motorcycle"),
        ("the television", "tv"),
        ("an orange shirt", None),
        ("the boxes", None),
        ("gloves", "baseball glove"),
    ],
)
def test_other_words_for_cocos_things(phrase: str, tag: str | None) -> None:
    assert match_words([phrase], [*NUMBERS]) == [tag]


def test_no_two_things_share_an_object() -> None:
    names = ["people", "A man", "a woman", "another man", "a dog"]
    assert assign(names, ["person"] * 4 + [None], ["person"] * 5, {}) == [[3, 4], [0], [1], [2], []]
    assert assign(["A man", "a woman"], ["person"] * 2, ["person"], {}) == [[0], []]
    assert assign(["A man", "a woman"], ["person"] * 2, [], {}) == [[], []]


def test_numbers_of_objects() -> None:
    assert assign(["two men"], ["person"], ["person"] * 5, {}) == [[0, 1]]
    assert assign(["no dogs"], ["dog"], ["dog"], {}) == [[]]
    assert assign(["dogs"], ["dog"], ["dog"] * 50, {}) == [list(range(MAX_OBJECTS))]


def test_an_object_found_under_two_tags_belongs_to_one_thing() -> None:
    """Object 0 is the man whom object 2 is, too; object 1 is another man."""
    objects, same = ["man", "man", "young man"], {0: {2}, 2: {0}}
    assert assign(["a man", "a young man"], ["man", "young man"], objects, same) == [[1], [2]]
