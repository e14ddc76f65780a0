"""Trains a tiny CLIP image encoder on the synthetic world: the demo's features contain what is where in a picture.

CLIP's contrastive loss against captions learns, in the minute available, what is in a picture but hardly where. The
embedding is therefore trained by regression: its target is a random rotation of a code (engine/tiny/code.py) that holds,
for each colour, presence, position and shape. All numbers of the code have about the same variance, so an adapter with
random initial weights passes all of them on. A learned read-out would put positions into the directions of least variance.

Regression alone learns shapes slowly: a circle and a square of equal area differ in few pixels. So the shape numbers of a
visible thing are the logits of a cross-entropy, too.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dataloaders.decode.preprocess import CLIP_MEAN, CLIP_STD
from dataloaders.synthetic.render import draw
from dataloaders.synthetic.scene import COLOURS, SHAPES, Scene, sample_still, sample_things
from engine.tiny.code import FIELDS, PRESENCE, SHAPE, X, encode
from engine.tiny.progress import Progress

log = logging.getLogger(__name__)

SIZE = 64
BATCH = 128
LEARNING_RATE = 1.5e-3
CHANNELS = 64
SHAPE_WEIGHT = 3.0
"""Loss weight of a shape's numbers."""
NAME_WEIGHT = 2.0
"""Loss weight of the cross-entropy of a thing's shape."""
NAME_SCALE = 8.0
"""Logit of a shape per unit of its number in the code."""

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}


def pixel_values(images: np.ndarray) -> Tensor:
    """Normalise images (n, S, S, 3) uint8 as `PREPROCESSOR` defines, to (n, 3, S, S) float32."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def pixels(scenes: list[Scene]) -> Tensor:
    """Draw stills; (n, 3, S, S) float32."""
    return pixel_values(np.concatenate([draw(scene, SIZE) for scene in scenes]))


def sample_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Stills of up to three things."""
    return [sample_still(rng, sample_things(rng)) for _ in range(count)]


def code(scenes: list[Scene]) -> Tensor:
    """Code of stills, (n, CHANNELS) float32, 0 in the unused rest."""
    codes = np.concatenate([encode(scene, np.zeros(1, int)) for scene in scenes])
    return F.pad(torch.from_numpy(codes).flatten(1), (0, CHANNELS - len(COLOURS) * FIELDS))


def code_weights() -> Tensor:
    """(CHANNELS,) loss weight of each number of the code: highest for positions, low for the unused rest."""
    weights = torch.full((len(COLOURS), FIELDS), SHAPE_WEIGHT)
    weights[:, PRESENCE], weights[:, X:SHAPE] = 1.0, 2.0
    return F.pad(weights.flatten(), (0, CHANNELS - weights.numel()), value=0.1)


def name_loss(read: Tensor, codes: Tensor) -> Tensor:
    """Mean cross-entropy of the shapes of visible things, whose logits are the shape numbers of a code that was read.

    read, codes  (n, CHANNELS)
    """
    read, codes = (each[:, : len(COLOURS) * FIELDS].unflatten(1, (-1, FIELDS)) for each in (read, codes))
    visible = codes[..., PRESENCE] > 0
    return F.cross_entropy(NAME_SCALE * read[visible][:, SHAPE:], codes[visible][:, SHAPE:].argmax(1))


def build() -> CLIPVisionModelWithProjection:
    """The untrained encoder; its weights follow torch's global seed."""
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=8,
            projection_dim=CHANNELS,
        )
    )
    model.set_attn_implementation("eager")
    # At the usual scale (0.02) position embeddings are too small next to patch contents, and positions are not learned.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)
    return model


def train(steps: int, seed: int, progress: Progress, stop: int | None = None) -> CLIPVisionModelWithProjection:
    """Train for `steps` optimizer steps, or the first `stop` of them, from where `progress` is.

    As `vicuna.train`, reproducible on one thread.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 10])
    model = build().train()
    rotation = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS)).Q
    weights = code_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    done = progress.resume(model, optimizer, schedule, rng)
    for step in range(done, steps if stop is None else min(stop, steps)):
        scenes = sample_scenes(rng, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            embeds = model(pixel_values=pixels(scenes)).image_embeds
        read = embeds.float() @ rotation
        codes = code(scenes)
        loss = (F.smooth_l1_loss(read, codes, beta=0.1, reduction="none") * weights).sum(1).mean()
        named = name_loss(read, codes)
        optimizer.zero_grad()
        (loss + NAME_WEIGHT * named).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.keep(step + 1)
        if step % 100 == 0 or step == steps - 1:
            log.info("clip step %d/%d: loss %.3f, shapes %.3f", step + 1, steps, loss.item(), named.item())
    return model.eval()


@dataclass(frozen=True)
class Probe:
    """What a linear probe reads from embeddings of fresh stills about the red thing.

    position  R2 of its centre; a constant prediction reaches 0
    shape     share of its shapes that are right; chance is one third
    """

    position: float
    shape: float


@torch.no_grad()
def probe(model: CLIPVisionModelWithProjection, others: int, seed: int = 0, count: int = 900) -> Probe:
    """Probes fitted on two thirds of `count` stills of the red thing among `others`, and measured on the rest."""
    rng = np.random.default_rng([seed, 11])
    rest = [colour for colour in COLOURS if colour != "red"]
    scenes = []
    for _ in range(count):
        colours = ("red", *rng.choice(rest, others, replace=False))
        scenes.append(sample_still(rng, [(str(colour), str(rng.choice(SHAPES))) for colour in colours]))
    features = model(pixel_values=pixels(scenes)).image_embeds.double()
    x = torch.cat((features, torch.ones(count, 1, dtype=torch.double)), 1)
    centres = torch.from_numpy(np.stack([scene.things[0].path[0] for scene in scenes]))
    shapes = torch.tensor([SHAPES.index(scene.things[0].shape) for scene in scenes])
    split = count * 2 // 3

    def read(y: Tensor) -> Tensor:
        return x[split:] @ torch.linalg.lstsq(x[:split], y[:split]).solution

    error = (read(centres) - centres[split:]).square().sum()
    spread = (centres[split:] - centres[:split].mean(0)).square().sum()
    right = read(F.one_hot(shapes).double()).argmax(1) == shapes[split:]
    return Probe(1 - float(error / spread), float(right.double().mean()))


def save(model: CLIPVisionModelWithProjection, directory: Path) -> None:
    """Write the encoder and its preprocessor's settings in transformers' format."""
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
