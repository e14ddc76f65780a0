"""The judge's endpoint against a real server that misbehaves."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate

import pytest

from pite.evaluate.qa import endpoint as module
from pite.evaluate.qa.benchmarks import Item
from pite.evaluate.qa.endpoint import FAILURES_IN_A_ROW, Endpoint
from pite.evaluate.qa.prompts import Prompt, prompts
from tests.pite.evaluate.qa.server import GOOD, Handler, in_turn, running


def prompt(text: str = "yes") -> Prompt:
    return prompts(Item("q", "v", ("Is it a dog?",), "yes"), [text])[0]


def endpoint(url: str, **settings: object) -> Endpoint:
    return Endpoint(url, "m", **{"timeout": 5.0, "backoff": 0.001, "concurrency": 1, **settings})


MISHAPS: dict[str, Callable[[Handler], None]] = {
    "429": lambda h: h.status(429, b'{"error": {"message": "slow down"}}', Retry_After="0.01"),
    "429 with a date": lambda h: h.status(429, Retry_After=formatdate(time.time() - 5, usegmt=True)),
    "429 without a time": lambda h: h.status(429, Retry_After="soon"),
    "500": lambda h: h.status(500, b"<html>"),
    "503": lambda h: h.status(503),
    "truncated": Handler.truncated,
    "not JSON": lambda h: h.status(200, b"<html>"),
    "empty": lambda h: h.status(200),
    "wrong keys": lambda h: h.status(200, b'{"choices": [{"text": "yes"}]}'),
    "no choices": lambda h: h.status(200, b'{"choices": []}'),
    "a list": lambda h: h.status(200, b"[[]]"),
    "no text": lambda h: h.complete(None),
    "closed": Handler.closed,
}


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_mishap_is_mended_by_another_attempt(mishap: str) -> None:
    with running(in_turn(MISHAPS[mishap], MISHAPS[mishap])) as server:
        assert list(endpoint(server.url).replies([prompt()])) == [(0, GOOD)]
        assert len(server.bodies) == 3


@pytest.mark.parametrize("mishap", MISHAPS)
def test_attempts_are_bounded(mishap: str) -> None:
    with running(lambda handler, _: MISHAPS[mishap](handler)) as server:
        assert list(endpoint(server.url, retries=2).replies([prompt()])) == [(0, None)]
        assert len(server.bodies) == 3


@pytest.mark.parametrize("mishap", [Handler.slow, Handler.trickle])
def test_a_slow_reply_is_another_attempt(mishap: Callable[[Handler], None]) -> None:
    with running(in_turn(mishap)) as server:
        assert list(endpoint(server.url, timeout=0.3).replies([prompt()])) == [(0, GOOD)]
        assert len(server.bodies) == 2


def waits(monkeypatch: pytest.MonkeyPatch, judge: Endpoint) -> list[float]:
    """The pauses of a judge, which are recorded instead of made."""
    pauses: list[float] = []
    monkeypatch.setattr(judge._stop, "wait", lambda seconds: pauses.append(seconds) or False)
    return pauses


def test_pauses_double_and_retry_after_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(in_turn(*[lambda h: h.status(500)] * 4)) as server:
        judge = endpoint(server.url, backoff=1.0)
        pauses = waits(monkeypatch, judge)
        assert list(judge.replies([prompt()])) == [(0, GOOD)]
        assert pauses == [1.0, 2.0, 4.0, 8.0]
    steps = [
        lambda h: h.status(429, Retry_After="7"),
        lambda h: h.status(429, Retry_After="0"),
        lambda h: h.status(503, Retry_After="99999"),
        lambda h: h.status(429, Retry_After=formatdate(time.time() + 60, usegmt=True)),
    ]
    with running(in_turn(*steps)) as server:
        judge = endpoint(server.url)
        pauses = waits(monkeypatch, judge)
        assert list(judge.replies([prompt()])) == [(0, GOOD)]
        assert pauses[:3] == [7.0, 0.0, module.LONGEST_WAIT] and 30 < pauses[3] <= 60


def test_nothing_listens() -> None:
    with running(in_turn()) as server:
        url = server.url
    assert list(endpoint(url, retries=1).replies([prompt()])) == [(0, None)]
    with pytest.raises(ValueError, match=r"does not reply \(.*refused.*\): check --judge-url"):
        endpoint(url, retries=1).check(prompt())


def test_a_judge_without_a_verdict_is_named_before_the_answers(caplog: pytest.LogCaptureFixture) -> None:
    with running(lambda handler, _: handler.complete("I cannot judge.")) as server:
        endpoint(server.url).check(prompt())
    assert "gives no verdict on a trial question, but 'I cannot judge.'" in caplog.text


def test_an_endpoint_that_is_down_ends_the_run() -> None:
    with (
        running(lambda handler, _: handler.status(503)) as server,
        pytest.raises(
            ValueError, match=rf"failed for {FAILURES_IN_A_ROW} prompts in a row \(503 Service Unavailable\)"
        ),
    ):
        list(endpoint(server.url, retries=1).replies([prompt(f"{i}") for i in range(100)]))
    assert len(server.bodies) < 40


@pytest.mark.parametrize(("status", "name"), [(401, "Unauthorized"), (404, "Not Found"), (307, "Temporary Redirect")])
def test_a_wrong_key_or_address_ends_the_run_at_once(status: int, name: str) -> None:
    body = b'{"error": {"message": "no such\\nmodel"}}'
    with (
        running(lambda handler, _: handler.status(status, body, Location="/v1/elsewhere")) as server,
        pytest.raises(ValueError, match=rf"answers {status} {name} \(no such model\): check --judge-url"),
    ):
        list(endpoint(server.url).replies([prompt(), prompt("no")]))
    assert len(server.bodies) <= 2


@pytest.mark.parametrize(
    ("refused", "requests"), [((), 2), (("response_format",), 3), (("response_format", "temperature"), 4)]
)
def test_fields_that_the_endpoint_refuses_are_left_out(refused: tuple[str, ...], requests: int) -> None:
    def behave(handler: Handler, body: dict) -> None:
        handler.status(400) if body.keys() & set(refused) else handler.complete()

    with running(behave) as server:
        assert list(endpoint(server.url).replies([prompt(), prompt("no")])) == [(0, GOOD), (1, GOOD)]
        assert len(server.bodies) == requests
        first, last = server.bodies[0], server.bodies[-1]
    assert first["response_format"]["json_schema"]["schema"]["required"] == ["pred", "score"]
    assert first["temperature"] == 0 and last.keys() == first.keys() - set(refused)


def test_a_prompt_that_is_refused_in_each_form_fails_alone() -> None:
    def behave(handler: Handler, body: dict) -> None:
        handler.status(400) if "bad" in body["messages"][1]["content"] else handler.complete()

    with running(behave) as server:
        assert list(endpoint(server.url).replies([prompt("bad"), prompt()])) == [(0, None), (1, GOOD)]
        assert "response_format" in server.bodies[-1]


def test_the_key_is_sent_and_only_if_given() -> None:
    with running(in_turn()) as server:
        list(endpoint(server.url + "/", key="k").replies([prompt()]))
        list(endpoint(server.url).replies([prompt()]))
        assert [h.get("Authorization") for h in server.headers] == ["Bearer k", None]


def test_several_requests_run_at_once() -> None:
    """Four requests wait for one another, so they are under way together."""
    import threading

    barrier = threading.Barrier(4)

    def behave(handler: Handler, _: dict) -> None:
        barrier.wait(timeout=20)
        handler.complete()

    with running(behave) as server:
        found = list(endpoint(server.url, concurrency=4, timeout=30.0).replies([prompt(f"{i}") for i in range(4)]))
    assert sorted(found) == [(i, GOOD) for i in range(4)]
