"""Trains a tiny Vicuna without images, so that the demo starts from a model with language skills.

The prompt holds a text log in place of a video: each frame is a linear map of its code, which holds the place and the
shape of every visible colour, with noise. Answers from a log need the same skills as answers about a video (which
frames, in which order, of which thing, where). The three stages then teach the model only to see, not language: the
adapter has to find a linear map.

Two things are hard, and have losses of their own:

* To match a word of the question with the log. A model that trains on answers alone learns to name any event of the
  video, and stops there. So the first layer predicts what the upper layers need for the match: each frame its own
  index, and each word the last colour mentioned.
* To read motion. The second layer predicts the velocity of each colour at each frame. At the words that name a thing
  the last layer predicts its path, or its place in a still, as the coordinate heads do in stages 2 and 1.

The heads of these losses, and the map from codes to frames, are not kept. But what the layers below them have learned
is, so the language model starts the stages with the ability to read motion from exact, noisy logs. The stages carry
that over to pixels. Vicuna, which the paper starts from, brings no such ability.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dataloaders.records import ABSENT
from dataloaders.synthetic.scene import COLOURS, SHAPES
from engine.tiny.batch import Batch, Coordinates, colour_ids, make_batch, word_id
from engine.tiny.code import FIELDS, PRESENCE, SHAPE, SHAPE_SCALE
from engine.tiny.config import TinyConfig
from engine.tiny.dialogues import sample_dialogue
from engine.tiny.progress import Progress

log = logging.getLogger(__name__)

BATCH = 32
LEARNING_RATE = 2e-3
INDEX_WEIGHT = 2.0
"""Loss weight of an index in an answer: most other tokens can be guessed from the words before them."""
WEIGHTS = {"answer": 1.0, "first layer": 0.3, "path": 10.0, "place": 6.0, "velocity": 1.0}
"""Weight of each loss in the sum."""
OF_MOTION = ("path", "velocity")
"""Losses that a model without motion is not trained on."""
VELOCITY_LAYER = 2
VELOCITY_SCALE = 10.0
"""Velocities are multiplied by this: they are about 0.04 of the frame for each step."""


def build(vocabulary: int, width: int = TinyConfig.width) -> LlamaForCausalLM:
    """The untrained model of hidden size `width`; its weights follow torch's global seed.

    Embeddings are large and the residual branches start at zero, so that word embeddings stay recognisable in the upper
    layers, which match them. At transformers' scales the first layer's output is much larger than the embeddings.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            # With a small base most rotary pairs turn fully within a prompt, and equal words no longer match.
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            initializer_range=width**-0.5,
        )
    )
    # On a CPU the backward pass of PyTorch's fused attention takes more time than all matrix products.
    model.set_attn_implementation("eager")
    nn.init.normal_(model.model.embed_tokens.weight)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


