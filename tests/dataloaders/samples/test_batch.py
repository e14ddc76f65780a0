"""The collator: every index list against a slow implementation of its definition."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from dataloaders.records import TokenizedSample
from dataloaders.samples.batch import PackedBatch, collate
from tests.samples import random_samples, related_samples, tiny_config


def test_all_index_lists_of_separate_samples():
    config = tiny_config()
    samples, features = random_samples(5, config)
    batch = collate(samples, features, share=False)
    row = 0
    targets, trajectories, frames = [], [], []
    for sample, record in zip(samples, features):
        end = row + len(sample.token_ids) - 1  # the last token is not a row
        assert batch.token_ids[row:end].tolist() == sample.token_ids[:-1].tolist()
        assert batch.position_ids[row:end].tolist() == list(range(end - row))
        targets += [(row + p - 1, sample.token_ids[p]) for p in sample.target_positions]
        trajectories += [row + p - 1 for p in sample.trajectory_positions]
        frames += [(row + sample.frame_start + i, value) for i, value in enumerate(record)]
        row = end
    assert batch.num_rows == row and batch.num_tokens == row + 5
    read = batch.read_rows
    assert read.tolist() == sorted({r for r, _ in targets} | set(trajectories))
    assert list(zip(read[batch.target_rows].tolist(), batch.target_ids.tolist())) == targets
    assert read[batch.trajectory_rows].tolist() == trajectories
    assert batch.feature_rows.tolist() == [r for r, _ in frames]
    assert np.array_equal(batch.features.numpy(), np.stack([value for _, value in frames]))
    assert batch.cu_seqlens.tolist() == np.cumsum([0] + [len(s.token_ids) - 1 for s in samples]).tolist()
    assert batch.max_seqlen == max(len(s.token_ids) for s in samples) - 1
    assert batch.kv_rows is batch.kv_inverse is batch.kv_offsets is batch.cu_seqlens_kv is batch.max_seqlen_kv is None


Row = tuple[int, tuple[float, ...]]


def documents(batch: PackedBatch) -> list[list[Row]]:
    """For every segment what its last row attends to, in order: token ids, and the features where a frame stands."""
    frames = {row: tuple(record.tolist()) for row, record in zip(batch.feature_rows.tolist(), batch.features)}
    rows, bounds = torch.arange(batch.num_rows), batch.cu_seqlens
    if batch.kv_rows is not None:
        rows, bounds = batch.kv_rows, batch.cu_seqlens_kv
    found = []
    for (a, b), (begin, end) in zip(pairwise(bounds.tolist()), pairwise(batch.cu_seqlens.tolist())):
        document = rows[a:b].tolist()
        assert document[a - b :][-(end - begin) :] == list(range(begin, end)), "its own rows come last"
        assert batch.position_ids[document].tolist() == list(range(b - a))
        found.append([(int(batch.token_ids[row]), frames.get(row, ())) for row in document])
    return found


def expected_document(sample: TokenizedSample, record: np.ndarray, stop: int) -> list[Row]:
    rows: list[Row] = [(int(token), ()) for token in sample.token_ids[:stop]]
    for i, values in enumerate(record[: max(0, stop - sample.frame_start)]):
        rows[sample.frame_start + i] = (0, tuple(values.tolist()))
    return rows


def check(samples: list[TokenizedSample], features: list[np.ndarray]) -> PackedBatch:
    """What every target and trajectory is predicted from is what stands before it in its sample."""
    batch = collate(samples, features)
    found = documents(batch)
    segment_of = np.repeat(np.arange(len(found)), batch.cu_seqlens.diff())
    place = batch.position_ids.tolist()

    def context(row: int) -> list[Row]:
        return found[segment_of[row]][: place[row] + 1]

    targets = [(s, r, p) for s, r in zip(samples, features) for p in s.target_positions]
    trajectories = [(s, r, p) for s, r in zip(samples, features) for p in s.trajectory_positions]
    for rows, positions in ((batch.target_rows, targets), (batch.trajectory_rows, trajectories)):
        for row, (sample, record, position) in zip(batch.read_rows[rows].tolist(), positions, strict=True):
            assert context(row) == expected_document(sample, record, position)
    assert batch.target_ids.tolist() == [s.token_ids[p] for s, _, p in targets]
    assert np.array_equal(batch.trajectory.numpy(), np.concatenate([s.trajectory for s in samples]))
    assert batch.read_rows.tolist() == sorted(set(batch.read_rows.tolist()))
    assert set(range(len(batch.read_rows))) == {*batch.target_rows.tolist(), *batch.trajectory_rows.tolist()}
    if batch.kv_rows is not None:
        for row in range(batch.num_rows):
            copies = batch.kv_inverse[batch.kv_offsets[row] : batch.kv_offsets[row + 1]]
            assert copies.tolist() == (batch.kv_rows == row).nonzero().flatten().tolist()
        assert batch.max_seqlen_kv == batch.cu_seqlens_kv.diff().max()
        assert all(t.dtype == torch.int64 for t in (batch.kv_rows, batch.kv_inverse, batch.kv_offsets))
    assert batch.num_tokens == sum(len(s.token_ids) for s in samples)
    return batch


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("questions", [1, 2, 8])
@pytest.mark.parametrize("frames", [8, 1])
def test_the_head_and_the_frames_are_computed_once(questions, frames, turns):
    samples, features = related_samples(3, questions, tiny_config(), frames=frames, turns=turns)
    batch = check(samples, features)
    own = sum(len(s.token_ids) - 1 - 9 - frames for s in samples)
    shared_text = 2 if questions > 1 else 0  # what stands between the frames and the questions
    assert batch.num_rows <= own + 9 + 3 * frames - shared_text * 3 * (questions - 1)
    assert len(batch.features) == 3 * frames
    assert len(batch.cu_seqlens) - 1 == 1 + (3 + 3 * questions if questions > 1 else 3)


def of(token_ids: list[int], frames: slice, targets: list[int], media: str = "m") -> TokenizedSample:
    trajectory = np.zeros((0, 3, frames.stop - frames.start, 2), dtype=np.float32)
    none = np.zeros(0, dtype=np.int64)
    count = frames.stop - frames.start
    return TokenizedSample(
        "s", media, np.array(token_ids), frames.start, count, np.array(targets, np.int64), none, trajectory
    )


RECORD = np.arange(6, dtype=np.float32).reshape(2, 3)
HEAD = [*range(11, 19)]
PAIRS = {
    "equal samples": ([*HEAD, 0, 0, 3, 4, 5], [*HEAD, 0, 0, 3, 4, 5], 12),
    "equal but for the last token": ([*HEAD, 0, 0, 3, 4, 5], [*HEAD, 0, 0, 3, 4, 6], 12),
    "one begins with the other": ([*HEAD, 0, 0, 3, 4, 5], [*HEAD, 0, 0, 3, 4, 5, 6], 13),
    "one begins with the other, but for its last token": ([*HEAD, 0, 0, 3, 4], [*HEAD, 0, 0, 3, 7, 8], 12),
    "the first supervised token follows a shared row": ([*HEAD, 0, 0, 3, 4, 5], [*HEAD, 0, 0, 3, 6, 7], 13),
    "nothing in common": ([*HEAD, 0, 0, 3, 4], [5, *HEAD[1:], 0, 0, 3, 4], 22),
    "too little in common": ([*HEAD[:6], 0, 0, 3, 4], [*HEAD[:5], 9, 0, 0, 3, 4], 18),
    "equal frames at other positions": ([*HEAD, 0, 0, 3, 4], [*HEAD, 7, 0, 0, 3, 4], 15),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    first, second, rows = PAIRS[name]
    samples = [
        of(ids, slice(ids.index(0), ids.index(0) + 2), list(range(ids.index(0) + 3, len(ids))))
        for ids in (first, second)
    ]
    assert check(samples, [RECORD, RECORD.copy()]).num_rows == rows
    assert check(samples[:1], [RECORD]).num_rows == len(first) - 1


def test_frames_are_shared_only_where_media_and_features_are_equal():
    samples = [of([*HEAD, 0, 0, 3, 4, 5], slice(8, 10), [11, 12], media) for media in ("a", "a", "b", "a")]
    other = RECORD + np.float32([[0, 0, 0], [0, 0, 1]])
    batch = check(samples, [RECORD, RECORD, RECORD, other])
    assert batch.num_rows == 8 + 3 * 4
    assert len(batch.features) == 6


@pytest.mark.parametrize(("common", "segments"), [(8, 1 + 2 * 3), (5, 2 * (1 + 3))])
def test_prompts_with_two_heads(common, segments):
    """They share what they have in common if it is long enough, else each has a root of its own."""
    groups = [related_samples(3, 1, tiny_config(), head=20, seed=seed) for seed in (0, 7)]
    start = groups[0][0][0].token_ids[:common]
    samples = [replace(s, token_ids=np.concatenate([start, s.token_ids[common:]])) for of, _ in groups for s in of]
    batch = check(samples, [record for _, records in groups for record in records])
    lengths = batch.cu_seqlens.diff().tolist()
    assert len(lengths) == segments + (2 if common == 8 else 0)
    assert lengths[0] == (8 if common == 8 else 20)


def test_a_prompt_alone_has_no_targets():
    """As in generation: the kernels get one row, and no loss reads it."""
    batch = collate([of([1, 2, 0, 0, 3], slice(2, 4), [])], [RECORD])
    assert batch.read_rows.tolist() == [3] and batch.target_rows.numel() == 0


def test_normalizers_default_to_this_batch_and_count_present_coordinates():
    samples, features = random_samples(4, tiny_config())
    batch = collate(samples, features)
    present = sum(int((s.trajectory[..., 0] != -1).sum()) for s in samples) * 2
    assert batch.normalizers.tolist() == [sum(len(s.target_positions) for s in samples), present]
    assert collate(samples, features, normalizers=(7, 9)).normalizers.tolist() == [7, 9]


def test_features_of_another_length_are_refused():
    samples, features = random_samples(2, tiny_config())
    with pytest.raises(ValueError, match=r"sample s1: 3 features of media 'm1' for 8 rows"):
        collate(samples, [features[0], features[1][:3]])


@pytest.mark.parametrize("questions", [1, 2])
def test_moving_to_a_device_keeps_all_fields(questions):
    samples, features = related_samples(2, questions, tiny_config())
    for batch in (collate(samples, features), collate(samples, features, share=False)):
        moved = batch.to("cpu")
        assert moved.sample_ids == batch.sample_ids
        assert torch.equal(moved.features, batch.features)
        assert (moved.kv_rows is None) == (batch.kv_rows is None)
