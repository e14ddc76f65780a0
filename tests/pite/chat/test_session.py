"""A session gives the answers of a batch, in one piece or in many, and computes no row of a conversation twice."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataloaders.records import Sample, Turn
from dataloaders.samples.prompts import prompt_ids, tokenize
from pite.chat.pieces import Pieces
from pite.chat.session import Session
from pite.chat.videos import Computed, Video
from pite.generate import Generator
from tests.held_out import FRAMES
from tests.pite.test_chat import predicted, set_config

QUESTIONS = ("What happens?", "When does the red circle move?", "Describe the video in detail.")
MOST = {"max_new_tokens": 12}


@pytest.fixture
def computed_rows(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the language model."""
    rows: list[int] = []
    model = session.model.generator.llama.model
    forward = model.forward

    def counted(*inputs: object, inputs_embeds: Tensor, **more: object) -> object:
        rows.append(inputs_embeds.shape[1])
        return forward(*inputs, inputs_embeds=inputs_embeds, **more)

    monkeypatch.setattr(model, "forward", counted)
    return rows


def test_streamed_batched_and_one_at_a_time_the_tokens_are_the_same(session: Session, videos: list[Path]) -> None:
    features = [session.model.videos.get(video).features for video in videos[: len(QUESTIONS)]]
    batch = session.model.generator.answer(QUESTIONS, features, **MOST)
    for video, question, expected in zip(videos, QUESTIONS, batch, strict=False):
        pieces = list(session.stream(video, question, **MOST))
        assert "".join(pieces) == expected.text and len(pieces) > 1
        assert session.last is not None and session.last.token_ids == expected.token_ids
        assert session.fork().answer(video, question, **MOST).token_ids == expected.token_ids


