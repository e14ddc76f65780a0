"""Dialogues as padded tensors, with the targets of all losses of the tiny Vicuna's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from dataloaders.records import Sample, TokenizedSample
from dataloaders.samples.prompts import tokenize
from dataloaders.synthetic.scene import COLOURS
from engine.tiny.code import PRESENCE, SHAPE, X, velocities
from engine.tiny.dialogues import Dialogue

PLACE_NOISE = 0.12
"""Standard deviation of the noise on a visible thing's place, in the code's numbers: 0.03 of the frame."""

SHAPE_NOISE = 0.35
"""The same on its shape, which is coded as 0.5. The tiny CLIP sees shapes worst, so a single frame must not decide."""

CODE_NOISE = 0.05
"""The same on all other numbers of the code, those of colours that are not visible included."""


@dataclass(frozen=True)
class Coordinates:
    """Points that the row before each token of a phrase predicts.

    rows, columns  (M,) int64, those rows in `Batch.ids`
    points         (M, F, 2) float32, fractions of the frame, (-1, -1) where absent
    """

    rows: Tensor
    columns: Tensor
    points: Tensor


@dataclass(frozen=True)
class Batch:
    """Dialogues, padded on the right, and their logs with F frames in total.

    ids, labels       (B, longest) int64; labels are -100 except for the answers and their `</s>`
    rows, columns     (F,) int64, position of each frame in `ids`
    numbers           (F,) int64, ids of each frame's own two-digit index
    codes             (F, colours, FIELDS) float32, the noisy code of each frame
    velocities        (F, colours, 2) float32, of each colour; NaN where it has none
    colours           (B, longest) int64, id of the last colour mentioned up to each token; -100 before the first
                      and in padding
    paths, places     coordinates in videos and in stills
    """

    ids: Tensor
    labels: Tensor
    rows: Tensor
    columns: Tensor
    numbers: Tensor
    codes: Tensor
    velocities: Tensor
    colours: Tensor
    paths: Coordinates
    places: Coordinates


def make_batch(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> Batch:
    """Format dialogues as training's prompt, with one frame for each entry of the log, and add noise to the logs."""
    samples = [
        tokenize(Sample("", "", each.turns), tokenizer, num_frames=len(each.log), num_points=1) for each in dialogues
    ]
    counts = [len(each.log) for each in dialogues]
    exact = np.concatenate([each.log for each in dialogues])
    columns = [np.arange(sample.frame_start, sample.frame_start + sample.num_features) for sample in samples]
    return Batch(
        ids=_pad([sample.token_ids for sample in samples], 0),
        labels=_pad([_labels(sample) for sample in samples], -100),
        rows=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        columns=torch.from_numpy(np.concatenate(columns)),
        numbers=torch.tensor([number for count in counts for number in index_ids(tokenizer)[:count]]),
        codes=torch.from_numpy(noisy(exact, rng)),
        velocities=torch.from_numpy(np.concatenate([velocities(each.log) for each in dialogues])),
        colours=_pad([_last_colour(sample.token_ids, tokenizer) for sample in samples], -100),
        paths=_coordinates([(i, sample) for i, sample in enumerate(samples) if sample.num_features > 1]),
        places=_coordinates([(i, sample) for i, sample in enumerate(samples) if sample.num_features == 1]),
    )


def noisy(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Codes (F, colours, FIELDS) with Gaussian noise on every number."""
    scale = np.full(codes.shape, CODE_NOISE, np.float32)
    visible = codes[..., PRESENCE] > 0
    scale[visible, X:SHAPE] = PLACE_NOISE
    scale[visible, SHAPE:] = SHAPE_NOISE
    return codes + scale * rng.standard_normal(codes.shape, np.float32)


def _pad(rows: list[np.ndarray], value: int) -> Tensor:
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=value)


def _labels(sample: TokenizedSample) -> np.ndarray:
    labels = np.full_like(sample.token_ids, -100)
    labels[sample.target_positions] = sample.token_ids[sample.target_positions]
    return labels


def _last_colour(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    last = np.maximum.accumulate(np.where(np.isin(ids, colour_ids(tokenizer)), np.arange(len(ids)), -1))
    return np.where(last >= 0, ids[last], -100)


def _coordinates(samples: list[tuple[int, TokenizedSample]]) -> Coordinates:
    positions = [sample.trajectory_positions for _, sample in samples]
    rows = np.repeat([row for row, _ in samples], [len(each) for each in positions]).astype(np.int64)
    points = [sample.trajectory[:, 0] for _, sample in samples if len(sample.trajectory)]
    return Coordinates(
        rows=torch.from_numpy(rows),
        columns=torch.from_numpy(np.concatenate([*positions, np.zeros(0, np.int64)]) - 1),
        points=torch.from_numpy(np.concatenate(points) if points else np.zeros((0, 1, 2), np.float32)),
    )


@lru_cache
def index_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Token ids of the two-digit indices 00 to 99, each after a space."""
    return tuple(word_id(f"{index:02d}", tokenizer) for index in range(100))


@lru_cache
def colour_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Token ids of the colours, each after a space."""
    return tuple(word_id(colour, tokenizer) for colour in COLOURS)


def word_id(word: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """Token id of a word of the world after a space."""
    (token,) = tokenizer.encode(word, add_special_tokens=False)
    return int(token)
