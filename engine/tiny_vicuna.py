"""Train a tiny Vicuna on text alone, so that a demo starts from something that speaks and reads.

Where a video will stand later there is a log: one word for each frame, naming something that is seen then. Answering
from it takes what the real questions take (which frames, in which order, of which thing), so that the three stages
have to teach the model to see, and not also to speak.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dataloaders.formats.narratives import QUESTION as STILL_QUESTION
from dataloaders.prompts import tokenize
from dataloaders.records import Sample, Turn
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

BATCH = 16


@dataclass(frozen=True)
class Dialogue:
    """A log of what is seen, and questions about it with their answers."""

    log: str
    turns: tuple[Turn, ...]


def build(vocabulary: int) -> LlamaForCausalLM:
    """The untrained model; its weights follow torch's global seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            # Positions here are tens, not thousands: a short base keeps neighbouring frames apart.
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            # The usual 0.02 suits widths in the thousands; at 128 it leaves attention nearly uniform for long.
            initializer_range=0.06,
            tie_word_embeddings=False,
        )
    )


def frame_log(scene: Scene, num_frames: int, rng: np.random.Generator) -> str:
    """One word per frame: the colour, now and then the place, of something seen then, or "nothing"."""
    words = []
    for frame in np.linspace(0, scene.num_frames - 1, num_frames).astype(int):
        seen = [thing for thing in scene.things if thing.first <= frame <= thing.last]
        if not seen:
            words.append("nothing")
            continue
        thing = seen[int(rng.integers(len(seen)))]
        x, y = thing.path[frame - thing.first]
        where = place(float(np.clip(x, 0, 0.999)), float(np.clip(y, 0, 0.999))).split()[-1]
        words.append(thing.colour if rng.random() < 0.8 else where)
    return " ".join(words)


def sample_dialogue(rng: np.random.Generator, num_frames: int) -> Dialogue:
    """A description, the times of each event and one more question, or the narrative of a still."""
    kind = rng.choice(["description", "questions", "still"], p=[0.4, 0.5, 0.1])
    if kind == "still":
        still = sample_still(rng)
        seen = " ".join(f"{thing.colour} {thing.shape} {place(*thing.path[0])}" for thing in still.things)
        return Dialogue(seen, (Turn(STILL_QUESTION, narrative_record("", still, rng)["caption"]),))
    video = sample_video(rng)
    log = frame_log(video, num_frames, rng)
    intervals = [interval(video, thing, num_frames) for thing in video.things]
    if kind == "description":
        record = pite_record("", video, rng)
        question, answer = (turn["value"].removeprefix("<video>\n") for turn in record["conversations"])
        for i, written in enumerate(intervals):
            answer = answer.replace(f"<s{i}> to <e{i}>", written)
        return Dialogue(log, (Turn(question, answer),))
    turns = [
        Turn(GROUNDING_QUESTION.format(sentence(video.things[i])), f"From {intervals[i]}.")
        for i in rng.permutation(len(video.things))
    ]
    colour = str(rng.choice(list(COLOURS)))
    shown = any(thing.colour == colour for thing in video.things)
    turns.insert(0, Turn(f"Can we see a {colour} shape?", "Yes." if shown else "No."))
    other = instruct_record("", video, rng)
    turns.insert(int(rng.integers(len(turns) + 1)), Turn(other["q"], other["a"]))
    return Dialogue(log, tuple(turns))


def dialogue_ids(dialogue: Dialogue, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (n,) of a dialogue, its log where a video's frames would stand, and labels: -100 but for the answers."""
    log = tokenizer.encode(dialogue.log, add_special_tokens=False)
    sample = tokenize(Sample("", "", dialogue.turns), tokenizer, num_frames=len(log), num_points=1)
    ids = sample.token_ids.copy()
    ids[sample.frame_start : sample.frame_start + len(log)] = log
    labels = np.full_like(ids, -100)
    labels[sample.target_positions] = ids[sample.target_positions]
    return ids, labels


def _batch(tokenizer: PreTrainedTokenizerFast, num_frames: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Token ids and labels, each (BATCH, longest); padding stands right of everything that is learned."""
    rows = [dialogue_ids(sample_dialogue(rng, num_frames), tokenizer) for _ in range(BATCH)]
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row[part]) for row in rows], True, fill)
        for part, fill in enumerate((0, -100))
    )
    return ids, labels


def answer_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the labelled tokens; only the rows that predict one meet the vocabulary."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    learned = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])


def train(tokenizer: PreTrainedTokenizerFast, steps: int, num_frames: int, seed: int) -> LlamaForCausalLM:
    """Train for a fixed number of steps; on one thread the same seed gives the same weights."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 20])
    model = build(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=min(0.1, 50 / steps))
    for step in range(steps):
        loss = answer_loss(model, *_batch(tokenizer, num_frames, rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"vicuna step {step + 1}/{steps}: loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def probe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_frames: int, seed: int = 0) -> float:
    """Mean loss over answers to fresh dialogues."""
    rng = np.random.default_rng([seed, 21])
    return float(np.mean([answer_loss(model, *_batch(tokenizer, num_frames, rng)).item() for _ in range(8)]))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the model and its tokenizer in transformers' format."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
