"""The sections of a GPU session, in order of value, with their estimated lengths (docs/gpu.md). Imports no torch."""

from __future__ import annotations

from bench.gpu.session import Section

PRELOAD = ("bench.gpu.sections",)
"""What the sections' processes import before they are forked."""

ENVIRONMENT = Section("environment", "bench.gpu.sections:describe_device", 20, 10, "device and versions")

SECTIONS = (
    Section(
        "smoke", "bench.gpu.sections:smoke", 45, 10, "every kernel once at 7B's shapes, against PyTorch in float64"
    ),
    Section(
        "step_7b",
        "bench.gpu.sections:step_7b",
        160,
        20,
        "7B step alone on the device: the loop, bf16, nothing shared, fp8",
    ),
    Section(
        "trace_7b",
        "bench.gpu.sections:trace_7b",
        45,
        10,
        "profile of one 7B step: idle share of the device, time by kernel",
    ),
    Section("kernels", "bench.gpu.sections:kernels", 90, 15, "our kernels, and the bare GEMMs of LoRA"),
    Section("peers_7b", "bench.gpu.sections:peers_7b", 140, 20, "7B step of transformers + peft: packed, padded"),
    Section("step_13b", "bench.gpu.sections:step_13b", 140, 15, "13B step alone on the device"),
    Section("compiled_7b", "bench.gpu.sections:compiled_7b", 100, 30, "7B step with torch.compile"),
    Section("tiles", "bench.gpu.sections:tiles", 90, 5, "tile sizes of the trajectory kernels"),
    Section("tests", "bench.gpu.sections:triton_tests", 200, 15, "the Triton tests on the device"),
    Section("kernel_peers", "bench.gpu.sections:kernel_peers", 420, 60, "our kernels and every installed peer in turn"),
    Section("unsloth_7b", "bench.gpu.sections:unsloth_7b", 100, 5, "7B step of unsloth"),
)
