"""The CUDA code never synchronizes with the GPU: it runs on fake CUDA tensors, which have no values to read.

Triton launches are recorded instead of executed. The GPU code is called directly, because the custom ops around it
would use their fake kernels for fake tensors. On a GPU, `bench.gpu` repeats the check with torch's sync debug mode.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

pytest.importorskip("triton", reason="Triton has no build for this platform")

from pite_kernels.gpu import cross_entropy, lora, rows, shared, trajectory
from tests.kernels.helpers import Heads, make_heads
from tests.peak_memory import PeakMemory

VALUES = (DataDependentOutputException, DynamicOutputShapeException, RuntimeError)


class Recorder:
    """Replaces a Triton kernel: records each kernel[grid](...)."""

    def __init__(self, name: str, launches: list[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        assert all(isinstance(n, int) for n in grid)
        return lambda *arguments, **options: self.launches.append(self.name)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    made: list[str] = []
    for module in (shared, trajectory, cross_entropy, lora, rows):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name, made))
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132, raising=False)
    # Fake tensors cannot run addmm with out= if torch is built without CUDA.
    monkeypatch.setattr(torch, "addmm", lambda *arguments, out, **options: out)
    return made


@pytest.fixture
def heads():
    real = make_heads(torch.bfloat16, tokens=5000, count=900, supervised=4500)
    inputs = {n: getattr(real, n).detach() for n in Heads.__dataclass_fields__}
    with FakeTensorMode() as mode:
        yield replace(real, **{n: torch.empty_like(mode.from_tensor(t), device="cuda") for n, t in inputs.items()})


@pytest.mark.parametrize("accumulate", [True, False])
def test_trajectory(heads, launches, accumulate):
    loss, sign, scale, _ = trajectory.forward(
        heads.hidden, heads.weight, heads.bias, heads.targets, heads.rows, None, True
    )
    gradient = torch.empty_like(heads.hidden)
    trajectory.write_grad_hidden(gradient, scale, heads.weight, sign, heads.rows, accumulate)
    trajectory.grad_weight(scale, heads.hidden, heads.weight, sign, heads.rows)
    assert loss.shape == () and sign.dtype == torch.bfloat16 and sign.shape == (900, 32), "30 outputs are one K-step"
    assert launches == [
        "trajectory_l1_fwd_kernel",
        "finish_loss_kernel",
        "trajectory_l1_bwd_link_rows_kernel",
        *([] if accumulate else ["zero_rows_kernel"]),
        "trajectory_l1_bwd_merge_signs_kernel",
        "trajectory_l1_bwd_dx_kernel",
        "trajectory_l1_bwd_dw_kernel",
        "trajectory_l1_bwd_dw_sum_kernel",
    ]


@pytest.mark.parametrize("frozen", [True, False])
def test_cross_entropy(heads, launches, frozen):
    _, scale, dx, dw, _, _ = cross_entropy.forward(
        heads.hidden,
        heads.lm_weight,
        None,
        heads.target_ids,
        heads.target_rows,
        torch.empty((), device="cuda"),
        None,
        0.1,
        -100,
        True,
        not frozen,
        False,
    )
    assert dw.numel() == (0 if frozen else heads.lm_weight.numel())
    assert cross_entropy.scatter_rows(dx, heads.target_rows, scale, 5000).shape == (5000, 32)
    chunk = ["cross_entropy_softmax_kernel", "zero_rows_kernel"]
    expected = [*chunk * 3, "finish_loss_kernel", "cross_entropy_bwd_scatter_rows_kernel"]
    assert launches == expected, "4,500 rows are three chunks"


def test_lora(heads, launches):
    grad, lora_b, low = (heads.hidden.new_empty(shape) for shape in ((5000, 96), (96, 8), (5000, 24)))
    grad_low, grad_b = lora.thin_products(grad, lora_b, low, 2.0, [64, 16, 16])
    assert grad_low.shape == low.shape and grad_b.shape == lora_b.shape
    assert launches == ["lora_bwd_thin_products_kernel"], "one launch for all parts"


def test_gathered_rows(heads, launches):
    out = heads.hidden.new_empty(5000, 128)
    rows.sum_rows(heads.hidden.new_empty(7000, 128), heads.rows.new_empty(7000), heads.rows.new_empty(5001), out)
    assert launches == ["gather_rows_bwd_kernel"]


@pytest.mark.parametrize("depth", [4096, 5120])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_frozen_vocabulary_head_needs_at_most_300_mb(heads, launches, depth, fraction):
    rows = int(16384 * fraction)
    hidden, weight = heads.hidden.new_empty((16384, depth)), heads.hidden.new_empty((32000, depth))
    ids, at = (heads.rows.new_empty(rows) for _ in range(2))
    with PeakMemory() as forward:
        results = cross_entropy.forward(hidden, weight, None, ids, at, None, None, 0.1, -100, True, False, False)
    assert 100e6 < forward.peak < 300e6
    with PeakMemory() as backward:
        gradient = cross_entropy.scatter_rows(results[2], at, results[1], 16384)
    # Memory that the forward pass keeps plus the backward peak, without the gradient that any implementation returns.
    assert results[2].nbytes + backward.peak - gradient.nbytes < 300e6


def test_reading_a_value_would_raise(heads):
    for read in (lambda t: t.item(), lambda t: t.nonzero(), lambda t: bool(t > 0), lambda t: t.tolist()):
        with pytest.raises(VALUES):
            read(heads.hidden.sum())
