"""Text generation: KV-cached decoding with transformers' `generate`, on the weights of the packed decoder.

Training needs no cache and `generate` needs no packing, so each uses its own module: a Llama is built around the
model's frozen weights, without a copy. A LoRA stays a separate term, computed by the same operator as in training:
merged into bfloat16 weights, half of a small update would be lost in rounding (docs/training.md, "Merging and
rounding").
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from dataloaders.formats.fields import clean_question
from dataloaders.records import TokenizedSample
from dataloaders.samples.batch import collate
from dataloaders.samples.prompts import prompt_ids
from pite import checkpoint, devices, names
from pite.checkpoint import from_pretrained
from pite.decoder import LoRALinear
from pite.model import PiTe
from pite.tokenizers import check_vocabulary, load_tokenizer
from pite_kernels import lora_linear

log = logging.getLogger(__name__)


def language_model(model: PiTe) -> LlamaForCausalLM:
    """A transformers LlamaForCausalLM that computes the same as `model`, with its LoRA, in evaluation mode.

    It shares the model's weights. Do not save it: Llama's file format has no LoRA tensors.
    """
    llama = frozen_language_model(model)
    for prefix, linear, parts in names.linear_layers(model):
        if linear.lora_a is not None:
            for part, projection in zip(parts, LoRAProjection.of(linear)):
                llama.set_submodule(prefix + part, projection)
    return llama.eval()


def frozen_language_model(model: PiTe) -> LlamaForCausalLM:
    """A transformers LlamaForCausalLM around the model's frozen weights only, in evaluation mode, without a copy."""
    with torch.device("meta"):
        # A copy, because transformers stores the choice of attention and other things in the configuration.
        config = deepcopy(model.config.llm)
        # The padding token is unused, and transformers refuses one beyond the vocabulary. The other two would shorten
        # the cache, but attention is over the whole sequence (`PiTeConfig` refuses them when they have an effect).
        for name in ("pad_token_id", "sliding_window", "attention_chunk_size"):
            setattr(config, name, None)
        llama = LlamaForCausalLM(config)
    tied = model.lm_head is None
    llama.load_state_dict(names.language_model_tensors(model), strict=not tied, assign=True)
    if tied:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    llama.model.rotary_emb = model.decoder.rotary_embedding.to(model.device)
    return llama.eval().requires_grad_(False)


class LoRAProjection(nn.Module):
    """One projection of a fused layer with its LoRA: (..., in) -> (..., out), x W' + scale (x A') B'.

    It uses the operator of training. The weight is a view of the model's weight. A and B are stored in the weight's
    dtype: training rounds them to it at each use, so the results are equal.
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("weight", weight)
        self.register_buffer("lora_a", lora_a.to(weight.dtype))
        self.register_buffer("lora_b", lora_b.to(weight.dtype))

    @staticmethod
    def of(linear: LoRALinear) -> list[LoRAProjection]:
        """The projections of a fused layer, in order."""
        assert linear.lora_a is not None and linear.lora_b is not None
        halves = linear.lora_a.data.chunk(len(linear.splits)), linear.lora_b.data.split(linear.splits)
        weights = linear.weight.data.split(linear.splits)
        return [LoRAProjection(weight, a, b, linear.scale) for weight, a, b in zip(weights, *halves)]

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.lora_a, self.lora_b, scale=self.scale)


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text and its tokens, without `</s>`."""

    text: str
    token_ids: tuple[int, ...]