@pytest.mark.parametrize("canonical", [True, False])
def test_a_later_prompt_begins_the_training_sample_of_all_turns(
    session: Session, videos: list[Path], computed_rows: list[int], canonical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model writes an answer in other tokens than training has for its text."""
    generator = session.model.generator
    prompts: list[np.ndarray] = []
    prompt = generator.prompt

    def seen(*given: object) -> tuple[np.ndarray, int]:
        prompts.append(prompt(*given)[0])
        return prompt(*given)

    monkeypatch.setattr(generator, "prompt", seen)
    if canonical:
        monkeypatch.setattr(generator, "tokens", forced(generator, ids_of(generator, "From 02 to 05, it moves right.")))
    replies = [session.answer(videos[0], question, **MOST) for question in QUESTIONS]
    turns = tuple(Turn(question, reply.text) for question, reply in zip(QUESTIONS, replies, strict=True))
    whole = tokenize(Sample("s", "m", turns), generator.tokenizer, num_frames=FRAMES, num_points=3).token_ids
    starts = [np.flatnonzero(whole[: len(ids)] != ids) for ids in prompts]
    assert [len(start) for start in starts] == [0, 0, 0] and len(prompts[1]) > len(prompts[0]) + 5
    answers = [len(reply.token_ids) for reply in replies]
    calls = iter(computed_rows)
    prefills = [list(islice(calls, count + canonical))[0] for count in answers]  # noqa: RUF015 (all are taken)
    assert prefills[0] == len(prompts[0])
    if canonical:
        # What remains of the sample before is its </s>.
        own = [len(after) - len(before) - count for before, after, count in zip(prompts, prompts[1:], answers)]
        assert prefills[1:] == own
    else:
        assert all(rows <= len(ids) - len(prompts[0]) for rows, ids in zip(prefills[1:], prompts[1:], strict=True))


def ids_of(generator: Generator, text: str) -> list[int]:
    """The tokens of an answer in training."""
    sample = Sample("s", "m", (Turn("What happens?", text),))
    whole = tokenize(sample, generator.tokenizer, num_frames=FRAMES, num_points=3)
    return whole.token_ids[whole.target_positions[:-1]].tolist()


def forced(generator: Generator, ids: list[int]) -> object:
    """`Generator.tokens` that writes the given tokens, with the model's rows and hidden states."""

    @torch.inference_mode()
    def tokens(embeddings: Tensor, cache: object, room: int, temperature: float) -> Iterator[tuple[int, Tensor]]:
        inputs = embeddings[None]
        for token in [*ids, None]:
            hidden = generator.llama.model(inputs_embeds=inputs, past_key_values=cache).last_hidden_state[0, -1]
            if token is None:
                return
            yield token, hidden
            inputs = generator.llama.model.embed_tokens(torch.tensor([[token]]))

    return tokens


def test_a_conversation_answers_as_its_prompt_alone(session: Session, videos: list[Path]) -> None:
    """The cached rows of earlier turns change nothing."""
    replies = [session.answer(videos[0], question, **MOST) for question in QUESTIONS]
    generator, video = session.model.generator, session.model.videos.get(videos[0])
    turns = [Turn(question, reply.text) for question, reply in zip(QUESTIONS, replies, strict=True)]
    for i, reply in enumerate(replies):
        ids, start = prompt_ids(QUESTIONS[i], generator.tokenizer, FRAMES, turns[:i])
        embeddings = generator.embed(ids, start, video.features)
        alone = generator.tokens(embeddings, Computed().cache(0), **{"room": MOST["max_new_tokens"]})
        assert tuple(token for token, _ in alone) == reply.token_ids


def test_events_and_tracks_of_an_answer(session: Session, videos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    generator, text = session.model.generator, "From 02 to 05, a red circle moves right. A blue square: 07 to 06."
    ids = ids_of(generator, text)
    monkeypatch.setattr(generator, "tokens", forced(generator, ids))
    reply = session.answer(videos[0], "What happens?")
    video = session.model.videos.get(videos[0])
    assert video.duration is not None
    assert reply.text == text and reply.num_frames == FRAMES and reply.duration == video.duration
    assert [(event.frames, event.text) for event in reply.events] == [
        ((2, 5), "From 02 to 05, a red circle moves right"),
        ((6, 7), "A blue square: 07 to 06"),
    ]
    assert reply.events[0].seconds == pytest.approx((2 / FRAMES * video.duration, 5 / FRAMES * video.duration))
    assert [(track.label, track.span) for track in reply.tracks] == [
        ("a red circle", (2, 5)),
        ("A blue square", (6, 7)),
    ]
    every = predicted(generator, "What happens?", text, video.features)
    words = [generator.tokenizer.decode([token]).strip() for token in ids]
    first = words.index("red") - 1
    np.testing.assert_allclose(reply.tracks[0].predicted, every[first : first + 3].mean(0), atol=1e-5)
    named = session.fork().answer(videos[0], "What happens?", phrases=["circle moves"])
    assert [track.label for track in named.tracks] == ["circle moves"]


def test_a_stopped_answer_is_no_turn(session: Session, videos: list[Path]) -> None:
    expected = session.fork().answer(videos[0], QUESTIONS[0], **MOST)
    stream = session.stream(videos[0], "Stop?", **MOST)
    next(stream)
    stream.close()
    assert session.last is None
    assert session.answer(videos[0], QUESTIONS[0], **MOST).token_ids == expected.token_ids


def test_two_answers_at_the_same_time_do_not_mix(session: Session, videos: list[Path]) -> None:
    """Token by token about the same video, and about two."""
    alone = [session.fork().answer(videos[i], QUESTIONS[i], **MOST).text for i in (0, 1)]
    alone += [session.fork().answer(videos[0], QUESTIONS[2], **MOST).text]
    streams = [session.fork().stream(videos[v], QUESTIONS[q], **MOST) for v, q in ((0, 0), (1, 1), (0, 2))]
    texts = ["", "", ""]
    for _ in range(40):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    assert texts == alone


def test_videos_are_encoded_once_and_the_oldest_is_forgotten(made: Path, videos: list[Path]) -> None:
    session = Session.load(made / "model", clip=f"{made}/clip", device="cpu", max_videos=2)
    first = session.model.videos.get(videos[0])
    session.model.videos.get(videos[1])
    assert session.model.videos.get(videos[0]) is first
    session.model.videos.get(videos[2])
    assert session.model.videos.get(videos[0]) is first, "it was used later than the second"
    session.model.videos.get(videos[1])
    session.model.videos.get(videos[2])
    assert session.model.videos.get(videos[0]) is not first


def test_forgetting_starts_a_new_conversation(session: Session, videos: list[Path]) -> None:
    first = session.answer(videos[0], QUESTIONS[0], **MOST)
    session.answer(videos[0], QUESTIONS[1], **MOST)
    session.forget(videos[0])
    assert session.answer(videos[0], QUESTIONS[0], **MOST).token_ids == first.token_ids


def test_without_history_each_question_stands_alone(session: Session, videos: list[Path]) -> None:
    session.history = False
    alone = [session.fork().answer(videos[0], question, **MOST).token_ids for question in QUESTIONS]
    assert [session.answer(videos[0], question, **MOST).token_ids for question in QUESTIONS] == alone
    assert session.fork().history is False


def test_the_oldest_turns_are_left_out_where_the_context_ends(
    made: Path, tmp_path: Path, videos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    short = set_config(made, tmp_path, max_position_embeddings=110)
    session = Session.load(short / "model", clip=f"{made}/clip", device="cpu")
    for question in QUESTIONS * 2:
        assert session.answer(videos[0], question, **MOST).token_ids
    assert "questions are left out: the context of the language model is full" in caplog.text


@pytest.mark.parametrize("sampling", ["index", "time"])
def test_frames_are_chosen_by_the_rule_of_training(
    made: Path, tmp_path: Path, sampling: str, videos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pite.chat.session.sampling_of", lambda _: sampling)
    seen = []
    monkeypatch.setattr("pite.chat.videos.sample_video", lambda *_, **options: seen.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Session.load(made / "model", clip=f"{made}/clip", device="cpu").model.videos.get(videos[0])
    assert seen[0]["sampling"] == sampling


@pytest.mark.parametrize("text", ["One two. ", " höher — 日本語 🙂", "", "   ", "a  b\n"])
def test_pieces_are_the_text_without_half_characters(session: Session, text: str) -> None:
    generator = session.model.generator
    ids = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = Pieces(generator)
    given = [pieces.of(ids[: count + 1]) for count in range(len(ids))]
    whole = generator.decoded(ids).text
    assert "".join([*given, pieces.rest(whole)]) == whole
    assert not any("�" in piece for piece in given)


def test_a_changed_file_is_encoded_anew(made: Path, session: Session, videos: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(videos[0].read_bytes())
    first = session.model.videos.get(path)
    path.write_bytes(videos[1].read_bytes())
    other = session.model.videos.get(path)
    assert other is not first and not np.array_equal(other.features, first.features)


def test_a_video_without_times_has_no_seconds() -> None:
    assert Video(Path("v"), np.zeros((10, 2)), None).seconds(3) is None
    assert Video(Path("v"), np.zeros((10, 2)), 20.0).seconds(3) == 6.0
