"""Prompts and tokens: supervised tokens, tokens with trajectories, and equal prompts in training and inference."""

from __future__ import annotations

import time

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dataloaders.formats.fields import time_to_index
from dataloaders.records import Mention, Sample, TokenizedSample, Turn
from dataloaders.samples.prompts import SYSTEM, prompt_ids, tokenize
from tests.text import llama_like

N, P = 6, 2
ANSWER = "From 00 to 09, a red circle moves right. Then a blue square moves up."
QUESTIONS = ["Describe the video in detail.", "", " leading", "trailing ", "línea\nñ 🎈?", "12 ASSISTANT: 3"]
ANSWERS = [ANSWER, "7", "🎈", "  two  spaces", "\nline", "é", "ASSISTANT: no", "a"]


def mention(answer: str, phrase: str, value: float) -> Mention:
    start = answer.index(phrase)
    return Mention(start, start + len(phrase), np.full((P, N, 2), value, dtype=np.float32))


def sample(answer: str, *mentions: Mention, question: str = "Describe the video in detail.") -> Sample:
    return Sample("s", "m", (Turn(question, answer, mentions),))


def tokens_of(tokenizer: PreTrainedTokenizerBase, tokenized: TokenizedSample, positions: np.ndarray) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenized.token_ids[positions].tolist())


def test_layout(tokenizer: PreTrainedTokenizerBase) -> None:
    result = tokenize(sample(ANSWER), tokenizer, num_frames=N, num_points=P)
    ids = result.token_ids.tolist()
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    frames = slice(result.frame_start, result.frame_start + N)
    assert ids[frames] == [0] * N
    assert tokenizer.decode(ids[1 : result.frame_start]) == f"{SYSTEM} USER: "
    assert tokenizer.decode(ids[frames.stop :]) == f"\nDescribe the video in detail. ASSISTANT: {ANSWER}</s>"


