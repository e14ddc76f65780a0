"""Scores of video question answering, with a judge that is a function, and the judge's cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from pite.evaluate.predictions import Prediction
from pite.evaluate.qa.benchmarks import Item
from pite.evaluate.qa.cache import Cache, key_of
from pite.evaluate.qa.judge import Judgement, estimate, judge
from pite.evaluate.qa.prompts import Prompt, prompts
from pite.evaluate.qa.replies import Verdict
from pite.evaluate.qa.report import normalised, report

ITEMS = [Item(i, "v", (f"question {i}?",), "dog") for i in range(4)]


class Function:
    """A judge that is a function of the prompt. Replies come in reverse order."""

    def __init__(self, reply: Callable[[Prompt], str | None], name: str = "f", rounds: int = 3) -> None:
        self.name, self.rounds, self.reply = name, rounds, reply
        self.sent: list[Prompt] = []

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
        for i in reversed(range(len(prompts))):
            self.sent.append(prompts[i])
            yield i, self.reply(prompts[i])


def answered(*texts: str | None) -> list[Prediction]:
    return [Prediction("v", "msvd_qa", i, text) for i, text in enumerate(texts) if text is not None]


def by_candidate(prompt: Prompt) -> str | None:
    """yes 4.6 for a dog, no 1.5 for anything else, nonsense for "?" and nothing for "!"."""
    candidate = prompt.user.rpartition("Candidate: ")[2].partition("\n")[0]
    return {"dog": '{"pred": "yes", "score": 4.6}', "?": "hm", "!": None}.get(candidate, '{"pred": "no", "score": 1.5}')


def test_the_numbers_by_hand() -> None:
    found = report(answered("dog", "cat", None, "dog"), ITEMS, "msvd_qa", by=Function(by_candidate)).numbers
    assert found["accuracy"] == found["exact match"] == 50.0
    assert found["score"] == pytest.approx((4.6 + 1.5 + 0 + 4.6) / 4)
    assert (found["items"], found["items without an answer"], found["calls"]) == (4, 1, 3)


def test_published_leaves_out_and_cuts_scores() -> None:
    answers = answered("dog", "cat", None, "dog")
    found = report(answers, ITEMS, "msvd_qa", protocol="published", by=Function(by_candidate)).numbers
    assert found["accuracy"] == found["exact match"] == pytest.approx(200 / 3)
    assert found["score"] == (4 + 1 + 4) / 3


def test_failed_and_malformed_replies_are_counted_and_left_out() -> None:
    by = Function(by_candidate)
    made = report(answered("dog", "?", "!", "cat"), ITEMS, "msvd_qa", by=by)
    assert made.numbers["accuracy"] == 50.0 and made.numbers["score"] == pytest.approx((4.6 + 1.5) / 2)
    assert made.numbers["prompts without a verdict"] == 2 and made.numbers["malformed replies"] == 3
    assert made.numbers["calls"] == 4 + 2 == len(by.sent)
    assert "3 malformed replies" in made.text and "2 prompts without a verdict" in made.text
    with pytest.raises(ValueError, match="the judge f gave no verdict: 6 replies are malformed"):
        report(answered("?", "?!"), ITEMS, "msvd_qa", by=Function(lambda prompt: "hm"))


def test_a_malformed_reply_may_be_mended() -> None:
    replies = iter(["hm", '{"pred": "yes", "score": 5}'])
    made = judge(prompts(ITEMS[0], ["dog"]), Function(lambda prompt: next(replies)), Cache())
    assert made == Judgement((Verdict(5.0, True),), calls=2, malformed=1)


def test_without_a_judge_there_are_exact_matches_only() -> None:
    made = report(answered("A dog!", "the  DOG.", "a cat", "dogs"), ITEMS, "msvd_qa")
    assert made.numbers["exact match"] == 50.0 and "accuracy" not in made.numbers
    assert "exact match compares texts and uses no judge" in made.text
    with pytest.raises(ValueError, match="no question has an answer"):
        report([], ITEMS, "msvd_qa")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("A dog.", "dog"), ("dog", "dog"), ("The, U.S.", "us"), ("A", "a"), ("", ""), ("can't", "cant"), ("Ä b", "ä b")],
)
def test_normalised_answers(answer: str, expected: str) -> None:
    assert normalised(answer) == expected == normalised(expected)


def test_video_chatgpts_axes() -> None:
    items = [
        Item("generic/0", "v", ("Q?",), "A", "generic"),
        Item("temporal/0", "v", ("Q?",), "A", "temporal"),
        Item("consistency/0", "v", ("Q?", "R?"), "A", "consistency"),
        Item("consistency/1", "v", ("Q?", "R?"), "A", "consistency"),
    ]
    scores = {"correctness": 1, "detail": 2, "context": 3, "temporal": 4, "consistency": 5}
    by = Function(lambda prompt: json.dumps({"score": scores[prompt.axis]}))
    queries = ("generic/0", "temporal/0", "consistency/0/1", "consistency/0/2", "consistency/1/1")
    answers = [Prediction("v", "video_chatgpt", query, f"answer {query}") for query in queries]
    strict = report(answers, items, "video_chatgpt", by=by).numbers
    assert {axis: strict[axis] for axis in scores} == {**scores, "consistency": 2.5}
    assert "Candidate 1: answer consistency/0/1\nCandidate 2: answer consistency/0/2" in by.sent[0].user
    assert strict["items without an answer"] == 1 and "accuracy" not in strict and "exact match" not in strict
    published = report(answers, items, "video_chatgpt", protocol="published", by=by).numbers
    assert {axis: published[axis] for axis in scores} == scores


def test_a_run_that_is_killed_pays_for_no_reply_twice(tmp_path: Path) -> None:
    answers = answered("dog", "cat", "dog", "cow")

    def killed(prompt: Prompt) -> str | None:
        if len(by.sent) > 2:
            raise KeyboardInterrupt
        return by_candidate(prompt)

    by = Function(killed)
    with pytest.raises(KeyboardInterrupt), Cache(tmp_path / "c.jsonl") as cache:
        report(answers, ITEMS, "msvd_qa", by=by, cache=cache)
    # The kill also cuts the line of a reply off.
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write('{"key": "')
    again = Function(by_candidate)
    with Cache(tmp_path / "c.jsonl") as cache:
        first = report(answers, ITEMS, "msvd_qa", by=again, cache=cache)
    assert len(again.sent) == 2 and {p.user for p in again.sent}.isdisjoint(p.user for p in by.sent[:2])
    silent = Function(by_candidate)
    with Cache(tmp_path / "c.jsonl") as cache:
        second = report(answers, ITEMS, "msvd_qa", by=silent, cache=cache)
    assert not silent.sent and second.numbers == {**first.numbers, "calls": 0}
    uncached = report(answers, ITEMS, "msvd_qa", by=Function(by_candidate))
    assert first.numbers == {**uncached.numbers, "calls": 2}


def test_each_reply_is_on_disk_before_the_next_prompt(tmp_path: Path) -> None:
    lines: list[int] = []

    def reply(prompt: Prompt) -> str | None:
        lines.append((tmp_path / "c.jsonl").read_bytes().count(b"\n"))
        return by_candidate(prompt)

    with Cache(tmp_path / "c.jsonl") as cache:
        report(answered("dog", "cat", "cow"), ITEMS, "msvd_qa", by=Function(reply), cache=cache)
    assert lines == [0, 1, 2]


def test_equal_prompts_are_sent_once_and_verdicts_are_in_order() -> None:
    wanted = [prompts(ITEMS[0], [text])[0] for text in ("dog", "cat", "dog", "dog")]
    by = Function(by_candidate)
    made = judge(wanted, by, Cache())
    assert [v is not None and v.correct for v in made.verdicts] == [True, False, True, True]
    assert made.calls == len(by.sent) == 2


def test_keys_differ_between_models_and_prompts() -> None:
    wanted = [prompts(item, [text])[0] for item in ITEMS for text in ("dog", "cat")]
    wanted += prompts(Item("generic/0", "v", ("Q?",), "A", "generic"), ["x"])
    assert len({key_of(model, prompt) for model in ("f", "g") for prompt in wanted}) == 2 * len(wanted)


def test_malformed_replies_are_not_cached(tmp_path: Path) -> None:
    with Cache(tmp_path / "deep" / "c.jsonl") as cache:
        judge(prompts(ITEMS[0], ["?"]), Function(by_candidate), cache)
    assert (tmp_path / "deep" / "c.jsonl").read_text() == ""


@pytest.mark.parametrize("line", ["x", "[]", '{"key": "k"}', "3"])
def test_a_file_that_is_no_cache_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"c\.jsonl:1: no reply of a judge; remove the line"):
        Cache(tmp_path / "c.jsonl")


def test_the_estimate_counts_characters_and_replies() -> None:
    wanted = [Prompt("match", "s" * 300, "u" * 100)] * 1000
    text = estimate(wanted, 1500, "m", (2.0, 10.0))
    assert text.startswith("judge m: 1,000 calls, 500 replies are in the cache; estimated 100,000 tokens in prompts")
    assert "20,000 in replies, estimated cost 0.40" in text
    assert "cost" not in estimate(wanted, 1500, "m") and "estimated" not in estimate([], 5, "m", (1.0, 1.0))


def test_the_estimate_comes_before_the_first_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pite.evaluate.qa.judge")
    at_first: list[int] = []

    def reply(prompt: Prompt) -> str | None:
        at_first.append(len(caplog.records))
        return by_candidate(prompt)

    judge(prompts(ITEMS[0], ["dog"]), Function(reply), Cache(), (1.0, 1.0))
    assert at_first == [1] and "1 calls" in caplog.text
