"""Predicted and true trajectories of the objects in held-out answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dataloaders.formats import Record, Where, read_all, read_pite
from dataloaders.records import TokenizedSample
from dataloaders.samples.batch import collate
from dataloaders.samples.prompts import tokenize
from pite import checkpoint, lineage
from pite.config import PiTeConfig
from pite.evaluate.metrics import motion_scores, trajectory_scores
from pite.evaluate.reports import Report
from pite.model import PiTe
from pite.tokenizers import check_vocabulary


@dataclass(frozen=True)
class Samples:
    """Tokenized samples with a trajectory, the number of records, and the messages of those that are malformed."""

    samples: list[TokenizedSample]
    records: int
    malformed: tuple[str, ...]


def read_samples(
    path: Path, config: PiTeConfig, tokenizer: PreTrainedTokenizerBase, failure_budget: float = 0.01
) -> Samples:
    """PiTe-143k records that have a trajectory, tokenized for a model.

    failure_budget  share of records that may be malformed; they are left out
    Raises ValueError if the file does not exist, for a sample that the language model or its context cannot hold, and
    for more malformed records than the budget allows.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    shape = {"num_frames": config.num_frames, "num_points": config.num_points}

    def tokenized(record: Record, where: Where) -> TokenizedSample:
        sample = tokenize(read_pite(record, where, path.parent, **shape), tokenizer, **shape)
        check_vocabulary(int(sample.token_ids.max()), tokenizer, config.llm.vocab_size, f"{path}: {sample.id!r}")
        if reason := config.beyond_context(len(sample.token_ids)):
            raise ValueError(f"{path}: {sample.id!r}: {reason}; leave it out, or give a model with a longer context")
        return sample

    samples, errors = read_all(path, tokenized, failure_budget)
    with_trajectory = [sample for sample in samples if len(sample.trajectory)]
    return Samples(with_trajectory, len(samples) + len(errors), tuple(map(str, errors)))


def trajectory_head_warning(directory: Path) -> str | None:
    """One sentence if the trajectory head of a stage's output was not trained on its hidden states, else None.

    The published layout does not record its stages.
    """
    stages = lineage.stages(checkpoint.resolve(directory))
    if not stages or stages[-1] == 2:
        return None
    if 2 not in stages:
        return f"{directory} is of stage {stages[-1]} without a stage 2, so its trajectory head is untrained"
    return (
        f"{directory} is of stage {stages[-1]}, which changed the hidden states after its trajectory head was trained "
        "in stage 2: use stage 2's own output for trajectories"
    )


@torch.inference_mode()
def predict_trajectories(
    model: PiTe,
    samples: Sequence[TokenizedSample],
    read_features: Callable[[str], np.ndarray],
    *,
    token_budget: int = 8192,
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true trajectories (M, P, N, 2) of every answer token that has one, in the samples' order.

    The input holds the true answers, as in training, so the result measures the head and not the generated text.
    read_features  media key -> (num_frames, C)
    """
    predicted, true = [], []
    for batch in _batches(samples, token_budget):
        packed = collate(batch, [read_features(sample.media) for sample in batch]).to(model.device)
        hidden = model.hidden_states(packed)[packed.trajectory_rows]
        predicted.append(model.predict(hidden, "trajectory").cpu().numpy())
        true.append(packed.trajectory.cpu().numpy())
    if not predicted:
        raise ValueError("there is no trajectory to predict")
    return np.concatenate(predicted), np.concatenate(true)


def _batches(samples: Sequence[TokenizedSample], token_budget: int) -> Iterator[list[TokenizedSample]]:
    batch: list[TokenizedSample] = []
    tokens = 0
    for sample in samples:
        if batch and tokens + len(sample.token_ids) > token_budget:
            yield batch
            batch, tokens = [], 0
        batch.append(sample)
        tokens += len(sample.token_ids)
    if batch:
        yield batch


def report(predicted: np.ndarray, true: np.ndarray, answers: int) -> Report:
    """Scores of trajectories (M, P, N, 2), of the tokens of `answers` answers."""
    scores, motion = trajectory_scores(predicted, true), motion_scores(predicted, true)
    lines = [
        f"L1            {scores.l1:.4f}",
        f"best constant {scores.best_constant:.4f}",
        f"static oracle {scores.static_oracle:.4f}",
    ]
    numbers = {"L1": scores.l1, "constant": scores.best_constant, "unmoved": scores.static_oracle, "tokens": len(true)}
    if motion is not None:
        lines.append(f"motion slope  {motion.slope:.4f}   predicted over true displacement of {motion.points} points")
        lines.append(f"directions    {motion.directions:.4f}   share that is right, of four")
        numbers |= {"motion slope": motion.slope, "motion directions": motion.directions}
    lines.append(f"over {len(true)} tokens of {answers} answers")
    return Report("trajectories", "\n".join(lines), numbers)
