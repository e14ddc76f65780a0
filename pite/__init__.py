"""PiTe: CLIP encoder, adapter, packed decoder with LoRA, heads, checkpoints, chat and evaluation."""
