"""The elementwise kernels compile without register spills; `test_specialisations.py` has the others. No GPU is needed."""

import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pite_kernels.fp8 import LARGEST  # noqa: E402
from pite_kernels.gpu import fp8, rope, rows, shared  # noqa: E402

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that one program may use
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def quantize_rows(dtype, width):
    signature = [TYPES[dtype], "*fp8e4nv", "*fp32", "i32", "i32", "fp32"]
    return fp8.fp8_quantize_rows_kernel, signature, {"LARGEST": LARGEST} | fp8.tiles(width)


def rotate(dtype, width, back, gathered=False):
    x = TYPES[dtype]
    signature = [x, x, x, x, "*i64" if gathered else None, *["i32"] * 8]
    return rope.rope_rotate_kernel, signature, {"BACK": back} | rope.tiles(width // 2)


def sum_rows(dtype, width):
    x = TYPES[dtype]
    return rows.gather_rows_bwd_kernel, [x, "*i64", "*i64", x, "i32", "i32"], rows.tiles(width)


def sum_and_rotate(dtype, heads, width):
    x, pairs = TYPES[dtype], heads * width // 2
    signature = [x, "*i64", "*i64", x, x, x, "i32", "i32", "i32"]
    return rope.rope_sum_bwd_kernel, signature, {"HALF": width // 2} | rope.sum_tiles(pairs)


VARIANTS = {
    **{f"quantize rows {d}": quantize_rows(d, 4096) for d in TYPES},
    **{f"rotate {d}": rotate(d, 128, False) for d in TYPES},
    "rotate bfloat16, back": rotate(torch.bfloat16, 128, True),
    "rotate bfloat16, heads of 64": rotate(torch.bfloat16, 64, False),
    "rotate bfloat16, into copies": rotate(torch.bfloat16, 128, False, True),
    **{f"sum of copies {d}": sum_rows(d, 4096) for d in TYPES},
    "sum of copies bfloat16, one key head": sum_rows(torch.bfloat16, 128),
    **{f"sum and rotate {d}": sum_and_rotate(d, 32, 128) for d in TYPES},
    "sum and rotate bfloat16, one head of 64": sum_and_rotate(torch.bfloat16, 1, 64),
}


def compile_kernel(kernel, types, options, capability):
    """The compiled kernel. Pointers and integers are divisible by 16, as with torch's allocator and the real shapes."""
    options = dict(options)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    arguments = list(zip(kernel.arg_names, types))
    constants = options | {name: None for name, kind in arguments if kind is None}
    signature = {name: kind or "constexpr" for name, kind in arguments} | dict.fromkeys(options, "constexpr")
    divisible = {(i,): [["tt.divisibility", 16]] for i, (_, kind) in enumerate(arguments) if kind and kind != "fp32"}
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch | shared.FUSION)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_spills(capability, tmp_path, capsys):
    assert not triton.knobs.runtime.interpret, "the interpreter does not compile"
    lines = []
    for name, (kernel, types, options) in VARIANTS.items():
        if kernel is fp8.fp8_quantize_rows_kernel and capability < 89:
            continue
        compiled = compile_kernel(kernel, types, options, capability)
        ptx = tmp_path / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        architecture = re.search(r"\.target (\w+)", compiled.asm["ptx"]).group(1)
        command = [get_ptxas(capability).path, "-v", f"-arch={architecture}", ptx, "-o", tmp_path / "kernel.cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = int(re.search(r"Used (\d+) registers", report).group(1))
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
        lines.append(
            f"sm_{capability} {name}: {registers} registers, {compiled.metadata.shared} bytes shared, {spilled} spilled"
        )
        assert spilled == 0, lines[-1]
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], lines[-1]
    with capsys.disabled():
        print("", *lines, sep="\n")