@pytest.mark.parametrize("answer", ANSWERS)
def test_supervised_are_the_answer_and_its_end(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    result = tokenize(sample(answer), tokenizer, num_frames=N, num_points=P)
    targets = result.target_positions
    assert targets.tolist() == list(range(targets[0], len(result.token_ids)))
    assert result.token_ids[targets[-1]] == tokenizer.eos_token_id
    assert tokenizer.decode(result.token_ids[targets[:-1]]) == answer


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_prompt_is_a_prefix_of_the_sample(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> None:
    ids, frame_start = prompt_ids(question, tokenizer, N)
    result = tokenize(sample(answer, question=question), tokenizer, num_frames=N, num_points=P)
    assert ids.dtype == np.int64 and frame_start == result.frame_start
    assert result.token_ids[: len(ids)].tolist() == ids.tolist()
    assert result.target_positions[0] == len(ids), "the first token after the prompt is supervised"


def test_chunks_are_tokenized_as_llava_does(tokenizer: PreTrainedTokenizerBase) -> None:
    """LLaVA splits the whole prompt at the tag and tokenizes the pieces alone, each without its BOS but the first."""
    before, after = f"{SYSTEM} USER: <video>\nWhat moves? ASSISTANT:".split("<video>")
    expected = [tokenizer.bos_token_id, *tokenizer(before, add_special_tokens=False).input_ids, *[0] * N]
    expected += tokenizer(after, add_special_tokens=False).input_ids
    assert prompt_ids("What moves?", tokenizer, N)[0].tolist() == expected


def test_mentions_own_the_tokens_they_overlap(tokenizer: PreTrainedTokenizerBase) -> None:
    mentions = mention(ANSWER, "a red circle", 0.25), mention(ANSWER, "blue square", 0.75)
    result = tokenize(sample(ANSWER, *mentions), tokenizer, num_frames=N, num_points=P)
    assert tokens_of(tokenizer, result, result.trajectory_positions) == ["▁a", "▁red", "▁circle", "▁blue", "▁square"]
    assert result.trajectory.shape == (5, P, N, 2) and result.trajectory.dtype == np.float32
    assert result.trajectory[:, 0, 0, 0].tolist() == [0.25] * 3 + [0.75] * 2
    assert set(result.trajectory_positions) <= set(result.target_positions)


def test_part_of_a_token_is_enough(tokenizer: PreTrainedTokenizerBase) -> None:
    start = ANSWER.index("circle") + 2
    inside = Mention(start, start + 1, np.zeros((P, N, 2), np.float32))
    result = tokenize(sample(ANSWER, inside), tokenizer, num_frames=N, num_points=P)
    assert tokens_of(tokenizer, result, result.trajectory_positions) == ["▁circle"]


def test_all_bytes_of_a_character_belong_to_it(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = "a 🎈 up"
    result = tokenize(sample(answer, mention(answer, "🎈", 0.5)), tokenizer, num_frames=N, num_points=P)
    assert tokens_of(tokenizer, result, result.trajectory_positions) == ["<0xF0>", "<0x9F>", "<0x8E>", "<0x88>"]


def test_later_mention_wins(tokenizer: PreTrainedTokenizerBase) -> None:
    outer, inner = mention(ANSWER, "a red circle", 0.25), mention(ANSWER, "red", 0.5)
    values = [
        tokenize(sample(ANSWER, *order), tokenizer, num_frames=N, num_points=P).trajectory[:, 0, 0, 0].tolist()
        for order in ([outer, inner], [inner, outer])
    ]
    assert values == [[0.25, 0.5, 0.25], [0.25, 0.25, 0.25]]


def test_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = Turn("What?", "A circle.", (mention("A circle.", "circle", 0.1),)), Turn("Where?", "Left.")
    result = tokenize(Sample("s", "m", turns), tokenizer, num_frames=N, num_points=P)
    assert tokenizer.decode(result.token_ids[result.target_positions]) == "A circle.</s> Left.</s>"
    assert result.token_ids.tolist().count(tokenizer.eos_token_id) == 2
    both = tokenizer.decode(result.token_ids[result.frame_start + N :])
    assert both == "\nWhat? ASSISTANT: A circle.</s> USER: Where? ASSISTANT: Left.</s>"
    # The second turn does not change the tokens of the first.
    first = tokenize(Sample("s", "m", turns[:1]), tokenizer, num_frames=N, num_points=P)
    assert result.token_ids[: len(first.token_ids)].tolist() == first.token_ids.tolist()


def test_image(tokenizer: PreTrainedTokenizerBase) -> None:
    point = Mention(0, 1, np.array([[[0.1, 0.9]]], np.float32))
    result = tokenize(Sample("s", "m", (Turn("Q", "A.", (point,)),)), tokenizer, num_frames=1, num_points=1)
    assert result.num_features == 1 and result.trajectory.shape[1:] == (1, 1, 2)


def test_no_mentions_give_an_empty_array(tokenizer: PreTrainedTokenizerBase) -> None:
    result = tokenize(sample(ANSWER), tokenizer, num_frames=N, num_points=P)
    assert result.trajectory.shape == (0, P, N, 2) and result.trajectory_positions.dtype == np.int64


def test_trajectory_of_another_shape_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"sample s: a trajectory of shape \(2, 6, 2\), not \(2, 7, 2\)"):
        tokenize(sample(ANSWER, mention(ANSWER, "red", 0.1)), tokenizer, num_frames=7, num_points=P)


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow does not give the character offsets"):
        prompt_ids("Q", Slow(), N)  # type: ignore[arg-type]


def test_tokenizer_without_an_end_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=llama_like().backend_tokenizer, bos_token="<s>")
    with pytest.raises(ValueError, match="lacks a token for the beginning or the end"):
        prompt_ids("Q", bare, N)


def test_tokenizer_that_merges_over_the_colon_is_refused() -> None:
    """A prompt could not end before such a token."""
    words = {"<s>": 0, "</s>": 1, "\nQ ASSISTANT: yes": 2, f"{SYSTEM} USER: ": 3}
    whole = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    whole.pre_tokenizer = pre_tokenizers.Split("never present", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="merges the end of"):
        tokenize(sample("yes", question="Q"), fast, num_frames=N, num_points=P)


def test_cost(tokenizer: PreTrainedTokenizerBase) -> None:
    long = sample(ANSWER * 3, *(mention(ANSWER, "a red circle", 0.1) for _ in range(3)))
    best = min(_seconds(long, tokenizer) for _ in range(20))
    assert best < 1e-3


def _seconds(long: Sample, tokenizer: PreTrainedTokenizerBase) -> float:
    start = time.perf_counter()
    tokenize(long, tokenizer, num_frames=N, num_points=P)
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("seconds", "duration", "n", "index"),
    [(0, 54.2, 100, 0), (9.4, 54.2, 100, 17), (54.2, 54.2, 100, 99), (53.9, 54.2, 100, 99), (27.1, 54.2, 32, 16)],
)
def test_time_to_index(seconds: float, duration: float, n: int, index: int) -> None:
    assert time_to_index(seconds, duration, n) == index
