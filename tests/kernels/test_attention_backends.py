"""Packed attention: the call of each back end, and the trial that chooses one."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from pite_kernels import packed_attention, reference
from pite_kernels.attention import backends, choice
from tests.kernels.helpers import assert_bitwise
from tests.kernels.test_attention import make, make_shared, results


def test_the_error_names_a_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)
    with pytest.raises(ValueError, match="'xformers' is not usable here"):
        packed_attention(*make([3]), backend="xformers")


def flash(recorded):
    def flash_attn_varlen_func(q, k, v, **options):
        recorded.update(options)
        bounds, keys = options["cu_seqlens_q"], options["cu_seqlens_k"]
        longest = options["max_seqlen_q"], options["max_seqlen_k"]
        return good(q, k, v, bounds, keys, *longest, options["causal"], options["softmax_scale"]), None

    return ModuleType("flash_attn_interface"), flash_attn_varlen_func


def old_varlen(recorded):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        recorded.update(is_causal=is_causal)
        return good(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, None)

    return varlen_attn


def new_varlen(recorded):
    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        recorded.update(window_size=window_size, enable_gqa=enable_gqa)
        assert enable_gqa or query.shape[1] == key.shape[1]
        return good(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0), scale)

    return varlen_attn


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("which", ["flash_attn_interface", "varlen_attn, old", "varlen_attn, new", "xformers"])
def test_adapters_match_the_signature_of_each_backend(which, causal, monkeypatch):
    """The back ends need a GPU, their call signatures do not: each fake has the parameters of the real function."""
    recorded: dict[str, object] = {}
    if which == "flash_attn_interface":
        module, function = flash(recorded)
        module.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    elif which == "xformers":

        def infos(kind):
            return lambda q_seqinfo, k_seqinfo: SimpleNamespace(kind=kind, q=q_seqinfo, k=k_seqinfo)

        bias = ModuleType("attn_bias")
        bias._SeqLenInfo = lambda **options: SimpleNamespace(**options)
        bias.BlockDiagonalCausalFromBottomRightMask = infos("causal")
        bias.BlockDiagonalMask = infos("full")
        fmha = ModuleType("fmha")

        def attend(q, k, v, attn_bias, scale):
            q, k, v = (t[0] for t in (q, k, v))
            bounds, longest = zip(*((i.seqstart, i.max_seqlen) for i in (attn_bias.q, attn_bias.k)))
            out = good(q, k, v, *bounds, *longest, attn_bias.kind == "causal", scale)
            return out[None]

        fmha.memory_efficient_attention = attend
        monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)
        monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", bias)
    else:
        fake = ModuleType("varlen")
        fake.varlen_attn = (old_varlen if which.endswith("old") else new_varlen)(recorded)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake)
    monkeypatch.setattr(backends, "_loaded", {})
    inputs, options = make_shared(key_heads=2), {"causal": causal, "scale": 0.3}
    ours = results(*inputs[:5], backend=which.split(",")[0], **inputs[5], **options)
    plain = results(*inputs[:5], function=reference.packed_attention, **inputs[5], **options)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)
    assert recorded.get("causal", causal) == causal


CPU = torch.device("cpu")
KIND = (CPU, torch.bfloat16, 4, 2, 16, True)


@pytest.fixture
def installed(monkeypatch):
    """Fake back ends by name: the only ones that count as installed, for bfloat16 on the CPU."""
    found: dict[str, object] = {}

    def load(name):
        if name not in found:
            raise ValueError(f"no {name}") from ModuleNotFoundError(name)
        return found[name]

    monkeypatch.setattr(backends, "load", load)
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "_KERNEL_DEVICES", ("cpu",))
    return found


def good(q, k, v, of_q, of_k, longest_q, longest_k, causal, scale):
    keys = {"cu_seqlens_kv": of_k, "max_seqlen_kv": longest_k}
    return reference.packed_attention(q, k, v, of_q, longest_q, **keys, causal=causal, scale=scale)


def raises(*_):
    raise RuntimeError("no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")


def lacks_an_argument(q, k, v, of_q, of_k, longest_q, longest_k, causal, scale):
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal):
        return good(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, causal, softmax_scale)

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=of_q,
        cu_seqlens_k=of_k,
        max_seqlen_q=longest_q,
        softmax_scale=scale,
        causal=True,
    )


def one_document(q, k, v, of_q, of_k, longest_q, longest_k, causal, scale):
    ends = (torch.tensor([0, len(t)], dtype=torch.int32) for t in (q, k))
    return good(q, k, v, *ends, len(q), len(k), causal, scale)


def no_mask(*inputs):
    return good(*inputs[:7], False, inputs[8])


def own_scale(*inputs):
    return good(*inputs[:8], None)


def mask_aligned_at_the_start(q, k, v, of_q, of_k, longest_q, longest_k, causal, scale):
    """flash-attn before 2.1, and xformers' BlockDiagonalCausalMask."""
    kept = torch.cat([torch.arange(a, a + n) for a, n in zip(of_k.tolist(), of_q.diff().tolist())])
    return good(q, k[kept], v[kept], of_q, of_q, longest_q, longest_q, causal, scale)


