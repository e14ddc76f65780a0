"""Answers with shared prefixes equal those without, and each prefix is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from dataloaders.samples.prompts import prompt_ids
from engine.tiny.tokenizer import build_tokenizer
from pite.generate import Generator
from pite.prefixes import Rows, SharedPrefixes
from tests.samples import tiny_model

FRAMES, CHANNELS = 8, 16
QUESTIONS = [
    ("What?", 0),
    ("What happens in the video now?", 0),
    ("During which frames can we see a red circle?", 1),
    ("Is it a blue square?", 2),
    ("Why does the red square move up and then to the left?", 1),
]
"""Questions of different lengths, and the number of each one's video."""


def make_generator(kv_heads: int = 4, lora: bool = True, **llm: object) -> Generator:
    tokenizer = build_tokenizer()
    return Generator(tiny_model(kv_heads=kv_heads, lora=lora, vocab_size=len(tokenizer), **llm), tokenizer)


def videos(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((FRAMES, CHANNELS)).astype(np.float16) for _ in range(count)]


@contextmanager
def count_rows(generator: Generator) -> Iterator[list[int]]:
    """The rows (padding included) of every pass through the language model's layers."""
    rows: list[int] = []
    layer = generator.llama.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[:2].numel()))
    try:
        yield rows
    finally:
        hook.remove()


@pytest.mark.parametrize(("kv_heads", "lora"), [(4, True), (2, True), (4, False)])
def test_shared_prefixes_give_the_same_tokens_as_one_question_alone(kv_heads: int, lora: bool) -> None:
    generator, features = make_generator(kv_heads, lora), videos()
    alone = [generator.answer([text], [features[v]], max_new_tokens=24)[0] for text, v in QUESTIONS]
    shared = SharedPrefixes(generator)
    prefixes = shared.videos(features)
    texts, numbers = zip(*QUESTIONS)
    for _ in range(2):  # an answer leaves the prefixes as they were
        assert shared.answer(texts, prefixes, numbers, max_new_tokens=24) == alone
    pairs = [shared.answer([text] * 2, prefixes, [v, v], max_new_tokens=24) for text, v in QUESTIONS]
    assert pairs == [[answer, answer] for answer in alone]
    assert len({answer.token_ids for answer in alone}) == len(QUESTIONS), "the answers depend on question and video"


def test_an_answer_with_shared_prefixes_ends_where_the_context_does() -> None:
    lengths = [len(prompt_ids(text, build_tokenizer(), FRAMES)[0]) for text, _ in QUESTIONS]
    generator = make_generator(max_position_embeddings=max(lengths) + 3)
    shared, features = SharedPrefixes(generator), videos()
    texts, numbers = zip(*QUESTIONS)
    answers = shared.answer(texts, shared.videos(features), numbers, max_new_tokens=20)
    assert answers == generator.answer(texts, [features[v] for v in numbers], max_new_tokens=20)
    assert [len(answer.token_ids) for answer in answers] == [min(20, max(lengths) + 3 - length) for length in lengths]


def test_the_rows_of_a_prefix_are_computed_once() -> None:
    generator, features = make_generator(), videos()
    shared = SharedPrefixes(generator)
    texts, numbers = zip(*QUESTIONS)
    _, head = prompt_ids("What?", generator.tokenizer, FRAMES)
    own = [len(prompt_ids(text, generator.tokenizer, FRAMES)[0]) - head - FRAMES for text in texts]
    with count_rows(generator) as passes:
        first, second = shared.videos(features[:2]), shared.videos(features[2:])
    assert passes == [head, 2 * FRAMES, FRAMES]
    with count_rows(generator) as passes:
        shared.answer(texts[:3], first, numbers[:3], max_new_tokens=4)
        shared.answer(texts[3:4], second, [0], max_new_tokens=4)
    padded = 3 * max(own[:3])
    assert passes == [padded, 3, 3, 3, own[3], 1, 1, 1]
    assert shared.rows == Rows(head, 3 * FRAMES, sum(own[:4]))


@pytest.mark.parametrize(
    "written", ["<video>\nWhat moves?", "What moves?\n<video>", "  What moves?</s> ", "<image> What moves?"]
)
def test_a_question_is_cleaned_as_in_training(written: str) -> None:
    generator, features = make_generator(), videos(1)
    assert generator.prompt(written, FRAMES)[0].tolist() == (
        prompt_ids("What moves?", generator.tokenizer, FRAMES)[0].tolist()
    )
    assert generator.answer([written], features, max_new_tokens=8) == (
        generator.answer(["What moves?"], features, max_new_tokens=8)
    )


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("<video>\n", r"the question '<video>\\n' holds no text: give a question about the video"),
        ("What <video> moves?", "a media tag may be at the start or end only"),
    ],
)
def test_a_question_without_text_is_refused(written: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator().answer([written], videos(1))
