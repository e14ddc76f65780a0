"""Trains a tiny CLIP image encoder on the synthetic world: the demo's features contain what is where in a picture.

CLIP's contrastive loss against captions learns, in the minute available, what is in a picture but hardly where. The
embedding is therefore trained by regression: its target is a random rotation of a code that holds, for each colour,
presence, position and shape. All numbers of the code have about the same variance, so an adapter with random initial
weights passes all of them on. A learned read-out would put positions into the directions of least variance.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from dataloaders.decode.preprocess import CLIP_MEAN, CLIP_STD
from dataloaders.synthetic.render import draw
from dataloaders.synthetic.scene import COLOURS, SHAPES, Scene, sample_still, sample_things

log = logging.getLogger(__name__)

SIZE = 64
BATCH = 128
LEARNING_RATE = 2e-3
CHANNELS = 64
_COLOURS = tuple(COLOURS)

_FIELDS = 3 + len(SHAPES)
"""Numbers of the code for each colour: presence, x, y, and one for each shape."""

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


def code(scenes: list[Scene]) -> Tensor:
    """Code of stills, (n, CHANNELS) float32: `_FIELDS` numbers of unit scale per colour, 0 if it is absent."""
    codes = np.zeros((len(scenes), len(COLOURS), _FIELDS), np.float32)
    for row, scene in zip(codes, scenes):
        for thing in scene.things:
            row[_COLOURS.index(thing.colour), :3] = 1.0, *(4 * (thing.path[0] - 0.5))
            row[_COLOURS.index(thing.colour), 3 + SHAPES.index(thing.shape)] = 0.5
    return F.pad(torch.from_numpy(codes).flatten(1), (0, CHANNELS - len(COLOURS) * _FIELDS))


def code_weights() -> Tensor:
    """(CHANNELS,) loss weight of each number of the code: highest for positions, low for the unused rest."""
    weights = torch.tensor([1.0, 2.0, 2.0] + [0.3] * len(SHAPES)).repeat(len(COLOURS))
    return F.pad(weights, (0, CHANNELS - len(weights)), value=0.1)


def build() -> CLIPVisionModelWithProjection:
    """The untrained encoder; its weights follow torch's global seed."""
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=16,
            projection_dim=CHANNELS,
        )
    )
    # At the usual scale (0.02) position embeddings are too small next to patch contents, and positions are not learned.
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)
    return model


def train(steps: int, seed: int) -> CLIPVisionModelWithProjection:
    """Train for a fixed number of steps; on one thread the same seed gives the same weights."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 10])
    model = build().train()
    rotation = torch.linalg.qr(torch.randn(CHANNELS, CHANNELS)).Q
    weights = code_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        scenes = [sample_still(rng, sample_things(rng)) for _ in range(BATCH)]
        read = model(pixel_values=pixels(scenes)).image_embeds @ rotation
        loss = (F.smooth_l1_loss(read, code(scenes), beta=0.1, reduction="none") * weights).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log.info("clip step %d/%d: loss %.3f", step + 1, steps, loss.item())
    return model.eval()


@torch.no_grad()
def probe(model: CLIPVisionModelWithProjection, seed: int = 0, count: int = 900) -> tuple[float, float]:
    """R2 of a linear probe from image embeddings to the red thing's centre: alone, and among two others.

    It is fitted on two thirds of `count` fresh stills and measured on the rest. A constant prediction reaches 0.
    """
    rng = np.random.default_rng([seed, 11])
    scores = []
    for others in (0, 2):
        scenes = []
        for _ in range(count):
            colours = rng.choice([c for c in COLOURS if c != "red"], others, replace=False)
            scenes.append(sample_still(rng, [(str(c), str(rng.choice(SHAPES))) for c in ("red", *colours)]))
        features = model(pixel_values=pixels(scenes)).image_embeds.double()
        x = torch.cat((features, torch.ones(count, 1, dtype=torch.double)), 1)
        y = torch.from_numpy(np.stack([scene.things[0].path[0] for scene in scenes]))
        split = count * 2 // 3
        fit = torch.linalg.lstsq(x[:split], y[:split]).solution
        error = (x[split:] @ fit - y[split:]).square().sum()
        scores.append(1 - float(error / (y[split:] - y[:split].mean(0)).square().sum()))
    return scores[0], scores[1]


def save(model: CLIPVisionModelWithProjection, directory: Path) -> None:
    """Write the encoder and its preprocessor's settings in transformers' format."""
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
