"""The order of the questions: every question once, few videos at a time, even batches of similar lengths."""

from __future__ import annotations

import numpy as np
import pytest

from pite.evaluate.plan import plan, share_of
from pite.evaluate.questions import Question


def make_questions(seed: int, videos: int = 23) -> tuple[list[Question], list[int]]:
    """Questions about videos in mixed order, and their lengths."""
    rng = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(videos), rng.integers(1, 9, videos))
    rng.shuffle(numbers)
    questions = [Question(f"v{v}", "qa", i, f"q{i}") for i, v in enumerate(numbers)]
    return questions, rng.integers(5, 60, len(questions)).tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 32, 1000])
def test_every_question_is_answered_once_in_even_batches(batch_size: int) -> None:
    for seed in range(5):
        questions, lengths = make_questions(seed)
        windows = list(plan(questions, lengths, batch_size))
        assert sorted(i for w in windows for b in w.batches for i in b) == list(range(len(questions)))
        assert [v for w in windows for v in w.videos] == list(dict.fromkeys(q.video for q in questions))
        for window in windows:
            assert len(window.videos) <= batch_size
            assert {questions[i].video for batch in window.batches for i in batch} == set(window.videos)
            sizes = [len(batch) for batch in window.batches]
            assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
            ordered = [lengths[i] for batch in window.batches for i in batch]
            assert ordered == sorted(ordered)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_processes_share_the_videos_evenly(size: int) -> None:
    questions, _ = make_questions(0)
    shares = [share_of(questions, rank, size) for rank in range(size)]
    assert sorted(q.query_id for share in shares for q in share) == list(range(len(questions)))
    videos = [{question.video for question in share} for share in shares]
    assert sum(map(len, videos)) == len({question.video for question in questions})
    loads = [len(share) + len(those) for share, those in zip(shares, videos)]
    assert max(loads) - min(loads) <= 9, "one video has at most 8 questions"
    assert all([q.query_id for q in share] == sorted(q.query_id for q in share) for share in shares)
