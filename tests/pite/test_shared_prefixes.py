"""What samples share is computed once, and the loss and every gradient stay those of separate samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from dataloaders.records import TokenizedSample
from dataloaders.samples.batch import PackedBatch, collate
from dataloaders.samples.plan import Prefixes, split_batch
from pite.model import Head, PiTe
from tests.operators import Operators
from tests.peak_memory import PeakMemory
from tests.samples import random_samples, related_samples, tiny_config, tiny_model, without_trajectories

Samples = tuple[list[TokenizedSample], list[np.ndarray]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def pack(samples: Samples, members: Sequence[int], normalizers: tuple[float, float], **options: bool) -> PackedBatch:
    return collate(
        [samples[0][i] for i in members], [samples[1][i] for i in members], normalizers=normalizers, **options
    )


def losses_and_gradients(model: PiTe, batches: Sequence[PackedBatch], head: Head | None) -> dict[str, torch.Tensor]:
    """Summed over the batches, as over micro-batches and ranks."""
    model.zero_grad()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        if model.dtype == torch.float64:
            batch = replace(batch, features=batch.features.double(), trajectory=batch.trajectory.double())
        losses = model(batch, head=head, label_smoothing=0.1, trajectory_weight=2.0)
        losses.total.backward()
        sums += torch.stack([losses.total.detach(), losses.ce, losses.l1])
    gradients = {name: p.grad.clone() for name, p in model.trainable() if p.grad is not None}
    return {"total": sums[0], "ce": sums[1], "l1": sums[2], **gradients}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-30, name


def stage_samples(stage: int, questions: int, turns: int = 1) -> tuple[Samples, Head | None]:
    """24 samples or so of a stage. In stage 1 some share an image."""
    config = tiny_config(2)
    shape = {"frames": 1, "points": 1} if stage == 1 else {}
    samples, features = related_samples(max(2, 24 // questions), questions, config, turns=turns, seed=stage, **shape)
    if stage == 3:
        samples = [without_trajectories(s) for s in samples]
    return (samples, features), {1: "localization", 2: "trajectory", 3: None}[stage]  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize(
    ("stage", "questions", "turns"),
    [(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 3, 1), (3, 1, 1), (3, 8, 1), (3, 2, 3), (2, 1, 2), (3, 5, 2)],
)
def test_the_loss_and_all_gradients(dtype, kv_heads, recompute, stage, questions, turns):
    samples, head = stage_samples(stage, questions, turns)
    everything = range(len(samples[0]))
    model = tiny_model(kv_heads, num_hidden_layers=3).to(dtype)
    model.decoder.checkpoint_activations(recompute)
    whole = collate(*samples, share=False)
    normalizers = tuple(whole.normalizers.tolist())
    shared = pack(samples, everything, normalizers)
    assert shared.num_tokens == whole.num_tokens == whole.num_rows + len(everything)
    assert shared.num_rows <= whole.num_rows - 9 * (len(everything) - 1)
    expected = losses_and_gradients(model, [whole], head)
    assert_equal(losses_and_gradients(model, [shared], head), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_ranks_and_micro_batches(dtype, ranks, micro_batches):
    """As planned: the samples of a video are together where that is cheaper."""
    samples, head = stage_samples(2, 3)
    model = tiny_model(2).to(dtype)
    whole = collate(*samples, share=False)
    normalizers = tuple(whole.normalizers.tolist())
    lengths = [len(s.token_ids) for s in samples[0]]
    groups = np.unique([s.media for s in samples[0]], return_inverse=True)[1]
    bins = split_batch(lengths, ranks * micro_batches, 10_000, Prefixes(9, 9 + 8, groups))
    batches = [pack(samples, micro, normalizers) for rank in bins for micro in rank]
    assert len(batches) == ranks * micro_batches
    expected = losses_and_gradients(model, [whole], head)
    assert_equal(losses_and_gradients(model, batches, head), expected, TOLERANCE[dtype])


def test_without_the_last_token_and_unread_rows_the_loss_is_that_of_all_rows():
    """Against the plain definition: all tokens are rows, and the heads read the hidden states of all."""
    samples, head = stage_samples(2, 2, turns=2)
    model = tiny_model(2).double()
    # An appended token makes the last one a row.
    longer = [replace(s, token_ids=np.append(s.token_ids, 7)) for s in samples[0]]
    whole = collate(longer, samples[1], share=False)
    whole = replace(whole, features=whole.features.double(), trajectory=whole.trajectory.double())
    hidden = model.hidden_states(whole, all_rows=True)
    logits = model.logits(hidden[whole.read_rows[whole.target_rows]])
    ce = torch.nn.functional.cross_entropy(logits, whole.target_ids, label_smoothing=0.1)
    projector, rows = model.trajectory_projector, whole.read_rows[whole.trajectory_rows]
    predicted = torch.nn.functional.linear(hidden[rows], projector.weight, projector.bias).view_as(whole.trajectory)
    present = (whole.trajectory != -1).all(-1, keepdim=True).expand_as(predicted)
    l1 = (predicted - whole.trajectory).abs()[present].mean()
    (ce + 2 * l1).backward()
    gradients = {name: p.grad.clone() for name, p in model.trainable() if p.grad is not None}
    expected = {"total": ce + 2 * l1, "ce": ce, "l1": l1, **gradients}
    assert_equal(losses_and_gradients(model, [collate(*samples)], head), expected, 1e-12)


def test_a_float8_model():
    samples, head = stage_samples(2, 3)
    model = tiny_model(2)
    model.quantize()
    batches = [collate(*samples, share=share) for share in (False, True)]
    separate, shared = (losses_and_gradients(model, [batch], head) for batch in batches)
    # Rows are quantized one by one, so equal rows stay equal; gradients are rounded before they are summed or after.
    assert_equal({k: shared[k] for k in ("total", "ce", "l1")}, {k: separate[k] for k in ("total", "ce", "l1")}, 1e-5)
    assert_equal(shared, separate, 0.05)


def test_compiled_layers():
    """The gathers are in the traced programs, without a graph break."""
    torch._dynamo.reset()
    samples, head = stage_samples(2, 2)
    plain, compiled = tiny_model(2, num_hidden_layers=3), tiny_model(2, num_hidden_layers=3)
    for layer in compiled.decoder.layers:
        layer._before = torch.compile(layer._before, fullgraph=True, backend="aot_eager")
        layer._after = torch.compile(layer._after, fullgraph=True, backend="aot_eager")
    batch = collate(*samples)
    found, expected = (losses_and_gradients(model, [batch], head) for model in (compiled, plain))
    assert_equal(found, expected, 1e-5)


@pytest.mark.parametrize("recompute", [0, 2])
def test_where_nothing_can_be_shared_sharing_adds_no_operator_and_no_allocation(recompute):
    config = tiny_config(2)
    samples, features = random_samples(6, config)
    samples = [replace(s, token_ids=np.array([i + 3, *s.token_ids[1:]])) for i, s in enumerate(samples)]
    found = []
    for share in (False, True):
        model = tiny_model(2)
        model.decoder.checkpoint_activations(recompute)
        batch = collate(samples, features, share=share)
        assert batch.kv_rows is None
        losses_and_gradients(model, [batch], "trajectory")  # plans the batches of SDPA, once for these lengths
        with Operators() as operators:
            losses_and_gradients(model, [batch], "trajectory")
        with PeakMemory() as memory:
            losses_and_gradients(model, [batch], "trajectory")
        found.append((operators.names, memory.peak))
    assert found[0] == found[1]
