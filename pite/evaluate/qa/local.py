"""A judge that is a Hugging Face model in a local directory. It answers greedily, so the same prompt gets the same reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataloaders.errors import reason
from pite.evaluate.qa.prompts import Prompt

MAX_NEW_TOKENS = 64
BATCH = 8


class LocalJudge:
    """A causal language model of transformers in `directory`, on `device`.

    The name, a part of the cache's keys, is the directory's own. Raises ValueError if it holds no such model.
    """

    rounds = 1

    def __init__(self, directory: Path, device: str) -> None:
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"--judge-model {directory} has no config.json: give a model's folder, or --judge-url as well"
            )
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name = f"local:{directory.resolve().name}"
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, padding_side="left")
            model: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"--judge-model {directory} holds no causal language model of transformers: {reason(error)}"
            ) from None
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = model.to(device).eval()

    def replies(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, str | None]]:
        """(Index of a prompt, reply), in batches of prompts of about one length."""
        texts = [self._text(prompt) for prompt in prompts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            yield from zip(batch, self._generate([texts[i] for i in batch]), strict=True)

    def _text(self, prompt: Prompt) -> str:
        if self._tokenizer.chat_template is None:
            return f"{prompt.system}\n\n{prompt.user}\n\nReply: "
        text: str = self._tokenizer.apply_chat_template(prompt.messages, tokenize=False, add_generation_prompt=True)
        return text

    def _generate(self, texts: list[str]) -> list[str]:
        import torch

        # A chat template writes the special tokens itself.
        special = self._tokenizer.chat_template is None
        inputs = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special)
        inputs = inputs.to(self._model.device)
        with torch.inference_mode():
            output = self._model.generate(
                **inputs,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        replies: list[str] = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return replies
