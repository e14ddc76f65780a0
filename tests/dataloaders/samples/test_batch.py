"""The collator: every index list against a slow implementation of its definition."""

import numpy as np
import pytest
import torch

from dataloaders.samples.batch import collate
from tests.samples import random_samples, tiny_config


def test_all_index_lists():
    config = tiny_config()
    samples, features = random_samples(5, config)
    batch = collate(samples, features)
    row = 0
    targets, trajectories, frames = [], [], []
    for sample, record in zip(samples, features):
        end = row + len(sample.token_ids)
        assert batch.token_ids[row:end].tolist() == sample.token_ids.tolist()
        assert batch.position_ids[row:end].tolist() == list(range(len(sample.token_ids)))
        targets += [(row + p - 1, sample.token_ids[p]) for p in sample.target_positions]
        trajectories += [row + p - 1 for p in sample.trajectory_positions]
        frames += [(row + sample.frame_start + i, value) for i, value in enumerate(record)]
        row = end
    assert batch.num_tokens == row
    assert list(zip(batch.target_rows.tolist(), batch.target_ids.tolist())) == targets
    assert batch.trajectory_rows.tolist() == trajectories
    assert batch.feature_rows.tolist() == [r for r, _ in frames]
    assert np.array_equal(batch.features.numpy(), np.stack([value for _, value in frames]))
    assert batch.cu_seqlens.tolist() == np.cumsum([0] + [len(s.token_ids) for s in samples]).tolist()
    assert batch.max_seqlen == max(len(s.token_ids) for s in samples)


def test_normalizers_default_to_this_batch_and_count_present_coordinates():
    samples, features = random_samples(4, tiny_config())
    batch = collate(samples, features)
    present = sum(int((s.trajectory[..., 0] != -1).sum()) for s in samples) * 2
    assert batch.normalizers.tolist() == [sum(len(s.target_positions) for s in samples), present]
    assert collate(samples, features, normalizers=(7, 9)).normalizers.tolist() == [7, 9]


def test_features_of_another_length_are_refused():
    samples, features = random_samples(2, tiny_config())
    with pytest.raises(ValueError, match=r"sample s1: 3 features of media 'm1' for 8 frames"):
        collate(samples, [features[0], features[1][:3]])


def test_moving_to_a_device_keeps_all_fields():
    batch = collate(*random_samples(2, tiny_config()))
    moved = batch.to("cpu")
    assert moved.sample_ids == batch.sample_ids
    assert torch.equal(moved.features, batch.features)
