"""Trains a tiny Vicuna without images, so that the demo starts from a model with language skills.

The prompt holds a text log in place of a video: each frame is the sum of the embeddings of all words that describe it.
Answers from a log need the same skills as answers about a video (which frames, in which order, of which thing, where).
The three stages then teach the model only to see, not language: the adapter has to find a linear map.

The hard part is to match a word of the question with the log. A model that trains on answers alone learns to name any
event of the video, and stops there. The first layer therefore has an auxiliary loss on what the upper layers need for
the match: each frame predicts its own index, and each word predicts the last colour mentioned. Training starts with
lists, because a list needs little more than this match.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dataloaders.formats.narratives import QUESTION as STILL_QUESTION
from dataloaders.records import Sample, Turn
from dataloaders.samples.prompts import tokenize
from dataloaders.synthetic.language import (
    GROUNDING_QUESTION,
    instruct_record,
    interval,
    narrative_record,
    pite_record,
    place,
    sentence,
)
from dataloaders.synthetic.scene import COLOURS, Scene, sample_still, sample_video

log = logging.getLogger(__name__)

BATCH = 32
LIST_QUESTION = "List the shapes with first and last frame."
LEARNING_RATE = 2e-3
FIRST_LAYER_WEIGHT = 0.3
INDEX_WEIGHT = 2.0
"""Loss weight of an index in an answer: most other tokens can be guessed from the words before them."""

_KINDS = ("list", "times", "still", "description", "question")
_LISTS = (0.5, 0.3, 0.2, 0.0, 0.0)
_MIX = (0.15, 0.35, 0.15, 0.3, 0.05)
"""Shares of the kinds of dialogue, in the first steps and afterwards."""


@dataclass(frozen=True)
class Dialogue:
    """A log, which holds the words that describe each frame, and questions about it with their answers."""

    log: tuple[str, ...]
    turns: tuple[Turn, ...]


def build(vocabulary: int) -> LlamaForCausalLM:
    """The untrained model; its weights follow torch's global seed.

    Embeddings are large and the residual branches start at zero, so that word embeddings stay recognisable in the upper
    layers, which match them. At transformers' scales the first layer's output is much larger than the embeddings.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            # With a small base most rotary pairs turn fully within a prompt, and equal words no longer match.
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            initializer_range=128**-0.5,
        )
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def words_at(scene: Scene, frame: int) -> str:
    """The words that describe a source frame: colour, shape and place of every visible thing, or "nothing"."""
    words = []
    for thing in scene.things:
        if thing.first <= frame <= thing.last:
            words.append(f"{thing.colour} {thing.shape} {_where(thing.path[frame - thing.first])}")
    return " ".join(words) or "nothing"


def _where(point: np.ndarray) -> str:
    x, y = np.clip(point, 0, 0.999)
    return place(float(x), float(y)).split(" the ")[1]


def frame_log(scene: Scene, num_frames: int) -> tuple[str, ...]:
    """`words_at` each of `num_frames` frames, evenly spaced like a video's."""
    return tuple(words_at(scene, frame) for frame in np.linspace(0, scene.num_frames - 1, num_frames).astype(int))


def _grounding(video: Scene, index: int, num_frames: int) -> Turn:
    thing = video.things[index]
    return Turn(GROUNDING_QUESTION.format(sentence(thing)), f"From {interval(video, thing, num_frames)}.")


def _listed(video: Scene, index: int, num_frames: int) -> str:
    thing = video.things[index]
    first, last = interval(video, thing, num_frames).split(" to ")
    return f"{thing.colour} {first} {_where(thing.path[0])} {last} {_where(thing.path[-1])}"


def sample_dialogue(rng: np.random.Generator, num_frames: int, shares: Sequence[float] = _MIX) -> Dialogue:
    """One of `_KINDS`, drawn by its share.

    list         each colour with the first and last frame of its event and its places in them, in any order
    times        the grounding question, about each event in turn
    still        the narrative of a log of one frame
    description  of a video, with the time of each event
    question     another one
    """
    kind = rng.choice(_KINDS, p=shares)
    if kind == "still":
        still = sample_still(rng)
        return Dialogue((words_at(still, 0),), (Turn(STILL_QUESTION, narrative_record("", still, rng)["caption"]),))
    video = sample_video(rng)
    log = frame_log(video, num_frames)
    order = rng.permutation(len(video.things))
    if kind == "list":
        return Dialogue(log, (Turn(LIST_QUESTION, f"{', '.join(_listed(video, i, num_frames) for i in order)}."),))
    if kind == "times":
        return Dialogue(log, tuple(_grounding(video, i, num_frames) for i in order))
    if kind == "question":
        other = instruct_record("", video, rng)
        return Dialogue(log, (Turn(other["q"], other["a"]),))
    record = pite_record("", video, rng)
    question, answer = (turn["value"].removeprefix("<video>\n") for turn in record["conversations"])
    for i, thing in enumerate(video.things):
        answer = answer.replace(f"<s{i}> to <e{i}>", interval(video, thing, num_frames))
    return Dialogue(log, (Turn(question, answer),))


@dataclass(frozen=True)
class Batch:
    """Dialogues, padded on the right, and their logs with F frames in total.

    ids, labels       (B, longest) int64; labels are -100 except for the answers and their `</s>`
    rows, columns     (F,) int64, position of each frame in `ids`
    numbers           (F,) int64, ids of each frame's own two-digit index
    words, offsets    the words of each frame, in the form that `embedding_bag` takes
    colours           (B, longest) int64, id of the last colour mentioned up to each token; -100 before the first
                      and in padding
    """

    ids: Tensor
    labels: Tensor
    rows: Tensor
    columns: Tensor
    numbers: Tensor
    words: Tensor
    offsets: Tensor
    colours: Tensor


