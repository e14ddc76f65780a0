"""A training step of the CUDA code at real shapes, without a GPU: no synchronization, memory, launched kernels.

The tensors are fake (`tests.fake_cuda`), so reading a value raises. These tests do not see a copy between host and
device, nor what `engine.loop.train` does around a step; `bench.gpu` measures both on a GPU.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dataloaders.samples.batch import PackedBatch  # noqa: E402
from engine.distributed.gradients import Gradients  # noqa: E402
from engine.layout import count_parameters, memory  # noqa: E402
from engine.loop import backward_order, compute_losses, make_optimizer  # noqa: E402
from engine.recipes import Stage, recipe  # noqa: E402
from pite.config import PiTeConfig  # noqa: E402
from pite.model import PiTe  # noqa: E402
from tests.backbones import published_shape  # noqa: E402
from tests.fake_cuda import fake_cuda  # noqa: E402
from tests.peak_memory import PeakMemory  # noqa: E402


def packed_batch(config: PiTeConfig, rows: int, stage: Stage, head: int = 0) -> PackedBatch:
    """Samples of 216 rows, of which 65 are supervised and 25 have a trajectory, or in stage 1 a point.

    head  rows of a prefix that all of them share, in addition
    """
    tokens, documents = rows, (rows - head) // 216
    frames, targets, placed = documents * config.num_frames, documents * 65, documents * 25
    points = (1, 1) if stage == 1 else (config.num_points, config.num_frames)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64)

    segments, copies = documents + (head > 0), rows + documents * head
    keys = {
        "kv_rows": integers(copies),
        "kv_inverse": integers(copies),
        "kv_offsets": integers(rows + 1),
        "cu_seqlens_kv": integers(segments + 1).int(),
        "max_seqlen_kv": 2048,
    }
    return PackedBatch(
        token_ids=integers(tokens),
        position_ids=integers(tokens).int(),
        cu_seqlens=integers(segments + 1).int(),
        max_seqlen=2048,
        **(keys if head else dict.fromkeys(keys)),
        read_rows=integers(targets),
        num_tokens=rows + documents,
        features=torch.empty(frames, config.vision_feature_size, dtype=torch.float16),
        feature_rows=integers(frames),
        target_ids=integers(targets),
        target_rows=integers(targets),
        trajectory=torch.empty(placed, *points, 2),
        trajectory_rows=integers(placed),
        normalizers=torch.empty(2),
        sample_ids=("a sample",) * documents,
    )


def training_step(
    size: str, tokens: int, *, stage: Stage = 2, recompute: int = 0, fp8: bool = False, head: int = 0
) -> PeakMemory:
    """Bytes of a step of a language model (`published_shape`). AdamW's moments exist from an earlier step."""
    config, recipe_ = published_shape(size), recipe("7b", stage)
    peak = PeakMemory(block=512)
    model = PiTe(config, torch.bfloat16)
    model.add_lora(recipe_.lora_rank, recipe_.lora_alpha)
    if fp8:
        model.quantize()
    model.set_trainable(recipe_.trainable_modules)
    model.decoder.checkpoint_activations(recompute)
    for parameter in model.parameters():
        peak.own(parameter)
    with peak:
        optimizer = make_optimizer(model, recipe_)
        optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        gradients = Gradients(backward_order(model), 1)
        optimizer.step()
        model.cast_lora()
        batch = packed_batch(config, tokens, stage, head)
        before = peak.now
        compute_losses(model, batch, recipe_).total.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in model.trainable()], 1.0)
        optimizer.step()
        model.cast_lora()
        gradients.zero()
    assert peak.now - before < 1e6, "a step leaves nothing behind"
    return peak


@pytest.mark.parametrize(
    ("size", "tokens", "recompute", "fp8", "head"),
    [
        ("7b", 16384, 0, False, 0),
        ("7b", 8192, 0, False, 96),
        ("7b", 8192, 8, True, 35),
        ("13b", 5120, 0, False, 35),
        ("13b", 4096, 40, False, 35),
        ("Qwen3-4B", 8192, 9, True, 35),
        ("Qwen2.5-7B", 8192, 0, False, 35),
    ],
)
def test_the_estimate_is_what_a_step_allocates(size, tokens, recompute, fp8, head, monkeypatch, capsys):
    """Never less, and at most 5% more."""
    config = published_shape(size)
    documents = (tokens - head) // 216
    shares = {"read": documents * 65 / tokens, "copied": documents * head / tokens}
    count = count_parameters(config, recipe("7b", 2))
    needed = memory(config, count, tokens, fp8=fp8, recompute=recompute, **shares).total
    with fake_cuda(monkeypatch):
        counted = training_step(size, tokens, recompute=recompute, fp8=fp8, head=head).peak
    with capsys.disabled():
        print(f"\n{size}, {tokens:,} tokens: {needed / 1e9:.2f} GB estimated, {counted / 1e9:.2f} counted")
    assert 1.0 <= needed / counted <= 1.05


def test_shared_keys_are_kept_once(monkeypatch):
    """Memory grows by the copies of a shared row, not by a second set of k and v."""
    config, rows, head = PiTeConfig.preset("7b"), 8192, 35
    with fake_cuda(monkeypatch):
        separate, shared = (training_step("7b", rows, head=h).peak for h in (0, head))
    copies = (rows - head) // 216 * head
    width = 2 * config.llm.hidden_size * 2  # of k and v, in bytes
    # The last term: the gradients of all copies in the layer whose backward runs.
    assert shared - separate <= copies * width * (config.llm.num_hidden_layers + 2)
    # With half of the rows shared, one more copy of k and v would be twice that.
    assert rows * width > 5 * copies * width


@pytest.mark.parametrize(
    ("fp8", "capabilities", "expected"),
    [
        (
            False,
            (80, 90),
            {
                "rope_rotate_kernel",
                "gather_rows_bwd_kernel",
                "rope_sum_bwd_kernel",
                "trajectory_l1_fwd_kernel",
                "lora_bwd_thin_products_kernel",
            },
        ),
        (True, (90,), {"fp8_quantize_rows_kernel"}),
    ],
)
def test_everything_a_step_launches_compiles(fp8, capabilities, expected, monkeypatch, capsys):
    """The Triton kernels, liger-kernel's included, with the call's own arguments. cuBLAS and attention are excluded."""
    assert not triton.knobs.runtime.interpret, "the interpreter compiles nothing"
    with fake_cuda(monkeypatch) as launches:
        for stage in (1, 2):
            training_step("7b", 16384, stage=stage, recompute=1, fp8=fp8, head=0 if stage == 1 else 35)
    for launch in launches:
        divisible = {(i,): [["tt.divisibility", 16]] for i in launch.divisible}
        source = ASTSource(launch.kernel, dict(launch.types), dict(launch.constants), divisible)
        for capability in capabilities:
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
            assert compiled.asm["cubin"]
    with capsys.disabled():
        print(f"\n{'float8' if fp8 else 'bfloat16'}: {len(launches)} Triton programs compile")
    names = {launch.kernel.fn.__name__ for launch in launches}
    assert names >= {"_fused_add_rms_norm_forward_kernel", "_swiglu_fused_gate_up_backward_kernel"} | expected
