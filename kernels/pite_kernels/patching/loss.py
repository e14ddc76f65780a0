"""The loss of a patched model: `linear_cross_entropy` on the rows with a label, inside the model's own forward.

The head's forward keeps the hidden states and returns logits that have a shape but no memory (device "meta"). The
model hands them to its loss function, which computes the loss from the hidden states. So whatever the model adds to the
loss, or returns with it, stays. Logits that were changed on their way (a scale, a soft cap) are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pite_kernels.cross_entropy import linear_cross_entropy
from pite_kernels.patching.documents import Documents
from pite_kernels.patching.refusals import ATTENTION_ONLY, check_head
from pite_kernels.patching.state import Patch


def loss_forward(patch: Patch, model: nn.Module, call: dict[str, Any]) -> Any:
    """The model's forward with labels. Its output has the loss, and no logits where gradients are computed."""
    check_head(model)
    targets = call.pop("rows", None), call.pop("target_ids", None)
    if (targets[0] is None) != (targets[1] is None):
        raise ValueError("patch: pass both rows and target_ids, or neither")
    if call.get("use_cache") is None and call.get("past_key_values") is None:
        call["use_cache"] = False
    wanted = call.pop("return_dict", None)
    wanted = model.config.return_dict if wanted is None else wanted  # type: ignore[union-attr]
    step = _Step(patch, targets, keep_logits=not (model.training or torch.is_grad_enabled()))
    with step.installed(model):
        out = patch.own(model, "forward")(**call, return_dict=True)
    if step.loss is None:
        raise ValueError(f"patch: {type(model).__name__} computes its loss without its loss_function{ATTENTION_ONLY}")
    out = out if step.keep_logits else dataclasses.replace(out, logits=None)
    return out if wanted else out.to_tuple()


class _Step:
    """One call of the model: what the head got, and the loss."""

    def __init__(self, patch: Patch, targets: tuple[Tensor | None, Tensor | None], keep_logits: bool) -> None:
        self.patch, self.targets, self.keep_logits = patch, targets, keep_logits
        self.hidden: Tensor | None = None
        self.logits: Tensor | None = None
        self.loss: Tensor | None = None

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Replaces the head's forward and the model's loss function for the duration of one call."""
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        places = ((self.head, "forward", self._head), (model, "_loss_function", self._loss))
        before = [vars(owner).get(name) for owner, name, _ in places]
        self.own_head = self.head.forward
        for owner, name, function in places:
            setattr(owner, name, function)
        try:
            yield
        finally:
            for (owner, name, _), value in zip(places, before):
                if value is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)

    def _head(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        shape = (*hidden.shape[:-1], self.head.weight.shape[0])
        self.logits = (
            self.own_head(hidden) if self.keep_logits else torch.empty(shape, dtype=hidden.dtype, device="meta")
        )
        return self.logits

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        *_: Any,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **__: Any,
    ) -> Tensor:
        """Instead of transformers' ForCausalLMLoss, with its arguments."""
        if logits is not self.logits or self.hidden is None:
            raise ValueError(f"patch: the model changes its logits after lm_head, and patch does not{ATTENTION_ONLY}")
        hidden, weight = self.hidden, self.head.weight
        if weight.dim() != 2 or hasattr(weight, "device_mesh"):
            raise ValueError(f"patch: the weight of lm_head is sharded apart from the model{ATTENTION_ONLY}")
        hidden = hidden.to(weight.device)  # another device, if accelerate has divided the model
        rows, target_ids = self.targets
        if rows is None or target_ids is None:
            shifted = _shifted(labels, shift_labels, ignore_index).to(hidden.device)
            if shifted.shape != hidden.shape[:-1]:
                raise ValueError(
                    f"patch: labels {tuple(shifted.shape)} do not fit {tuple(hidden.shape[:-1])} tokens; "
                    "with labels, leave logits_to_keep out"
                )
            documents = self.patch.documents if shift_labels is None else None
            rows, target_ids = supervised_rows(shifted, documents, ignore_index)
        self.loss = linear_cross_entropy(
            hidden.flatten(0, -2),
            weight,
            target_ids.to(hidden.device),
            rows.to(hidden.device),
            bias=self.head.bias,
            label_smoothing=self.patch.label_smoothing,
            ignore_index=ignore_index,
            normalizer=_normalizer(num_items_in_batch, hidden),
        )
        return self.loss


def _shifted(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    if shift_labels is not None:
        return shift_labels
    assert labels is not None
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def supervised_rows(shifted: Tensor, documents: Documents | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The rows of B * T hidden states that predict a token, and these tokens. It waits for the GPU.

    shifted    (B, T) the token that each row predicts, or `ignore_index`
    documents  a row predicts nothing if its next token is padding or belongs to another document. None: not considered
    """
    ids = shifted.flatten()
    keep = ids != ignore_index
    if documents is not None:
        owner = documents.owners().to(ids.device)
        keep[:-1] &= (owner[:-1] == owner[1:]) & (owner[1:] >= 0)
        keep[-1:] = False
    rows = keep.nonzero().flatten()
    return rows, ids.index_select(0, rows)


def _normalizer(count: Tensor | int | None, hidden: Tensor) -> Tensor | None:
    """transformers' `num_items_in_batch`, the supervised tokens of the global batch, as a 0-dim tensor."""
    if count is None:
        return None
    if isinstance(count, Tensor):
        return count.to(hidden.device, torch.float32).reshape(())
    return torch.full((), float(count), device=hidden.device)
