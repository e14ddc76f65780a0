"""Compiles recorded launches and reads the machine code with the tools inside Triton's wheel.

Results are kept in `build/machine_code`, one file per program, named by a hash of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.machine_code.launches import Launch
from dataloaders.files import write_atomically

CACHE = Path(__file__).parents[2] / "build" / "machine_code"
FORMAT = 4  # of the files in the cache; a new number makes old files invalid
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
FMA_PER_CYCLE = {80: 1024, 90: 2048, 100: 4096}
"""Dense half-precision multiply-adds of a multiprocessor's tensor cores per cycle: A100, H100 and H200, B200."""
SHARED_KB = {80: 164, 90: 228, 100: 228}
"""Shared memory of a multiprocessor. A block takes 1 KB more than it declares."""
REGISTERS, THREADS, TENSOR_COLUMNS = 1 << 16, 2048, 512
"""Of a multiprocessor; columns of tensor memory exist on sm_100."""


@dataclass(frozen=True)
class Program:
    """One kernel in one specialisation on one architecture.

    registers per thread; stack bytes per thread, which are spilled registers; shared bytes and blocks that fit on one
    multiprocessor. Of the innermost loop on tensor cores, 0 without one, per K-step: instructions of a warp, and the
    loads from global memory among them: asynchronous ones, and others.
    """

    capability: int
    registers: int
    stack: int
    shared: int
    warps: int
    blocks: int
    instructions: float = 0
    asynchronous_loads: float = 0
    other_loads: float = 0


def compile_launch(launch: Launch, capability: int) -> Any:
    divisible = {(i,): [["tt.divisibility", 16]] for i in launch.divisible}
    source = ASTSource(launch.kernel, dict(launch.types), dict(launch.constants), divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def measure(launch: Launch, capability: int) -> Program:
    """The program of a launch, from the cache or compiled now."""
    described = (
        FORMAT,
        triton.__version__,
        capability,
        launch.kernel.cache_key,
        launch.types,
        launch.constants,
        launch.divisible,
        launch.options,
    )
    path = CACHE / f"{hashlib.sha256(repr(described).encode()).hexdigest()[:32]}.json"
    try:
        return Program(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not there, or written by another version of this file
        pass
    program = _measure(launch, capability)
    CACHE.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(program)))
    return program


def _measure(launch: Launch, capability: int) -> Program:
    compiled = compile_launch(launch, capability)
    warps = compiled.metadata.num_warps
    tensor_columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    usage = _tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack, shared = int(found[1]), int(found[2]), compiled.metadata.shared
    limits = [
        REGISTERS // (-(-registers // 8) * 8 * 32 * warps),
        (SHARED_KB[capability] << 10) // (shared + 1024),
        THREADS // (32 * warps),
        *([TENSOR_COLUMNS // tensor_columns] if tensor_columns else []),
    ]
    # A kernel without K-steps has no such loop, and disassembling it takes as long as compiling it.
    code = disassembled(compiled) if fma_per_step(launch) else ""
    loop = innermost_loop(code, TENSOR_CORES[capability])
    steps = k_steps(loop, launch, warps)
    global_loads = [line for line in loop if re.search(r"\b(LDG|LDGSTS)\b", line)]
    asynchronous = sum("LDGSTS" in line for line in global_loads)
    return Program(
        capability=capability,
        registers=registers,
        stack=stack,
        shared=shared,
        warps=warps,
        blocks=min(limits),
        instructions=len(loop) / steps,
        asynchronous_loads=asynchronous / steps,
        other_loads=(len(global_loads) - asynchronous) / steps,
    )


def wide_accesses(launch: Launch, capability: int) -> int:
    """The accesses to global memory in a program that take 16 bytes."""
    code = disassembled(compile_launch(launch, capability))
    return len(re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.128", code))


def disassembled(compiled: Any) -> str:
    """The machine code of a compiled launch, one instruction a line."""
    return _tool("nvdisasm", "-c", cubin=compiled.asm["cubin"])


def _tool(name: str, option: str, *, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def innermost_loop(code: str, instruction: str) -> list[str]:
    """The instructions of the shortest loop that contains `instruction`.

    Where the assembler has unrolled the whole loop: everything from the first to the last such instruction.
    """
    lines = code.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\S*\s.*`\((\.L_x_\d+)\)", line)
        start = labels.get(branch[1], i) if branch else i
        if start < i and any(f" {instruction}" in each for each in lines[start:i]):
            loops.append(lines[start : i + 1])
    if not loops:
        found = [i for i, line in enumerate(lines) if f" {instruction}" in line]
        loops = [lines[found[0] : found[-1] + 1]] if found else [[]]
    return [line for line in min(loops, key=len) if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line)]


def k_steps(loop: list[str], launch: Launch, warps: int) -> float:
    """K-steps of one turn of a loop, by its multiply-adds; the assembler may have unrolled it."""
    work = 0.0
    for line in loop:
        if m := re.search(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", line):
            work += int(m[1]) * int(m[2]) * int(m[3]) * warps / 4  # by warp group
        elif re.search(r"\bHMMA\.16816", line):
            work += 16 * 8 * 16 * warps
    return work / fma_per_step(launch) if work else 1.0


def fma_per_step(launch: Launch) -> int:
    """Multiply-adds of a K-step of a GEMM kernel; 0 for other kernels."""
    names = dict(launch.constants)
    if "SWEEP" in names:
        return int(names["OWN"] * names["SWEEP"] * names["RANK"])
    return int(names["BLOCK_M"] * names["BLOCK_N"] * names["BLOCK_K"]) if "BLOCK_K" in names else 0


def tensor_share(launch: Launch, program: Program) -> float:
    """Upper bound of the tensor cores' use, in [0, 1]: their cycles per K-step over the warps' issue cycles."""
    if not program.instructions:
        return 0.0
    tensor = fma_per_step(launch) / FMA_PER_CYCLE[program.capability]
    issue = program.instructions * program.warps / 4  # four schedulers issue one instruction each per cycle
    return min(1.0, tensor / issue)
