"""The memory estimate of a device, and the layout chosen from it."""

from pathlib import Path

import pytest
import torch

from engine.hardware import DEVICES
from engine.layout import MAX_TOKEN_BUDGET, RESERVED_SHARE, choose_layout, count_parameters, memory
from engine.loop import compute_losses
from engine.recipes import recipe
from engine.train import main
from pite.config import PiTeConfig
from tests.engine.workspace import train_arguments
from tests.samples import random_batch, tiny_model


def layout(size: str, capacity: float, **flags: object):
    config = PiTeConfig.preset(size)
    return choose_layout(config, count_parameters(config, recipe(size, 2)), capacity, **flags)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", ["7b", "13b"])
def test_what_is_chosen_fits_and_holds_the_longest_sample(size, device):
    chosen = layout(size, DEVICES[device].bytes, ranks=8)
    assert 2048 <= chosen.token_budget <= MAX_TOKEN_BUDGET
    assert chosen.needed.total <= (1 - RESERVED_SHARE) * DEVICES[device].bytes


def test_layouts_are_tried_from_the_cheapest():
    """No activation checkpointing if it fits; then in a few layers; then sharding; on one device, in more layers."""
    roomy, snug, forty, alone = (
        layout("13b", gigabytes * 1e9, ranks=ranks) for gigabytes, ranks in ((200, 8), (60, 8), (40, 8), (40, 1))
    )
    assert (roomy.shards, roomy.recompute, roomy.token_budget) == (1, 0, MAX_TOKEN_BUDGET)
    assert snug.shards == 1 and 0 < snug.recompute <= 10
    assert forty.shards == 8 and forty.recompute <= 10
    assert alone.shards == 1 and alone.recompute > 20
    with pytest.raises(ValueError, match="needs"):
        layout("13b", 40e9, recompute=alone.recompute - 1)


def test_a_device_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="a device of 24 GB has room for 22"):
        layout("13b", 24e9)
    with pytest.raises(ValueError, match="--recompute must be 0 to 40"):
        layout("13b", 80e9, recompute=41)


def test_shards_divide_the_weights():
    config = PiTeConfig.preset("13b")
    count = count_parameters(config, recipe("13b", 2))
    copied, sharded = (memory(config, count, 0, shards=n).weights for n in (1, 8))
    assert copied == pytest.approx(26.0e9, rel=0.01)
    assert copied / 8 < sharded < copied / 8 + 2 * 0.65e9 + 0.7e9


def saved_bytes(model, batch, layers: int) -> int:
    """Bytes of the tensors that autograd saves, without parameters."""
    model.decoder.checkpoint_activations(layers)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = compute_losses(model, batch, recipe("7b", 3))
    total = sum(storage.nbytes() for storage in kept.values())
    del losses
    return total


def test_a_checkpointed_layer_saves_only_its_input():
    model = tiny_model(num_hidden_layers=6)
    batch = random_batch(6, model.config)
    kept = [saved_bytes(model, batch, layers) for layers in (1, 2, 4)]
    one = batch.num_tokens * model.config.llm.hidden_size * 4
    every = saved_bytes(model, batch, 0)
    assert kept[0] > kept[1] > kept[2]
    assert kept[0] - kept[1] == pytest.approx((kept[1] - kept[2]) / 2)
    assert every - kept[0] > 10 * one


@pytest.mark.parametrize("layers", [1, 2])
def test_activation_checkpointing_changes_no_bit(workspace: Path, tmp_path: Path, layers: int):
    metrics = []
    for name, flags in (("kept", {}), ("again", {"recompute": layers})):
        assert main(train_arguments(workspace, tmp_path / name, "2", llm="random", max_steps=3, **flags)) == 0
        text = (tmp_path / name / "stage2" / "metrics.jsonl").read_text()
        metrics.append([line.partition('"seconds"')[0] for line in text.splitlines()])
    assert metrics[0] == metrics[1]
    assert len(metrics[0]) == 3
