"""The same training step with transformers + peft, padded or packed, and with unsloth."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from bench.step.problem import RECIPE, Problem, Step
from dataloaders.records import ABSENT
from dataloaders.samples.batch import PackedBatch
from dataloaders.samples.plan import split_batch
from engine.tiny.tokenizer import build_tokenizer
from pite import names
from pite.generate import frozen_language_model
from pite_kernels import packed_attention

PADDED_BATCH = 8


class HuggingFace(nn.Module):
    """transformers' Llama with peft's LoRA, and the trajectory head of the published code, on copies of our weights.

    LoRA and head are in the dtype of the frozen weights, as in earlier work. This is faster than peft's float32 LoRA,
    which is the dtype that ours uses.
    """

    def __init__(
        self, problem: Problem, attach: Callable[[nn.Module, dict[str, Any]], nn.Module] | None = None
    ) -> None:
        """`attach` adds the LoRA to a Llama; None: with peft."""
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        super().__init__()
        model = problem.model
        lora = {name: tensor.clone() for name, tensor in names.lora_tensors(model).items()}
        _, linear, _ = next(names.linear_layers(model))
        assert linear.lora_b is not None
        rank = linear.lora_b.shape[1]
        llama = frozen_language_model(model)
        targets = sorted(part.split(".")[1] for parts in names.PROJECTIONS.values() for part in parts)
        options = {"r": rank, "lora_alpha": linear.scale * rank, "target_modules": targets, "lora_dropout": 0.0}
        if attach is None:
            self.llama: Any = get_peft_model(llama, LoraConfig(**options), autocast_adapter_dtype=False)
        else:
            self.llama = attach(llama, options)
        set_peft_model_state_dict(self.llama, lora)
        self.problem = problem
        outputs, inputs = model.trajectory_projector.weight.shape
        self.head = nn.Linear(inputs, outputs).to(model.device, model.dtype)
        self.head.load_state_dict(model.trajectory_projector.state_dict())
        self.llama.train()

    def embed(self, batch: PackedBatch) -> Tensor:
        model = self.problem.model
        return model.embed(batch.token_ids, batch.features, batch.feature_rows).detach()

    def loss(self, hidden: Tensor, ce: Tensor, tracks: Tensor) -> Tensor:
        """hidden (..., d) predicts tracks (..., P, N, 2); pairs (-1, -1) have no loss. ce is summed over tokens."""
        tokens, coordinates = self.problem.normalizers
        predicted = self.head(hidden.to(self.head.weight.dtype)).view(tracks.shape)
        present = (tracks != ABSENT).all(-1, keepdim=True)
        return ce / tokens + RECIPE.trajectory_weight * ((predicted - tracks).abs() * present).sum() / coordinates


def padded_step(problem: Problem, checkpointing: bool) -> Step:
    model = HuggingFace(problem)
    if checkpointing:
        model.llama.enable_input_require_grads()
        model.llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return _padded(model)


def unsloth_step(problem: Problem) -> Step:
    """Written from unsloth's documentation; not yet run on a machine with unsloth."""
    os.environ.setdefault("UNSLOTH_RETURN_LOGITS", "1")
    from unsloth import FastLanguageModel

    def attach(llama: nn.Module, options: dict[str, Any]) -> nn.Module:
        # unsloth patches only models that it loads itself.
        with tempfile.TemporaryDirectory() as directory:
            llama.save_pretrained(directory)  # type: ignore[operator]
            build_tokenizer().save_pretrained(directory)
            own, _ = FastLanguageModel.from_pretrained(
                directory, max_seq_length=2048, dtype=problem.model.dtype, load_in_4bit=False
            )
        patched: nn.Module = FastLanguageModel.get_peft_model(
            own, **options, bias="none", use_gradient_checkpointing="unsloth"
        )
        return patched

    return _padded(HuggingFace(problem, attach))


