"""Samples whose video stands between two marks: order, shared prefixes, prompts. tests/golden compares published ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataloaders.records import Sample, Turn, VideoFirst
from dataloaders.samples.batch import collate
from dataloaders.samples.dataset import StageDataset
from dataloaders.samples.marked import TRAINING, Marks, prompt_ids, tokenize
from dataloaders.samples.plan import computed_rows
from engine.tiny.tokenizer import build_tokenizer

FEATURES, CHANNELS = 12, 4


def marks(video_first: VideoFirst = "published") -> Marks:
    vocabulary = len(build_tokenizer())
    return Marks(vocabulary + 1, vocabulary + 2, FEATURES, video_first)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine records about three videos; one is malformed, which does not change the parity of those after it."""
    records = [{"q": f"{i:02} red circles?", "a": "left.", "video_id": f"v{i // 3}"} for i in range(9)]
    records[2]["a"] = ""
    (tmp_path / "stage3").mkdir()
    (tmp_path / "stage3" / "video_instruct.json").write_text(json.dumps(records))
    (tmp_path / "stage3" / "valley.json").write_text("[]")
    return tmp_path


def dataset(data: Path, video_first: VideoFirst = "published", transcripts: Path | None = None) -> StageDataset:
    return StageDataset(
        data, 3, build_tokenizer(), num_frames=1, num_points=1, max_length=2048, available=None, failure_budget=0.2,
        formats=("video_instruct.json",), marks=marks(video_first), transcripts=transcripts,
    )  # fmt: skip


def test_the_order_is_the_parity_in_the_unfiltered_file(data: Path) -> None:
    found = dataset(data, "published")
    assert len(found) == 8 and len(found.malformed) == 1
    starts = [found[i].frame_start for i in range(8)]
    first = min(starts)
    assert [start == first for start in starts] == [False, True, True, False, True, False, True, False]
    always = dataset(data, "always")
    assert {always[i].frame_start for i in range(8)} == {first}
    assert found.fingerprint() != always.fingerprint()


@pytest.mark.parametrize("video_first", ["published", "always"])
def test_the_plan_counts_the_rows_that_the_collator_makes(data: Path, video_first: VideoFirst) -> None:
    """Rows that are planned for a micro-batch are enough, and no more than needed where all videos come first."""
    found = dataset(data, video_first)
    record = {key: np.full((FEATURES, CHANNELS), i, np.float16) for i, key in enumerate(sorted(set(found.media)))}
    for chosen in ([0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 4], [0, 3], [2, 4, 7]):
        prefixes = found.prefixes(np.array(chosen))
        planned = computed_rows(found.tokens[chosen], list(range(len(chosen))), prefixes)
        samples = [found[i] for i in chosen]
        rows = collate(samples, [record[s.media] for s in samples]).num_rows
        assert rows <= planned
        if video_first == "always":
            # The plan does not count that the mark after a video is equal too.
            assert planned - rows == len(samples) - len({s.media for s in samples})
    alone = sum(len(found[i].token_ids) - 1 for i in range(8))
    assert collate([found[i] for i in range(8)], [record[key] for key in found.media]).num_rows < alone


def test_a_prompt_is_the_beginning_of_its_training_sample() -> None:
    tokenizer, turns = build_tokenizer(), (Turn("Where is the red circle?", "left."), Turn("What moves?", "a square."))
    sample = tokenize(Sample("s", "m", turns, video_first=False), tokenizer, marks())
    for i, turn in enumerate(turns):
        ids, start = prompt_ids(turn.question, tokenizer, marks(), turns[:i], style=TRAINING)
        assert (sample.token_ids[: len(ids)] == ids).all() and start == sample.frame_start
        assert len(ids) in sample.target_positions and len(ids) - 1 not in sample.target_positions
    assert sample.token_ids[start - 1] == marks().start and sample.token_ids[start + FEATURES] == marks().end


def test_an_empty_transcript_is_quoted_and_none_is_not_mentioned() -> None:
    tokenizer = build_tokenizer()
    none, empty, some = (len(prompt_ids("Why?", tokenizer, marks(), transcript=t)[0]) for t in (None, "", "red circle"))
    assert none < empty < some


@pytest.mark.parametrize("video_first", [False, True])
def test_a_training_sample_quotes_a_transcript_as_the_prompt_does(video_first: bool) -> None:
    """After the video, token by token. The first question comes before it or after it, as without a transcript."""
    tokenizer, turns = build_tokenizer(), (Turn("Where is the red circle?", "left."), Turn("What moves?", "a square."))
    sample = Sample("s", "m", turns, video_first=video_first, transcript="a blue square")
    ids = tokenize(sample, tokenizer, marks()).token_ids.tolist()
    question = "\nWhere is the red circle?" if video_first else ""
    quoted = f'The noisy audio transcript of this video is:\n"a blue square"{question} ASSISTANT: left.'
    later = "USER: What moves? ASSISTANT: a square."
    ends = [
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in (quoted, later)
    ]
    assert ids[ids.index(marks().end) + 1 :] == [*ends[0], *ends[1]]
    if video_first:
        return
    for i, turn in enumerate(turns):
        prompt, start = prompt_ids(
            turn.question, tokenizer, marks(), turns[:i], style=TRAINING, transcript="a blue square"
        )
        assert ids[: len(prompt)] == prompt.tolist()
        # The prompt of pite.chat and pite.evaluate begins with another sentence.
        own, own_start = prompt_ids(turn.question, tokenizer, marks(), turns[:i], transcript="a blue square")
        assert own[own_start:].tolist() == prompt[start:].tolist()


def test_transcripts_of_a_folder(data: Path, tmp_path: Path) -> None:
    """Of three videos, the first and the last have a file, and that of the last is empty."""
    folder = tmp_path / "transcripts"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"none of 3 videos has a file there, such as v0\.json"):
        dataset(data, transcripts=folder)
    (folder / "v0.json").write_text(json.dumps({"transcript": "a blue square"}))
    (folder / "v2.txt").write_text("")
    plain, quoted = dataset(data), dataset(data, transcripts=folder)
    more = quoted.tokens - plain.tokens
    assert (more[:2] > 20).all() and not more[2:].any()
    assert [len(quoted[i].token_ids) for i in range(8)] == quoted.tokens.tolist()
    assert "8 samples, 2 with a transcript" in quoted.summary()
    (folder / "other.txt").write_text("is of no video")
    assert dataset(data, transcripts=folder).fingerprint() == quoted.fingerprint() != plain.fingerprint()
    (folder / "v0.json").write_text(json.dumps({"transcript": "a blue circle"}))
    changed = dataset(data, transcripts=folder)
    assert changed.tokens.tolist() == quoted.tokens.tolist() and changed.fingerprint() != quoted.fingerprint()


def test_text_that_reads_like_a_special_token_is_text() -> None:
    """transformers' LLaVA has tokens of its own, such as <image>, whose ids are those of the video's tokens here."""
    tokenizer, extended = build_tokenizer(), build_tokenizer()
    extended.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>", "<vid_end>"]})
    sample = Sample("s", "m", (Turn("Is <pad> left of <vid_end>?", "a <image> circle."),))
    one, two = (tokenize(sample, each, marks()) for each in (tokenizer, extended))
    assert len(extended) > len(tokenizer) and (one.token_ids == two.token_ids).all()
    assert (one.token_ids == marks().end).sum() == 1
