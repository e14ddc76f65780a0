"""Generation with chat templates: prompts, shared prefixes, the tokens that end an answer, several turns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dataloaders.records import Sample, Turn
from dataloaders.samples.layouts import end_ids
from dataloaders.samples.prompts import prompt_ids, tokenize
from pite.chat.pieces import Pieces
from pite.generate import Generator
from pite.model import PiTe
from pite.prefixes import SharedPrefixes
from tests.pite.test_prefixes import QUESTIONS, videos
from tests.samples import tiny_model
from tests.text import CHAT_TOKENIZERS

FRAMES = 8
MODELS = {"qwen2.5": "qwen2", "qwen2.5 base": "qwen2", "qwen3": "qwen3", "llama3": "llama", "mistral": "mistral"}


def generator_of(kind: str) -> Generator:
    """A random model with a padded vocabulary."""
    tokenizer = CHAT_TOKENIZERS[kind]()
    model = tiny_model(2, architecture=MODELS[kind], vocab_size=len(tokenizer) + 13, max_position_embeddings=512)
    return Generator(model, tokenizer)


@pytest.mark.parametrize("kind", MODELS)
def test_answers_with_shared_prefixes_and_alone_are_equal(kind: str) -> None:
    generator, features = generator_of(kind), videos()
    alone = [generator.answer([text], [features[v]], max_new_tokens=16)[0] for text, v in QUESTIONS]
    texts, numbers = zip(*QUESTIONS)
    shared = SharedPrefixes(generator)
    assert shared.answer(texts, shared.videos(features), numbers, max_new_tokens=16) == alone
    assert len({answer.token_ids for answer in alone}) == len(QUESTIONS)


def stop_at(model: PiTe, token: int, at: int) -> None:
    """Exchange rows of the vocabulary head, so that `token` is generated where `at` was."""
    with torch.no_grad():
        head = model.output_embedding
        head[[token, at]] = head[[at, token]]


def streamed(generator: Generator, question: str, record: np.ndarray, most: int) -> list[int]:
    from transformers import DynamicCache

    embedded = generator.embed(*generator.prompt(question, FRAMES), record)
    return [token for token, _ in generator.tokens(embedded, DynamicCache(), most)]


@pytest.mark.parametrize("which", [0, -1], ids=["taught", "own"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_answer_ends_at_each_of_its_ends(kind: str, which: int) -> None:
    generator, record = generator_of(kind), videos(1)[0]
    end = end_ids(generator.tokenizer)[which]
    whole = generator.answer(["What?"], [record], max_new_tokens=12)[0].token_ids
    new = next(i for i in range(2, len(whole)) if whole[i] not in whole[:i] and whole[i] != end)
    assert end not in whole
    stop_at(generator.model, end, whole[new])
    for found in (
        generator.answer(["What?"], [record], max_new_tokens=12)[0].token_ids,
        streamed(generator, "What?", record, 12),
    ):
        assert list(found) == list(whole[:new])


@pytest.mark.parametrize("kind", MODELS)
def test_a_later_prompt_continues_the_conversation(kind: str) -> None:
    """Prompts of a chat are beginnings of the sample that holds all its turns, with the answers that were generated."""
    generator, record = generator_of(kind), videos(1)[0]
    turns: list[Turn] = []
    prompts = []
    for question in ("What happens?", "When does the red circle move?", "Why?"):
        ids, _ = generator.prompt(question, FRAMES, turns)
        prompts.append(ids)
        answer = generator.decoded(streamed(generator, question, record, 5))
        turns.append(Turn(question, answer.text or "-"))
    whole = tokenize(Sample("s", "m", tuple(turns)), generator.tokenizer, num_frames=FRAMES, num_points=3).token_ids
    for ids in prompts:
        assert whole[: len(ids)].tolist() == ids.tolist()
    assert whole[-1] == end_ids(generator.tokenizer)[0]


@pytest.mark.parametrize("kind", ["qwen2.5", "qwen3", "llama3"])
def test_pieces_of_a_stream_are_the_answer(kind: str) -> None:
    generator = generator_of(kind)
    for text in ("From 00 to 09, a red circle moves.", "é 🎈 línea", "two\nlines  and   spaces"):
        ids = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces = Pieces(generator)
        found = "".join(pieces.of(ids[: i + 1]) for i in range(len(ids)))
        assert found + pieces.rest(generator.decoded(ids).text) == generator.decoded(ids).text == text


def test_a_question_is_one_sentence_where_the_window_is_too_short() -> None:
    tokenizer = CHAT_TOKENIZERS["mistral"]()
    length = len(prompt_ids("What?", tokenizer, FRAMES)[0])
    build: Callable[[int], Generator] = lambda window: Generator(  # noqa: E731
        tiny_model(2, architecture="mistral", vocab_size=len(tokenizer), sliding_window=window), tokenizer
    )
    with pytest.raises(ValueError, match=r"no room for an answer in the .* positions of the language model's slid"):
        build(length).prompt("What?", FRAMES)
    answer = build(length + 3).answer(["What?"], [videos(1)[0]], max_new_tokens=20)[0]
    assert len(answer.token_ids) <= 3
