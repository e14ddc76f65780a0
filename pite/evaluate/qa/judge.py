"""Verdicts of a judge about prompts: replies from the cache first, then from the judge, in the order of the prompts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from pite.evaluate.qa.cache import Cache, key_of
from pite.evaluate.qa.prompts import Prompt
from pite.evaluate.qa.replies import Verdict, verdict

log = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4
"""For the estimate before the first call; about right for English text."""

REPLY_TOKENS = 20

Price = tuple[float, float]
"""Price of a million tokens in prompts and in replies."""


class Judge(Protocol):
    """What answers prompts.

    name     a part of the cache's keys
    rounds   how often a prompt with malformed replies is sent
    replies  (index of a prompt, reply) as they come; None for a prompt without one
    """

    rounds: int

    @property
    def name(self) -> str: ...

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]: ...


@dataclass(frozen=True)
class Judgement:
    """verdicts   of each prompt; None where the judge failed
    calls      prompts sent, repetitions for malformed replies included
    malformed  replies without a verdict
    """

    verdicts: tuple[Verdict | None, ...]
    calls: int
    malformed: int

    @property
    def failed(self) -> int:
        return sum(each is None for each in self.verdicts)


def judge(prompts: Sequence[Prompt], by: Judge, cache: Cache, price: Price | None = None) -> Judgement:
    """A verdict about each prompt. Equal prompts are sent once, and only replies with a verdict are cached.

    Logs the number of calls and their estimated cost before the first. Raises what the judge raises.
    """
    of_key = {key_of(by.name, prompt): prompt for prompt in prompts}
    pending = [key for key in of_key if cache.get(key) is None]
    log.info("%s", estimate([of_key[key] for key in pending], len(of_key), by.name, price))
    calls = malformed = 0
    for _ in range(by.rounds):
        unclear: list[str] = []
        sent = [of_key[key] for key in pending]
        replies = by.replies(sent) if sent else iter(())
        for i, reply in tqdm(replies, "verdicts", len(sent), unit="prompt", file=sys.stderr, disable=not sent):
            calls += 1
            if reply is None:
                continue
            if verdict(reply, sent[i].axis) is None:
                unclear.append(pending[i])
            else:
                cache.put(pending[i], by.name, reply)
        malformed += len(unclear)
        # In the order of the prompts, whatever the order of the replies.
        pending = [key for key in pending if key in set(unclear)]
    return Judgement(tuple(_cached(prompt, by, cache) for prompt in prompts), calls, malformed)


def _cached(prompt: Prompt, by: Judge, cache: Cache) -> Verdict | None:
    reply = cache.get(key_of(by.name, prompt))
    return None if reply is None else verdict(reply, prompt.axis)


def estimate(prompts: Sequence[Prompt], total: int, name: str, price: Price | None = None) -> str:
    """The number of calls and their estimated tokens and cost, as a sentence."""
    text = f"judge {name}: {len(prompts):,} calls, {total - len(prompts):,} replies are in the cache"
    if not prompts:
        return text
    sent = sum(len(prompt.system) + len(prompt.user) for prompt in prompts) / CHARACTERS_PER_TOKEN
    replied = REPLY_TOKENS * len(prompts)
    text += f"; estimated {sent:,.0f} tokens in prompts and {replied:,.0f} in replies"
    if price is not None:
        text += f", estimated cost {(sent * price[0] + replied * price[1]) / 1e6:,.2f}"
    return text