def wrong_beyond_a_tile(q, *inputs):
    out = good(q, *inputs)
    return torch.cat([out[:289], out[289:] * 1.5])


def heads_interleaved(q, k, v, *rest):
    return good(q, k.repeat(1, 2, 1), v.repeat(1, 2, 1), *rest)


def no_number(*inputs):
    return good(*inputs) * float("nan")


def forward_only(*inputs):
    return good(*inputs).detach()


def half_a_gradient(q, k, v, *rest):
    return good(q, k / 2 + k.detach() / 2, v, *rest)


def float32_out(*inputs):
    return good(*inputs).float()


BAD = {
    raises: "RuntimeError: no kernel image is available",
    lacks_an_argument: "TypeError: .*unexpected keyword argument 'max_seqlen_q'",
    one_document: "its output is off by",
    no_mask: "its output is off by",
    own_scale: "its gradient of [qk] is off by|its output is off by",
    heads_interleaved: "its output is off by",
    mask_aligned_at_the_start: "its output is off by",
    wrong_beyond_a_tile: "its output is off by",
    no_number: "its output is off by nan%",
    forward_only: "RuntimeError: .*does not require grad",
    half_a_gradient: "its gradient of k is off by 50%",
    float32_out: "it returns torch.float32",
}


@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_an_installed_backend_that_fails_the_trial_is_skipped(installed, caplog, bad):
    installed.update({"flash_attn.cute": bad, "varlen_attn": good})
    with caplog.at_level("INFO"):
        assert choice.choose_backend(*KIND) == "varlen_attn"
    assert [m for m in caplog.messages if re.match("packed_attention skips flash_attn.cute: (" + BAD[bad] + ")", m)]
    assert caplog.messages[-1] == "packed_attention uses varlen_attn"
    installed.clear()  # the trial runs once
    assert choice.choose_backend(*KIND) == "varlen_attn"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(1, 1, 8), (8, 2, 128), (40, 40, 128)])
def test_the_first_backend_that_works_is_chosen(installed, causal, dtype, heads, key_heads, width):
    installed.update({"flash_attn": good, "varlen_attn": raises})
    assert choice.choose_backend(CPU, dtype, heads, key_heads, width, causal) == "flash_attn"


@pytest.mark.parametrize(
    ("capability", "first"),
    [
        ((8, 0), "flash_attn"),
        ((9, 0), "flash_attn_interface"),
        ((10, 0), "flash_attn.cute"),
        ((12, 0), "flash_attn.cute"),
    ],
)
def test_the_version_of_flash_attn_written_for_the_gpu_comes_first(monkeypatch, capability, first):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    order = backends.by_preference(torch.device("cuda", 0))
    assert order[0] == first and order[3:] == ("xformers", "varlen_attn")
    assert sorted(order) == sorted(backends.BACKENDS[:-1])


def test_deterministic_algorithms_choose_a_backend_of_their_own(installed, caplog):
    """With this mode, which conftest.py sets, a back end passes only if it repeats bitwise."""
    calls = iter(range(100))

    def adds_in_any_order(q, *inputs):
        return good(q, *inputs) * (1 + 0.01 * (next(calls) % 2))

    installed.update({"flash_attn": adds_in_any_order, "varlen_attn": good})
    assert choice.choose_backend(*KIND) == "varlen_attn"
    assert "flash_attn: its results do not repeat" in caplog.text
    torch.use_deterministic_algorithms(False)
    assert choice.choose_backend(*KIND) == "flash_attn"


