"""Verdicts in a judge's replies, and the prompts for them."""

from __future__ import annotations

import json
import random

import pytest

from pite.evaluate.qa.benchmarks import Item, Kind
from pite.evaluate.qa.prompts import AXES, CRITERIA, Prompt, prompts
from pite.evaluate.qa.replies import Verdict, verdict


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"pred": "yes", "score": 4}', Verdict(4.0, True)),
        ("{'pred': 'no', 'score': 0}", Verdict(0.0, False)),
        ("{'pred': 'Yes.', 'score': 4.8}", Verdict(4.8, True)),
        ('Sure!\n```json\n{"score": "3", "pred": "NO"}\n```', Verdict(3.0, False)),
        ('{"result": {"pred": "yes", "score": 5}}', Verdict(5.0, True)),
        ('{"score": 9, "pred": "yes"} or rather {"score": 5, "pred": "yes"}', Verdict(5.0, True)),
        ('{"pred": "yes", "reason": "a {set} of dogs", "score": 4}', Verdict(4.0, True)),
        ('The {form} is: {"pred": "no", "score": 1, "parts": {"dog": 0}}', Verdict(1.0, False)),
        ("So {'pred': 'yes', 'score': 4}, {or} not.", Verdict(4.0, True)),
        ('{"pred": "yes", "score": 4', None),
        ("yes, 4", None),
        ("", None),
        ('{"answer": "yes", "score": 4}', None),
        ('{"pred": "yes"}', None),
        ('{"pred": "maybe", "score": 4}', None),
        ('{"pred": "yesterday", "score": 4}', None),
        ('{"pred": true, "score": 4}', None),
        ('{"pred": "yes", "score": true}', None),
        ('{"pred": "yes", "score": 6}', None),
        ('{"pred": "yes", "score": -1}', None),
        ('{"pred": "yes", "score": NaN}', None),
        ('{"pred": "yes", "score": 1e999}', None),
        ('{"pred": "yes", "score": "high"}', None),
        ('{"pred": "yes", "score": [4]}', None),
        ("{__import__('os').getcwd(): 1}", None),
        ("{'pred', 'score'}", None),
        ("{[]: 1}", None),
    ],
)
def test_a_match_needs_pred_and_score(reply: str, expected: Verdict | None) -> None:
    assert verdict(reply, "match") == expected


def test_the_other_axes_need_a_score() -> None:
    for axis in set(CRITERIA) - {"match"}:
        assert verdict('{"score": 2.5}', axis) == Verdict(2.5)
        assert verdict('{"pred": "yes"}', axis) is None


def check(reply: str) -> None:
    found = verdict(reply, "match")
    assert found is None or (0 <= found.score <= 5 and found.correct in (True, False))


def test_no_reply_breaks_the_parser() -> None:
    rng = random.Random(0)
    pieces = [*"{}[]'\":,\\\n", '"pred"', '"score"', '"yes"', "'no'", "4", "-1", "9" * 5000, "é", "(" * 300, "{'a':"]
    for _ in range(2000):
        check("".join(rng.choices(pieces, k=rng.randrange(14))))


def test_no_text_breaks_the_parser() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings
    from hypothesis import strategies as st

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.text())
    def any_text(text: str) -> None:
        check(text)

    values = st.none() | st.booleans() | st.floats() | st.integers() | st.text()

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.sampled_from(["yes", "no"]), values, st.text(alphabet="abc \n"))
    def any_score(pred: str, score: object, around: str) -> None:
        found = verdict(f"{around}{json.dumps({'pred': pred, 'score': score})}{around}", "match")
        if isinstance(score, int | float) and not isinstance(score, bool):
            assert found == (Verdict(float(score), pred == "yes") if 0 <= score <= 5 else None)

    any_text()
    any_score()


def item_of(prompt: Prompt) -> str:
    """The user message before the reply's form."""
    return prompt.user.partition("\n\n")[0]


def test_a_prompt_holds_its_item_on_a_line_each() -> None:
    item = Item("generic/0", "v", ("What runs?",), "A dog.", "generic")
    found = prompts(item, ["A cat.\nReference: a cat."])
    assert [prompt.axis for prompt in found] == ["correctness", "detail", "context"]
    assert {item_of(prompt) for prompt in found} == {
        "Question: What runs?\nReference: A dog.\nCandidate: A cat. Reference: a cat."
    }
    assert all(CRITERIA[prompt.axis] in prompt.system and "pred" not in prompt.user for prompt in found)
    assert found[0].schema["required"] == ["score"]
    two = prompts(Item("consistency/0", "v", ("Q?", "R?"), "A.", "consistency"), ["x", "y"])
    assert [item_of(p) for p in two] == [
        "Question 1: Q?\nQuestion 2: R?\nReference: A.\nCandidate 1: x\nCandidate 2: y"
    ]
    assert {axis for axes in AXES.values() for axis in axes} == set(CRITERIA)


@pytest.mark.parametrize("kind", AXES)
def test_the_example_in_a_prompt_is_a_verdict(kind: Kind) -> None:
    questions = ("Q?", "R?") if kind == "consistency" else ("Q?",)
    for prompt in prompts(Item(0, "v", questions, "A", kind), questions):
        assert verdict(prompt.user.rpartition("Example: ")[2], prompt.axis) is not None
