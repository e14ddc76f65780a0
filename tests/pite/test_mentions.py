"""Noun phrases that are found in an answer."""

from __future__ import annotations

import pytest

from pite.mentions import find_intervals, find_named, find_phrases


@pytest.mark.parametrize(
    ("answer", "phrases"),
    [
        ("From 04 to 20, a red circle moves right.", ["a red circle"]),
        ("a red circle moves right, from 04 to 20. The blue square is still.", ["a red circle", "The blue square"]),
        ("A man wearing a hat jumps over two low walls.", ["A man", "a hat", "two low"]),
        ("The dogs ran after an old bus.", ["The dogs ran", "an old bus"]),
        ("A large, brown dog.", ["A large"]),
        ("It can be seen from 05 to 31.", []),
        ("the", []),
        ("", []),
    ],
)
def test_noun_phrases(answer: str, phrases: list[str]) -> None:
    found = find_phrases(answer, 32)
    assert [phrase.text for phrase in found] == phrases
    assert [answer[phrase.start : phrase.end] for phrase in found] == phrases


def test_a_phrase_has_the_interval_of_its_own_sentence() -> None:
    answer = "From 04 to 08, a dog runs. A cat sleeps. A bird sings, from 16 to 24."
    assert [phrase.interval for phrase in find_phrases(answer, 32)] == [(0.125, 0.25), None, (0.5, 0.75)]


def test_every_occurrence_of_a_named_phrase_is_found() -> None:
    found = find_named("From 04 to 08, dogs run. Later the Dogs (two) rest.", ["dogs"], 32)
    assert [(phrase.text, phrase.start, phrase.interval) for phrase in found] == [
        ("dogs", 15, (0.125, 0.25)),
        ("Dogs", 35, None),
    ]
    assert find_named("From 04 to 08, dogs run.", ["a cat"], 32) == []


def test_every_interval_that_is_of_frames_is_found() -> None:
    text = "A dog: 12 and 40, from 95 to 07. From 100 to 200! 5% to 15%, 1.5 to 20, 12.05 to 15.50 and 90 to 100."
    found = [(each.first, each.last, each.sentence) for each in find_intervals(text, 100)]
    sentence = "A dog: 12 and 40, from 95 to 07"
    assert found == [(12, 40, sentence), (7, 95, sentence)]
    assert [(each.first, each.last) for each in find_intervals("1 to 2 and 7 to 8", 8)] == [(1, 2)]
