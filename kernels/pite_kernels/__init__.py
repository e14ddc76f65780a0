"""Fused losses, packed attention and LoRA layers for video-language models. Needs torch; Triton on CUDA.

docs/kernels.md shows how to use them in another model; `pite_kernels.reference` has every op in plain PyTorch.
"""

from pite_kernels.attention import packed_attention
from pite_kernels.cross_entropy import FusedLinearCrossEntropyLoss, linear_cross_entropy
from pite_kernels.elementwise import apply_rope, rms_norm, rope_tables, swiglu
from pite_kernels.fp8 import Fp8Weight, quantize_weight
from pite_kernels.lora import lora_linear
from pite_kernels.patching import Patch, pack_batch, patch
from pite_kernels.rope import rope_kv, rope_q, rope_qkv
from pite_kernels.rows import RowIndex, gather_rows, put_rows, row_index, take_rows
from pite_kernels.trajectory import FusedTrajectoryL1Loss, trajectory_l1
from pite_kernels.two_head import two_head_loss

__all__ = [
    "Fp8Weight",
    "FusedLinearCrossEntropyLoss",
    "FusedTrajectoryL1Loss",
    "Patch",
    "RowIndex",
    "apply_rope",
    "gather_rows",
    "linear_cross_entropy",
    "lora_linear",
    "pack_batch",
    "packed_attention",
    "patch",
    "put_rows",
    "quantize_weight",
    "rms_norm",
    "rope_kv",
    "rope_q",
    "rope_qkv",
    "rope_tables",
    "row_index",
    "swiglu",
    "take_rows",
    "trajectory_l1",
    "two_head_loss",
]
