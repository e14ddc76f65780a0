"""Text generation: KV-cached decoding with transformers' `generate`, on the weights of the packed decoder.

Training needs no cache and `generate` needs no packing, so each uses its own module: transformers' is built around the
model's frozen weights, without a copy. A LoRA stays a separate term, computed by the same operator as in training:
merged into bfloat16 weights, half of a small update would be lost in rounding (docs/training.md, "Merging and
rounding").
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from dataloaders.formats.fields import clean_question
from dataloaders.records import Turn
from dataloaders.samples import marked
from dataloaders.samples.layouts import end_ids
from dataloaders.samples.prompts import prompt_ids
from pite import checkpoint, devices, names
from pite.checkpoint import from_pretrained
from pite.decoder import LoRALinear
from pite.model import PiTe
from pite.tokenizers import check_vocabulary, load_tokenizer
from pite_kernels import lora_linear

log = logging.getLogger(__name__)

_TOP_K = 50
"""Tokens to choose from at a temperature above 0: the default of `generate`."""


def language_model(model: PiTe) -> Any:
    """transformers' language model, such as LlamaForCausalLM, that computes the same as `model`, with its LoRA.

    It is in evaluation mode and shares the model's weights. Do not save it: its file format has no LoRA tensors.
    """
    llama = frozen_language_model(model)
    for prefix, linear, parts in names.linear_layers(model):
        if linear.lora_a is not None:
            for part, projection in zip(parts, LoRAProjection.of(linear)):
                llama.set_submodule(prefix + part, projection)
    return llama.eval()


def frozen_language_model(model: PiTe) -> Any:
    """transformers' language model around the model's frozen weights only, in evaluation mode, without a copy."""
    with torch.device("meta"):
        # A copy, because transformers stores the choice of attention and other things in the configuration.
        config = deepcopy(model.config.llm)
        # The padding token is unused, and transformers refuses one beyond the vocabulary. The windows would shorten the
        # cache, but attention is over the whole sequence (`PiTeConfig.context_length`).
        for name in ("pad_token_id", "sliding_window", "attention_chunk_size"):
            setattr(config, name, None)
        if hasattr(config, "layer_types"):
            config.layer_types = ["full_attention"] * config.num_hidden_layers
        llama: Any = getattr(transformers, model.config.architecture.model)(config)
    tied = model.lm_head is None
    llama.load_state_dict(names.language_model_tensors(model), strict=not tied, assign=True)
    if tied:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    llama.model.rotary_emb = model.decoder.rotary_embedding.to(model.device)
    return llama.eval().requires_grad_(False)


class LoRAProjection(nn.Module):
    """One projection of a fused layer with its LoRA: (..., in) -> (..., out), x W' + b + scale (x A') B'.

    It uses the operator of training. Weight and bias are views of the model's. A and B are stored in the weight's
    dtype: training rounds them to it at each use, so the results are equal.
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("lora_a", lora_a.to(weight.dtype))
        self.register_buffer("lora_b", lora_b.to(weight.dtype))

    @staticmethod
    def of(linear: LoRALinear) -> list[LoRAProjection]:
        """The projections of a fused layer, in order."""
        assert linear.lora_a is not None and linear.lora_b is not None
        halves = linear.lora_a.data.chunk(len(linear.splits)), linear.lora_b.data.split(linear.splits)
        weights = linear.weight.data.split(linear.splits)
        biases = [None] * len(weights) if linear.bias is None else linear.bias.data.split(linear.splits)
        return [LoRAProjection(*each, linear.scale) for each in zip(weights, biases, *halves)]

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.lora_a, self.lora_b, scale=self.scale, bias=self.bias)


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text and its tokens, without the one that ends it."""

    text: str
    token_ids: tuple[int, ...]


class Generator:
    """Batched question answering about encoded videos.

    model       PiTe; its weights are shared, and its LoRA stays separate
    tokenizer   a fast tokenizer with a layout of conversations (`dataloaders.samples.layouts`)
    """

    _warned = False

    def __init__(self, model: PiTe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._ends = end_ids(tokenizer)
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
        transcripts: Sequence[str | None] | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
    ) -> list[Answer]:
        """Answer one question per feature record (num_frames, C); greedy at temperature 0.

        transcripts  of the videos' sound, one for each question, for a family whose prompts have one

        Prompts are padded on the left, so a question gets the same answer in a batch as alone. An answer ends where the
        language model's context does. Raises ValueError for a prompt that leaves no room for an answer.
        """
        embeddings = [
            self.embed(*self.prompt(question, len(record), (), transcript), record)
            for question, record, transcript in zip(
                questions, features, transcripts or [None] * len(questions), strict=True
            )
        ]
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
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        settings = GenerationConfig(
            max_new_tokens=max(room),
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=list(self._ends),
            pad_token_id=self._ends[0],
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
            end = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
            answers.append(self.decoded(ids[:end]))
        return answers

    @torch.inference_mode()
    def tokens(
        self, embeddings: Tensor, cache: DynamicCache, room: int, temperature: float = 0.0
    ) -> Iterator[tuple[int, Tensor]]:
        """The tokens of one answer, at most `room`, as they are made: each with the hidden state (d,) that predicts it.

        At temperature 0 they are those of `answer`. An iterator, because a reader of a stream can stop it at any token.
        embeddings  (T, d) of the rows of the prompt that `cache` does not hold, at least one
        cache       grows in place: the prompt, and the tokens but the last
        """
        inputs = embeddings[None]
        for _ in range(room):
            output = self.llama.model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
            hidden = output.last_hidden_state[:, -1:]
            token = _choose(self.llama.lm_head(hidden)[0, -1].float(), temperature)
            if token in self._ends:
                return
            yield token, hidden[0, 0]
            inputs = self.llama.model.embed_tokens(torch.tensor([[token]], device=self.model.device))

    @torch.inference_mode()
    def trajectories(self, hidden: Sequence[Tensor]) -> np.ndarray:
        """Trajectories (L, P, N, 2) that the head predicts from the hidden states (d,) of L tokens."""
        config = self.model.config
        if not hidden or config.choices.marks:
            return np.zeros((0, config.num_points, config.num_frames, 2), dtype=np.float32)
        return self.model.predict(torch.stack(list(hidden)), "trajectory").cpu().numpy()

    def decoded(self, ids: Sequence[int]) -> Answer:
        """The answer of its token ids."""
        return Answer(self.tokenizer.decode(list(ids), skip_special_tokens=True).strip(), tuple(ids))

    def check_question(self, question: str, num_features: int) -> None:
        """Raise ValueError for a question that `answer` would refuse, before anything is computed."""
        self.prompt(question, num_features)

    def room(self, prompt: int, wanted: int) -> int:
        """Number of tokens that an answer may have, for a prompt of `prompt` tokens; warns once if it is not `wanted`."""
        room = min(self.model.config.context_length - prompt, wanted)
        if room < wanted and not self._warned:
            self._warned = True
            log.warning(
                "answers are limited to %s instead of %s tokens, because prompt and answer have to fit in %s",
                *(f"{room:,}", f"{wanted:,}", self.model.config.context),
            )
        return room

    def ids(
        self, text: str, num_features: int, earlier: Sequence[Turn] = (), transcript: str | None = None
    ) -> tuple[np.ndarray, int]:
        """The prompt of a cleaned question about `num_features` rows, in the layout of the model's family.

        transcript  of the video's sound, for a family whose prompts have one
        """
        marks = self.model.config.marks()
        if marks is None:
            return prompt_ids(text, self.tokenizer, num_features, earlier)
        marks = replace(marks, num_features=num_features)
        return marked.prompt_ids(text, self.tokenizer, marks, earlier, transcript=transcript)

    def prompt(
        self, question: str, num_features: int, earlier: Sequence[Turn] = (), transcript: str | None = None
    ) -> tuple[np.ndarray, int]:
        """As `ids`, of the question without media tag and `</s>`, as in training.

        Raises ValueError as `cleaned`, for tokens that the model lacks, and for a prompt that fills its context.
        """
        ids, frame_start = self.ids(cleaned(question), num_features, earlier, transcript)
        config = self.model.config
        check_vocabulary(int(ids.max()), self.tokenizer, config.llm.vocab_size, f"the question {question!r}")
        if len(ids) >= config.context_length:
            raise ValueError(
                f"the prompt of the question {question!r} has {len(ids):,} tokens, {num_features} of them frames, and leaves "
                f"no room for an answer in {config.context}: give a shorter question, or a model with a longer context"
            )
        return ids, frame_start

    def embed(self, ids: np.ndarray, frame_start: int, record: np.ndarray) -> Tensor:
        """Input embeddings (n, d) of a prompt's `ids` (n,), with the features (N, C) of its frames."""
        device = self.model.device
        rows = torch.arange(frame_start, frame_start + len(record), device=device)
        return self.model.embed(torch.from_numpy(ids).to(device), torch.from_numpy(record).to(device), rows)


def cleaned(question: str) -> str:
    """A question as in training. Raises ValueError for one without text, and for a media tag in its middle."""
    try:
        text = clean_question(question)
    except ValueError as error:
        raise ValueError(f"the question {question!r}: {error}") from None
    if not text:
        raise ValueError(f"the question {question!r} holds no text: give a question about the video")
    return text


def _choose(logits: Tensor, temperature: float) -> int:
    """A token of logits (V,): the likeliest at temperature 0, else one of the `_TOP_K` likeliest at random."""
    if temperature <= 0:
        return int(logits.argmax())
    likeliest, tokens = logits.topk(min(_TOP_K, len(logits)))
    return int(tokens[torch.multinomial((likeliest / temperature).softmax(0), 1)])


def left_padding(lengths: Sequence[int], device: torch.device) -> Tensor:
    """The attention mask (B, L) of sequences that are padded on the left: 0 at the padding, 1 elsewhere."""
    positions = torch.arange(max(lengths), device=device)
    padding = max(lengths) - torch.tensor(lengths, device=device)
    return (positions >= padding[:, None]).long()
