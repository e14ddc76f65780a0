"""Fused losses, packed attention and LoRA layers for video-language models. Needs torch; Triton on CUDA.

docs/kernels.md shows how another model adopts them; `kernels.reference` has every op in plain PyTorch.
"""

from importlib.metadata import distributions

if any(distributions(name="kernels")):
    raise ImportError(
        "another distribution named `kernels` (Hugging Face's) is installed, and transformers would take this package "
        "for it: run `pip uninstall kernels`, which transformers does without"
    )

from kernels.attention import packed_attention
from kernels.cross_entropy import FusedLinearCrossEntropyLoss, linear_cross_entropy
from kernels.elementwise import apply_rope, rms_norm, rope_tables, swiglu
from kernels.fp8 import Fp8Weight, quantize_weight
from kernels.lora import lora_linear
from kernels.rope import rope_qkv
from kernels.trajectory import FusedTrajectoryL1Loss, trajectory_l1
from kernels.two_head import two_head_loss

__all__ = [
    "Fp8Weight",
    "FusedLinearCrossEntropyLoss",
    "FusedTrajectoryL1Loss",
    "apply_rope",
    "linear_cross_entropy",
    "lora_linear",
    "packed_attention",
    "quantize_weight",
    "rms_norm",
    "rope_qkv",
    "rope_tables",
    "swiglu",
    "trajectory_l1",
    "two_head_loss",
]
