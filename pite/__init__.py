"""PiTe: CLIP encoder, adapter, packed decoder with LoRA, heads, checkpoints, chat and evaluation."""

import dataloaders  # noqa: F401  (sets how OpenMP threads wait, before torch is imported)
