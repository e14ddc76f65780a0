"""Which phrase is which object, by words and by a language model's lines."""

from __future__ import annotations

import pytest

from dataloaders.annotation.steps import Phrase
from pite.ground.matching import assign, head, is_plural, match_by_model, match_words, plain


def phrases(*texts: str) -> list[Phrase]:
    return [Phrase(text, 10 * i) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("phrase", "words", "last"),
    [
        ("A red car", "red car", "car"),
        ("the two men", "men", "man"),
        ("Several dogs", "dogs", "dog"),
        ("a glass", "glass", "glass"),
        ("The", "the", "the"),
    ],
)
def test_words_of_a_phrase(phrase: str, words: str, last: str) -> None:
    assert (plain(phrase), head(phrase)) == (words, last)
    assert is_plural(phrase) == (words in ("men", "dogs"))


def test_tags_by_words() -> None:
    found = match_words(phrases("A man", "a red car", "the street", "a dog"), ["person", "red car", "dog", "car"])
    assert {p.text: tag for p, tag in found.items()} == {"A man": "person", "a red car": "red car", "a dog": "dog"}


def test_two_things_have_two_objects_and_a_second_mention_the_same() -> None:
    listed = phrases("A man", "a woman", "the man", "another man", "people", "a dog")
    found = assign(listed, dict.fromkeys(listed[:5], "person"), {"person": 5})
    assert [found.get(phrase) for phrase in listed] == [[0], [1], [0], [2], [3, 4], None]


def test_things_without_objects_left_have_none() -> None:
    listed = phrases("A man", "a woman")
    assert list(assign(listed, dict.fromkeys(listed, "person"), {"person": 1}).values()) == [[0], []]
    assert list(assign(listed, dict.fromkeys(listed, "person"), {}).values()) == [[], []]


def test_a_language_models_lines() -> None:
    prompts = []

    def complete(prompt: str) -> str:
        prompts.append(prompt)
        return "A man - person\nthe hound - dog\nthe street - road\na cat - dog\n\nNames: x\nthe street - dog"

    listed = phrases("A man", "the hound", "the street")
    found = match_by_model(listed, ["person", "dog"], "A man and the hound.", complete)
    assert {p.text: tag for p, tag in found.items()} == {"A man": "person", "the hound": "dog"}
    assert "Names: person, dog\nText: A man and the hound. Phrases: A man; the hound; the street\n" in prompts[0]
