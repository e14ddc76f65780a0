"""LoRA's Triton kernels against float64, on a GPU or in Triton's interpreter; `test_triton.py` runs this file."""

from __future__ import annotations

import pytest
import torch

import pite_kernels.lora
from pite_kernels import lora_linear, reference
from pite_kernels.gpu import lora
from tests.kernels.helpers import assert_as_accurate, assert_bitwise
from tests.kernels.triton_checks import assert_repeatable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def lora_results(function, x, weight, a, b, splits, upstream):
    with torch.enable_grad():
        y = function(x, weight, a, b, scale=0.5, splits=splits)
        return [y.detach(), *torch.autograd.grad(y, (x, a, b), upstream.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "splits", "rank"),
    [(37, [48], 4), (300, [130, 24, 24], 16), (1, [24, 24], 64), (0, [24, 24], 4), (40, [24, 8, 40, 16, 130], 8)],
)
def test_lora(dtype, tokens, splits, rank, monkeypatch):
    """300 rows make several groups; 130 columns make two column programs; five parts make two launches."""
    monkeypatch.setattr(pite_kernels.lora, "uses_triton", lambda tensor: tensor.dtype != torch.float64)
    g = torch.Generator().manual_seed(2)
    shapes = (tokens, 40), (sum(splits), 40), (len(splits) * rank, 40), (sum(splits), rank), (tokens, sum(splits))
    exact = [(torch.randn(s, generator=g) * s[-1] ** -0.5).to(dtype).double().to(DEVICE) for s in shapes]
    *inputs, upstream = (t.to(dtype) for t in exact)
    for tensors in (inputs, exact):
        for index in (0, 2, 3):
            tensors[index].requires_grad_()
    ours = lora_results(lora_linear, *inputs, splits, upstream)
    assert_repeatable(ours, lambda: lora_results(lora_linear, *inputs, splits, upstream))
    plain = lora_results(reference.lora_linear, *inputs, splits, upstream)
    truth = lora_results(reference.lora_linear, *exact[:4], splits, exact[4])
    assert_as_accurate(ours, plain, truth)


@pytest.mark.parametrize(
    ("count", "widths", "groups"), [(16384, (4096,) * 3, 4), (16384, (11008,) * 2, 3), (3680, (4096,) * 3, 1)]
)
def test_groups_keep_the_multiprocessors_busy(count, widths, groups):
    """264 programs run at a time on an H100."""
    group = lora.group_rows(count, widths, 264)
    assert -(-count // group) == groups


def test_programs_start_on_the_first_free_slot():
    assert lora._last_end([(2, 3.0), (1, 5.0)], 2) == 6
    assert lora._last_end([(5, 2.0)], 2) == 6
    assert lora._last_end([(1, 1.0), (1, 7.0)], 4) == 7


def test_lora_far_rows_are_addressed_in_64_bits():
    torch.use_deterministic_algorithms(False)
    stride = 2**30 + 5
    far = torch.empty(2 * stride + 32, device=DEVICE, dtype=torch.float16).as_strided((3, 32), (stride, 1))
    near = torch.randn(3, 32, device=DEVICE).half()
    far.copy_(near)
    b, low = torch.randn(32, 8, device=DEVICE).half(), torch.randn(3, 8, device=DEVICE).half()
    assert_bitwise(*(lora.thin_products(grad, b, low, 0.5, [32]) for grad in (near, far)))


@pytest.mark.skipif(DEVICE == "cpu", reason="float8 GEMMs need a GPU; test_fp8.py tests the emulation")
def test_float8_products_equal_the_emulation_on_the_cpu():
    g = torch.Generator().manual_seed(4)
    shapes = (300, 256), (96, 256), (8, 256), (96, 4), (300, 96)
    x, w, a, b, upstream = ((torch.randn(s, generator=g) * s[-1] ** -0.5).bfloat16() for s in shapes)

    def on(device: str) -> list[torch.Tensor]:
        inputs = [t.to(device) for t in (x, a, b)]
        weight = pite_kernels.quantize_weight(w.to(device))
        for t in inputs:
            t.requires_grad_()
        return lora_results(lora_linear, inputs[0], weight, *inputs[1:], [64, 32], upstream.to(device))

    for ours, emulated in zip(on("cuda"), on("cpu")):
        # The tolerance covers two roundings to bfloat16 and the shorter accumulators of the tensor cores.
        torch.testing.assert_close(ours.cpu(), emulated, rtol=2e-2, atol=2e-2 * emulated.abs().max().item())
