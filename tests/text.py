"""A small tokenizer like Llama's, trained when it is needed."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataloaders.samples.prompts import SYSTEM

CORPUS = [
    f"{SYSTEM} USER: Describe the video in detail. ASSISTANT:",
    "From 00 to 09, a red circle moves right. From 12 to 30, a blue square moves up. It moves left.",
    "In this image there is a yellow circle at the right. During which frames can we see a green triangle?",
]


def llama_like(prepend_scheme: str = "first") -> PreTrainedTokenizerFast:
    """Byte-pair encoding with Metaspace and byte fallback, as in Llama 2. Its versions use `first` or `always`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        CORPUS * 5, trainers.BpeTrainer(vocab_size=520, show_progress=False, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