class Trainer(nn.Module):
    """The model with what is only needed to train it: the map from codes to frames, and the heads of the losses.

    A frame is the sum over the visible things of the embeddings of their colour and shape, of a vector for each pair of
    colour and shape, and of two vectors of the colour multiplied by the place. So place and shape are bound to a colour:
    a sum of words alone is the same for "red left, blue right" and its reverse, and motion cannot be read from it. Every
    frame has the embedding of "nothing" in addition, as an adapter has a bias.
    """

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, num_frames: int) -> None:
        super().__init__()
        width = model.config.hidden_size
        self.model = model
        self.bound = nn.Parameter(torch.randn(len(COLOURS), FIELDS, width))
        self.path, self.place = nn.Linear(width, num_frames * 2), nn.Linear(width, 2)
        self.velocity = nn.Linear(width, len(COLOURS) * 2)
        for head in (self.path, self.place, self.velocity):
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, 0.0 if head is self.velocity else 0.5)
        self.colours, self.nothing = torch.tensor(colour_ids(tokenizer)), torch.tensor(word_id("nothing", tokenizer))
        self.shapes = torch.tensor([word_id(shape, tokenizer) for shape in SHAPES])

    def frames(self, codes: Tensor) -> Tensor:
        """Codes (F, colours, FIELDS) -> rows (F, d) in place of the frames' tokens."""
        embed = self.model.model.embed_tokens
        rows = torch.einsum("fcn,cnd->fd", codes, self.bound)
        rows = rows + codes[..., PRESENCE] @ embed(self.colours)
        return rows + codes[..., SHAPE:].sum(1) / SHAPE_SCALE @ embed(self.shapes) + embed(self.nothing)

    def hidden_states(self, batch: Batch) -> tuple[Tensor, ...]:
        """Normalised hidden states (B, longest, d) after each layer."""
        llama = self.model.model
        embedded = llama.embed_tokens(batch.ids).index_put((batch.rows, batch.columns), self.frames(batch.codes))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = llama(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
            # The last one is already normalised.
            return *(llama.norm(states) for states in outputs.hidden_states[1:-1]), outputs.last_hidden_state

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean of each loss in `WEIGHTS` over the batch."""
        states = self.hidden_states(batch)
        with torch.autocast("cpu", torch.bfloat16):
            return {
                "answer": self._answer_loss(states[-1], batch),
                "first layer": self._first_layer_loss(states[0], batch),
                "path": _l1(self.path, states[-1], batch.paths),
                "place": _l1(self.place, states[-1], batch.places),
                "velocity": self._velocity_loss(states[VELOCITY_LAYER - 1], batch),
            }

    def _answer_loss(self, states: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the answers' tokens; indices count more."""
        target = batch.labels[:, 1:]
        tokens = target[target != -100]
        answers = F.cross_entropy(self.model.lm_head(states[:, :-1][target != -100]), tokens, reduction="none")
        weight = torch.where(torch.isin(tokens, batch.numbers), INDEX_WEIGHT, 1.0)
        return (answers * weight).sum() / weight.sum()

    def _first_layer_loss(self, states: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropies of each frame's index and of the last colour mentioned."""
        has_colour = batch.colours != -100
        index = F.cross_entropy(self.model.lm_head(states[batch.rows, batch.columns]), batch.numbers)
        # Tokens before the first colour have no target, but every batch has some colour.
        return index + F.cross_entropy(self.model.lm_head(states[has_colour]), batch.colours[has_colour])

    def _velocity_loss(self, states: Tensor, batch: Batch) -> Tensor:
        """Mean L1 of each visible colour's velocity, in units of 1 / `VELOCITY_SCALE` of the frame."""
        predicted = self.velocity(states[batch.rows, batch.columns]).float().view_as(batch.velocities)
        known = ~batch.velocities.isnan()
        return _mean((predicted[known] - VELOCITY_SCALE * batch.velocities[known]).abs())


def _l1(head: nn.Linear, states: Tensor, true: Coordinates) -> Tensor:
    """Mean absolute error of a coordinate head over the present coordinates; 0 if there is none."""
    predicted = head(states[true.rows, true.columns]).float().view_as(true.points)
    return _mean((predicted - true.points).abs()[true.points != ABSENT])


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())


def train(
    tokenizer: PreTrainedTokenizerFast, config: TinyConfig, progress: Progress, stop: int | None = None
) -> Trainer:
    """Train for `config.vicuna_steps` optimizer steps, or the first `stop` of them, from where `progress` is.

    On one thread the same seed gives the same bits on the same kind of CPU with the same version of PyTorch. The layers
    compute in bfloat16 (autocast), and each kind of CPU sums in its own order.
    """
    steps = config.vicuna_steps
    weights = {name: weight for name, weight in WEIGHTS.items() if config.motion or name not in OF_MOTION}
    torch.manual_seed(config.seed)
    rng = np.random.default_rng([config.seed, 20])
    trainer = Trainer(build(len(tokenizer), config.width), tokenizer, config.frames).train()
    optimizer = torch.optim.AdamW(
        trainer.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    done = progress.resume(trainer, optimizer, schedule, rng)
    for step in range(done, steps if stop is None else min(stop, steps)):
        batch = make_batch([sample_dialogue(rng, config.frames) for _ in range(BATCH)], tokenizer, rng)
        losses = trainer.losses(batch)
        optimizer.zero_grad()
        torch.stack([weight * losses[name] for name, weight in weights.items()]).sum().backward()
        nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.keep(step + 1)
        if step % 50 == 0 or step == steps - 1:
            shown = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            log.info("vicuna step %d/%d: loss %s", step + 1, steps, shown)
    return trainer.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the model and its tokenizer in transformers' format."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