def _padded(model: HuggingFace) -> Step:
    """A step on right-padded micro-batches of eight samples in order."""
    problem = model.problem
    config, device = problem.model.config, problem.model.device
    batches = []
    for start in range(0, len(problem.samples), PADDED_BATCH):
        members = range(start, min(start + PADDED_BATCH, len(problem.samples)))
        lengths = [len(problem.samples[i].token_ids) for i in members]
        shape = (len(lengths), max(lengths))
        embedded = torch.zeros(*shape, config.llm.hidden_size, dtype=problem.model.dtype, device=device)
        mask = torch.zeros(shape, dtype=torch.long, device=device)
        labels = torch.full(shape, -100, device=device)
        tracks = torch.full((*shape, config.num_points, config.num_frames, 2), float(ABSENT), device=device)
        for row, (i, length) in enumerate(zip(members, lengths)):
            sample = problem.samples[i]
            with torch.no_grad():
                embedded[row, :length] = model.embed(problem.pack_whole([i]).to(device))
            mask[row, :length] = 1
            at = torch.from_numpy(sample.target_positions - 1).to(device)
            labels[row, at] = torch.from_numpy(sample.token_ids[sample.target_positions]).to(device)
            at = torch.from_numpy(sample.trajectory_positions - 1).to(device)
            tracks[row, at] = torch.from_numpy(sample.trajectory).to(device)
        batches.append((embedded, mask, labels, tracks))

    def forward(embedded: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = model.llama(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1], _cross_entropy(out.logits, labels)

    return _hf_step(model, batches, forward)


def flash_attention_2_installed() -> bool:
    """Whether `flash_attn` is the package of flash-attn 2; flash-attn-4 alone makes it a namespace without a file."""
    found = find_spec("flash_attn")
    return found is not None and found.origin is not None


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    options: dict[str, Any] = {"label_smoothing": RECIPE.label_smoothing, "reduction": "sum"}
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), **options)


def packed_step(problem: Problem) -> Step:
    """The packed row through transformers and peft; on CUDA with liger-kernel's layers and fused linear cross-entropy.

    Attention is flash-attn if installed, else ours; in both cases attention is not the difference to ours.
    """
    model = HuggingFace(problem)
    llama = model.llama.get_base_model()
    fused = None
    if problem.model.device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=llama)
        fused = LigerFusedLinearCrossEntropyLoss(label_smoothing=RECIPE.label_smoothing, reduction="sum")
    AttentionInterface.register("packed", _attend)
    flash = problem.model.device.type == "cuda" and flash_attention_2_installed()
    llama.set_attn_implementation("flash_attention_2" if flash else "packed")
    config, device = problem.model.config, problem.model.device
    (bins,) = split_batch([len(s.token_ids) for s in problem.samples], 1, problem.token_budget)
    batches = []
    for members in filter(None, bins):
        batch = problem.pack_whole(members).to(device)
        labels = torch.full((1, batch.num_rows), -100, device=device)
        labels[0, batch.read_rows[batch.target_rows]] = batch.target_ids
        tracks = torch.full((1, batch.num_rows, config.num_points, config.num_frames, 2), float(ABSENT), device=device)
        tracks[0, batch.read_rows[batch.trajectory_rows]] = batch.trajectory
        batches.append((model.embed(batch)[None], batch, labels, tracks))

    def forward(embedded: Tensor, batch: PackedBatch, labels: Tensor) -> tuple[Tensor, Tensor]:
        bounds, longest = batch.cu_seqlens, batch.max_seqlen
        hidden = llama.model(
            inputs_embeds=embedded,
            position_ids=batch.position_ids.long()[None],
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=longest,
            max_length_k=longest,
            use_cache=False,
        ).last_hidden_state
        if fused is None:
            return hidden, _cross_entropy(llama.lm_head(hidden), labels)
        return hidden, fused(llama.lm_head.weight, hidden[0], labels[0])

    return _hf_step(model, batches, forward)


def _attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers over one row of packed documents: q (1, H, T, D), k and v (1, K, T, D)."""
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    return packed_attention(q, k, v, cu_seq_lens_q, max_length_q, scale=scaling)[None], None


def _hf_step(model: HuggingFace, batches: list[Any], forward: Callable[..., tuple[Tensor, Tensor]]) -> Step:
    """`forward` returns the hidden states and the summed cross-entropy, from the first three entries of a batch."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RECIPE.learning_rate, weight_decay=0.0, fused=True)

    def step(update: bool = True) -> Sequence[Tensor]:
        total = torch.zeros((), device=model.head.weight.device)
        for *inputs, tracks in batches:
            loss = model.loss(*forward(*inputs), tracks)
            loss.backward()
            total += loss.detach()
        if update:
            torch.nn.utils.clip_grad_norm_(trainable, RECIPE.max_grad_norm)
            optimizer.step()
        optimizer.zero_grad()
        return [total]

    return step
