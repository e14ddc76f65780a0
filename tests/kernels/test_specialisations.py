"""What the Triton kernels compile to, in the specialisations that are launched. No GPU is needed.

`bench.machine_code.shapes` has the calls. The first run compiles for about a minute; later ones read the results of
unchanged kernels from `build/machine_code`.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

from bench.machine_code import programs  # noqa: E402
from bench.machine_code.launches import Launch, recorded_launches  # noqa: E402
from bench.machine_code.programs import SHARED_KB, Program, fma_per_step, measure, tensor_share, wide_accesses  # noqa: E402
from bench.machine_code.shapes import CALLS, TESTED, all_launches, call_trajectory, is_float8  # noqa: E402
from pite_kernels.gpu import trajectory_kernels  # noqa: E402


@pytest.fixture(scope="module")
def launches() -> dict[Launch, str]:
    assert not triton.knobs.runtime.interpret, "the interpreter does not compile"
    return all_launches(TESTED)


def of_call(name: str, kernel: str) -> Launch:
    with recorded_launches() as found:
        CALLS[name]()
    return next(launch for launch in found if launch.name == kernel)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_spills(capability, launches):
    broken = []
    for launch, call in launches.items():
        if is_float8(launch) and capability < 89:
            continue
        program = measure(launch, capability)
        name = f"sm_{capability} {launch.name} ({call})"
        half = dict(launch.types).get("weight_ptr", dict(launch.types).get("grad_ptr")) in ("*bf16", "*fp16")
        if program.stack:
            broken.append(f"{name}, {program.stack} bytes spilled")
        if program.shared > (SHARED_KB[capability] - 1) << 10:
            broken.append(f"{name}, {program.shared} bytes of shared memory")
        if half and fma_per_step(launch) and not program.instructions:
            broken.append(f"{name}, does not use tensor cores")
    assert not broken


@pytest.mark.parametrize("outputs", [600, 200, 1000])
@pytest.mark.parametrize(("kernel", "blocks"), [("fwd_kernel", 1), ("bwd_dx_kernel", 2), ("bwd_dw_kernel", 2)])
def test_trajectory_kernels_keep_hoppers_tensor_cores_busy(outputs, kernel, blocks):
    """The warps issue fewer instructions than a K-step takes on the tensor cores, and no load waits for memory."""
    launch = of_call(f"bfloat16, {outputs} outputs", f"trajectory_l1_{kernel}")
    program = measure(launch, 90)
    assert tensor_share(launch, program) == 1, program
    assert program.other_loads < 1 and program.asynchronous_loads > 0, program
    assert program.blocks >= blocks, program


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_logits_move_16_bytes_at_a_time_for_any_vocabulary(capability):
    even, odd = (
        wide_accesses(of_call(f"bfloat16, vocabulary {v}", "cross_entropy_softmax_kernel"), capability)
        for v in (32000, 32003)
    )
    assert odd == even > 0


def test_one_program_for_any_number_of_rows():
    """Triton would compile another kernel for counts divisible by 16, in the middle of training."""
    variants = []
    for rows in (1, 16, 4093, 4096):
        with recorded_launches() as found:
            call_trajectory(torch.bfloat16, 600, rows=rows)
        variants.append({launch for launch in found if "fwd" not in launch.name})
    assert variants[0] == variants[1] == variants[2] == variants[3]


def test_results_are_kept_by_source_and_specialisation(tmp_path, monkeypatch):
    compiled: list[Launch] = []

    def fake(launch: Launch, capability: int) -> Program:
        compiled.append(launch)
        return Program(capability, 32, 0, 0, 4, 16)

    monkeypatch.setattr(programs, "CACHE", tmp_path / "new" / "folder")
    monkeypatch.setattr(programs, "_measure", fake)
    launch = of_call("bfloat16, 2 outputs", "trajectory_l1_bwd_link_rows_kernel")
    assert measure(launch, 90) == measure(launch, 90) and len(compiled) == 1
    measure(launch, 80)
    monkeypatch.setattr(trajectory_kernels.trajectory_l1_bwd_link_rows_kernel, "hash", "of another source")
    measure(launch, 90)
    assert len(compiled) == 3, "another architecture and another source are compiled"
    for file in programs.CACHE.iterdir():
        file.write_text("{")
    measure(launch, 90)
    assert len(compiled) == 4, "a damaged file is replaced"