class Generator:
    """Batched question answering about encoded videos.

    model       PiTe; its weights are shared, and its LoRA stays separate
    tokenizer   a fast tokenizer with BOS and EOS
    """

    _warned = False

    def __init__(self, model: PiTe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.llama = language_model(model)

    @staticmethod
    def from_pretrained(directory: Path | str, device: str = "cpu") -> Generator:
        """Load a model and its tokenizer from one directory or Hugging Face name; bfloat16 on CUDA, float32 on the CPU.

        device  "cpu", "cuda", "cuda:1" or "auto"
        Raises ValueError naming what is missing.
        """
        directory, place = checkpoint.resolve(directory), devices.resolve(device)
        model = from_pretrained(directory, devices.dtype(place), str(place))
        return Generator(model, load_tokenizer(directory))

    @torch.inference_mode()
    def answer(
        self,
        questions: Sequence[str],
        features: Sequence[np.ndarray],
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
    ) -> list[Answer]:
        """Answer one question per feature record (num_frames, C); greedy at temperature 0.

        Prompts are padded on the left, so a question gets the same answer in a batch as alone. An answer ends where the
        language model's context does. Raises ValueError for a prompt that leaves no room for an answer.
        """
        embeddings = [self._embed(question, record) for question, record in zip(questions, features, strict=True)]
        longest = max(len(e) for e in embeddings)
        room = [self.room(len(e), max_new_tokens) for e in embeddings]
        inputs = torch.zeros(len(embeddings), longest, self.model.config.llm.hidden_size, dtype=self.model.dtype)
        inputs = inputs.to(self.model.device)
        for i, embedding in enumerate(embeddings):
            inputs[i, longest - len(embedding) :] = embedding
        mask = left_padding([len(e) for e in embeddings], self.model.device)
        return self.complete(room, temperature, inputs_embeds=inputs, attention_mask=mask)

    @torch.inference_mode()
    def complete(self, room: Sequence[int], temperature: float = 0.0, **inputs: Any) -> list[Answer]:
        """The answers that follow a batch of prompts, each of at most `room` tokens; greedy at temperature 0.

        inputs  of transformers' `generate`: `inputs_embeds`, or `input_ids` with `past_key_values`; `attention_mask`
        """
        end = self.tokenizer.eos_token_id
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=max(room),
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
            use_cache=True,
            **sampling,
        )
        generated = self.llama.generate(**inputs, generation_config=settings)
        if "input_ids" in inputs:
            generated = generated[:, inputs["input_ids"].shape[1] :]
        answers = []
        for ids, most in zip(generated.tolist(), room, strict=True):
            # A longer prompt of the batch was continued beyond its context.
            ids = ids[:most]
            ids = ids[: ids.index(end)] if end in ids else ids
            answers.append(Answer(self.tokenizer.decode(ids, skip_special_tokens=True).strip(), tuple(ids)))
        return answers

    @torch.inference_mode()
    def trajectories(self, question: str, record: np.ndarray, answer: Answer) -> Tensor:
        """Trajectory that the head predicts for each token of an answer: (L, P, N, 2) on the CPU."""
        prompt, frame_start = self.prompt(question, len(record))
        ids = np.concatenate([prompt, np.array(answer.token_ids, dtype=np.int64)])
        none = np.zeros(0, dtype=np.int64)
        config = self.model.config
        sample = TokenizedSample(
            id="answer",
            media="",
            token_ids=ids,
            frame_start=frame_start,
            num_frames=len(record),
            target_positions=np.arange(len(prompt), len(ids)),
            trajectory_positions=none,
            trajectory=np.zeros((0, config.num_points, config.num_frames, 2), dtype=np.float32),
        )
        batch = collate([sample], [record]).to(self.model.device)
        hidden = self.model.hidden_states(batch)[batch.target_rows]
        return self.model.predict(hidden, "trajectory").cpu()

    def check_question(self, question: str, num_frames: int) -> None:
        """Raise ValueError for a question that `answer` would refuse, before anything is computed."""
        self.prompt(question, num_frames)

    def room(self, prompt: int, wanted: int) -> int:
        """Number of tokens that an answer may have, for a prompt of `prompt` tokens; warns once if it is not `wanted`."""
        room = min(self.model.config.context_length - prompt, wanted)
        if room < wanted and not self._warned:
            self._warned = True
            log.warning(
                "answers are limited to %s instead of %s tokens, because prompt and answer have to fit in the %s positions "
                "that the language model was trained on (max_position_embeddings)",
                *(f"{number:,}" for number in (room, wanted, self.model.config.context_length)),
            )
        return room

    def prompt(self, question: str, num_frames: int) -> tuple[np.ndarray, int]:
        """As `prompt_ids`, of the question without media tag and `</s>`, as in training.

        Raises ValueError for a question without text, for tokens that the model lacks, and for a prompt that fills its
        context.
        """
        try:
            cleaned = clean_question(question)
        except ValueError as error:
            raise ValueError(f"the question {question!r}: {error}") from None
        if not cleaned:
            raise ValueError(f"the question {question!r} holds no text: give a question about the video")
        ids, frame_start = prompt_ids(cleaned, self.tokenizer, num_frames)
        config = self.model.config
        check_vocabulary(int(ids.max()), self.tokenizer, config.llm.vocab_size, f"the question {question!r}")
        if len(ids) >= config.context_length:
            raise ValueError(
                f"the prompt of the question {question!r} has {len(ids):,} tokens, {num_frames} of them frames, and leaves "
                f"no room for an answer in the {config.context_length:,} positions that the language model was trained on "
                "(max_position_embeddings): give a shorter question, or a model with a longer context"
            )
        return ids, frame_start

    def _embed(self, question: str, record: np.ndarray) -> Tensor:
        ids, frame_start = self.prompt(question, len(record))
        device = self.model.device
        rows = torch.arange(frame_start, frame_start + len(record), device=device)
        return self.model.embed(torch.from_numpy(ids).to(device), torch.from_numpy(record).to(device), rows)


def left_padding(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The attention mask (B, L) of sequences that are padded on the left: 0 at the padding, 1 elsewhere."""
    positions = torch.arange(max(lengths), device=device)
    padding = max(lengths) - torch.tensor(lengths, device=device)
    return (positions >= padding[:, None]).long()