def make_batch(dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Format dialogues as training's prompt, with one frame for each entry of the log."""
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    rows: list[int] = []
    columns: list[int] = []
    numbers: list[int] = []
    words: list[tuple[int, ...]] = []
    colours: list[Tensor] = []
    names = [word_ids(colour, tokenizer)[0] for colour in COLOURS]
    for row, dialogue in enumerate(dialogues):
        length = len(dialogue.log)
        sample = tokenize(Sample("", "", dialogue.turns), tokenizer, num_frames=length, num_points=1)
        answers = np.full_like(sample.token_ids, -100)
        answers[sample.target_positions] = sample.token_ids[sample.target_positions]
        ids.append(torch.from_numpy(sample.token_ids))
        labels.append(torch.from_numpy(answers))
        rows += [row] * length
        columns += range(sample.frame_start, sample.frame_start + length)
        numbers += index_ids(tokenizer)[:length]
        words += [word_ids(frame, tokenizer) for frame in dialogue.log]
        mentioned = np.where(np.isin(sample.token_ids, names), np.arange(len(sample.token_ids)), -1)
        last = np.maximum.accumulate(mentioned)
        colours.append(torch.from_numpy(np.where(last >= 0, sample.token_ids[last], -100)))
    return Batch(
        ids=pad_sequence(ids, batch_first=True),
        labels=pad_sequence(labels, batch_first=True, padding_value=-100),
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        numbers=torch.tensor(numbers),
        words=torch.tensor(list(chain.from_iterable(words))),
        offsets=torch.tensor([0, *accumulate(len(frame) for frame in words[:-1])]),
        colours=pad_sequence(colours, batch_first=True, padding_value=-100),
    )


@lru_cache
def index_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Token ids of the two-digit indices 00 to 99, each after a space."""
    return tuple(word_ids(f"{index:02d}", tokenizer)[0] for index in range(100))


@lru_cache(maxsize=4096)
def word_ids(words: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Token ids of some words."""
    return tuple(tokenizer.encode(words, add_special_tokens=False))


def hidden_states(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states (B, longest, d) after the last layer and after the first, both normalised."""
    llama = model.model
    logged = F.embedding_bag(batch.words, llama.embed_tokens.weight, batch.offsets, mode="sum")
    embedded = llama.embed_tokens(batch.ids).index_put((batch.rows, batch.columns), logged)
    outputs = llama(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
    return outputs.last_hidden_state, llama.norm(outputs.hidden_states[1])


def losses(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies: of the answers' tokens, and of the first layer's auxiliary targets (see the module)."""
    last, first = hidden_states(model, batch)
    target = batch.labels[:, 1:]
    tokens = target[target != -100]
    answers = F.cross_entropy(model.lm_head(last[:, :-1][target != -100]), tokens, reduction="none")
    weight = torch.where(torch.isin(tokens, batch.numbers), INDEX_WEIGHT, 1.0)
    has_colour = batch.colours != -100
    index = F.cross_entropy(model.lm_head(first[batch.rows, batch.columns]), batch.numbers)
    # Tokens before the first colour have no target, but every batch has some colour.
    colour = F.cross_entropy(model.lm_head(first[has_colour]), batch.colours[has_colour])
    return (answers * weight).sum() / weight.sum(), index + colour


def train(
    tokenizer: PreTrainedTokenizerFast, list_steps: int, steps: int, num_frames: int, seed: int
) -> LlamaForCausalLM:
    """Train on lists, then on everything, each for a fixed number of steps; bitwise reproducible on one thread."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 20])
    model = build(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    total = list_steps + steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total, pct_start=0.05)
    for step in range(total):
        shares = _LISTS if step < list_steps else _MIX
        batch = make_batch([sample_dialogue(rng, num_frames, shares) for _ in range(BATCH)], tokenizer)
        answer, first_layer = losses(model, batch)
        optimizer.zero_grad()
        (answer + FIRST_LAYER_WEIGHT * first_layer).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == total - 1:
            log.info("vicuna step %d/%d: loss %.3f", step + 1, total, answer.item())
    return model.eval()


@torch.no_grad()
def probe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_frames: int, seed: int = 0) -> float:
    """Share of grounding questions about logs of two and three things whose first frame is right to within one frame.

    A question-blind model, which answers with any of the events, reaches about 0.4.
    """
    rng = np.random.default_rng([seed, 21])
    indices = index_ids(tokenizer)
    dialogues: list[Dialogue] = []
    while len(dialogues) < 256:
        video = sample_video(rng)
        if len(video.things) > 1:
            turn = _grounding(video, int(rng.integers(len(video.things))), num_frames)
            dialogues.append(Dialogue(frame_log(video, num_frames), (turn,)))
    batch = make_batch(dialogues, tokenizer)
    is_index = torch.isin(batch.labels, torch.tensor(indices))
    rows, columns = torch.arange(len(dialogues)), is_index.int().argmax(1)
    predicted = model.lm_head(hidden_states(model, batch)[0][rows, columns - 1])[:, list(indices)].argmax(1)
    true = torch.tensor([indices.index(token) for token in batch.labels[rows, columns].tolist()])
    return float(((predicted - true).abs() <= 1).float().mean())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the model and its tokenizer in transformers' format."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