def test_flash_attn_gets_the_deterministic_mode(monkeypatch):
    recorded: dict[str, object] = {}
    module, function = flash(recorded)
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setattr(backends, "_loaded", {})
    packed_attention(*make([3, 5]), backend="flash_attn_interface")
    assert recorded["deterministic"] is True
    torch.use_deterministic_algorithms(False)
    packed_attention(*make([3, 5]), backend="flash_attn_interface")
    assert recorded["deterministic"] is False


def test_falls_back_to_sdpa_if_nothing_works_or_no_kernel_supports_the_inputs(installed, caplog):
    installed["xformers"] = raises
    assert choice.choose_backend(*KIND) == "sdpa"
    assert "copies the document boundaries to the host" in caplog.text
    installed["flash_attn"] = good
    assert choice.choose_backend(CPU, torch.float32, 4, 2, 16) == "sdpa"
    assert choice.choose_backend(torch.device("cuda", 0), torch.bfloat16, 4, 2, 16) == "sdpa"
    assert choice.choose_backend(CPU, torch.bfloat16, 4, 2, 32) == "flash_attn"


def test_a_failed_import_is_a_warning_and_a_missing_package_is_not(monkeypatch, caplog):
    def undefined_symbol(name):
        if name == "flash_attn":
            raise ImportError("flash_attn_2_cuda.so: undefined symbol")
        if name == "flash_attn.cute":
            raise RuntimeError("no driver")
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(backends, "import_module", undefined_symbol)
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(backends, "_loaded", {})
    monkeypatch.setattr(choice, "_KERNEL_DEVICES", ("cpu",))
    assert choice.choose_backend(*KIND) == "sdpa"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'flash_attn.cute' is not usable here: no driver" in warnings[0]
    assert "undefined symbol" in warnings[1]
    assert len(warnings) == 3  # the third: the fallback to SDPA


@pytest.mark.parametrize("surrounding", ["no_grad", "inference_mode", "autocast", "checkpoint", "fake tensors"])
def test_the_trial_ignores_the_modes_of_the_caller(installed, surrounding):
    installed["varlen_attn"] = good
    torch.manual_seed(3)
    state = torch.get_rng_state()
    inputs = make([9, 14, 3], torch.bfloat16, key_heads=2)
    if surrounding == "checkpoint":
        again = lambda q, k, v: packed_attention(q, k, v, *inputs[3:]) * 2  # noqa: E731
        out = checkpoint(again, *inputs[:3], use_reentrant=False)
        expected = results(*inputs, function=lambda *t, **o: reference.packed_attention(*t, **o) * 2)
        upstream = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
        assert_bitwise([out.detach(), *torch.autograd.grad(out, inputs[:3], upstream)], expected)
    else:
        modes = {
            "no_grad": torch.no_grad(),
            "inference_mode": torch.inference_mode(),
            "autocast": torch.autocast("cpu", torch.float16),
            "fake tensors": FakeTensorMode(),
        }
        with modes[surrounding]:
            assert choice.choose_backend(CPU, torch.bfloat16, 4, 2, 8) == "varlen_attn"
    assert list(choice._chosen.values()) == ["varlen_attn"]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_trial_can_run_while_torch_compile_traces(installed):
    installed.update({"flash_attn": raises, "varlen_attn": good})
    inputs = make([9, 14, 3], torch.bfloat16, key_heads=2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def which(q, k):
        return q * ["flash_attn", "varlen_attn", "sdpa"].index(
            choice.choose_backend(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2])
        )

    assert torch.equal(which(*inputs[:2]), inputs[0])
    assert list(choice._chosen.values()) == ["varlen_attn"]
    assert torch.equal(which(*inputs[:2]), inputs[0])


def test_a_chosen_backend_compiles_without_a_graph_break(monkeypatch):
    def attend(q, k, v, of_q, of_k, longest_q, longest_k, causal, scale):
        return q * scale + k + v * longest_q

    monkeypatch.setattr(backends, "_loaded", {"varlen_attn": attend})
    monkeypatch.setattr(choice, "_chosen", {(CPU, torch.bfloat16, 4, 4, 8, True, True): "varlen_attn"})
    monkeypatch.setattr(choice, "_KERNEL_DEVICES", ("cpu",))
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    for lengths in ([9, 14, 3], [4, 7], [20, 1]):  # lengths become symbolic
        inputs = make(lengths, torch.bfloat16)
        assert_bitwise(results(*inputs), results(*inputs, function=compiled))
