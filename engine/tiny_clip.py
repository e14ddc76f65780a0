"""Train a tiny CLIP on the synthetic world, so that a demo starts from features that see what is where.

A contrastive loss alone is satisfied by *what* is in the picture. Batches are therefore made of groups of scenes with
the same things in other places: only position tells them apart (hard negatives), and a linear map of the image
embedding then yields coordinates, which is what PiTe's adapter and heads need.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from dataloaders.synthetic.render import draw
from dataloaders.synthetic.scene import COLOURS, SHAPES, Scene, sample_still, sample_things

SIZE = 64
GRID = 8
GROUP, GROUPS = 4, 32
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PAD, _BOS, _EOS = 0, 1, 3
_WORDS = (*COLOURS, *SHAPES, *(f"x{i}" for i in range(GRID)), *(f"y{i}" for i in range(GRID)))
_WORD_IDS = {word: i + 4 for i, word in enumerate(_WORDS)}
_CAPTION_LENGTH = 2 + 3 * 4

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
    "image_mean": list(MEAN),
    "image_std": list(STD),
}


def pixel_values(images: np.ndarray) -> Tensor:
    """Normalise images (n, S, S, 3) uint8 as `PREPROCESSOR` says, to (n, 3, S, S) float32."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def caption_ids(scene: Scene) -> list[int]:
    """A caption on a grid, "red circle x3 y5 blue ...", as token ids padded to one length, things in order of colour."""
    ids = [_BOS]
    for thing in sorted(scene.things, key=lambda thing: thing.colour):
        x, y = np.minimum(thing.path[0] * GRID, GRID - 1).astype(int)
        ids += [_WORD_IDS[word] for word in (thing.colour, thing.shape, f"x{x}", f"y{y}")]
    return ids + [_EOS] + [_PAD] * (_CAPTION_LENGTH - 1 - len(ids))


def build() -> CLIPModel:
    """The untrained model; its weights follow torch's global seed."""
    # transformers reads the projection's width from a tower's own settings when it loads that tower alone.
    tower = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    tower |= {"projection_dim": 64}
    text = tower | {"num_hidden_layers": 1, "max_position_embeddings": _CAPTION_LENGTH, "vocab_size": len(_WORDS) + 4}
    text |= {"pad_token_id": _PAD, "bos_token_id": _BOS, "eos_token_id": _EOS}
    vision = tower | {"image_size": SIZE, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    # At the usual scale (0.02) the patches' places drown in their contents, and position is never found.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.5)
    return model


def _batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    scenes = [sample_still(rng, things) for things in (sample_things(rng) for _ in range(GROUPS)) for _ in range(GROUP)]
    images = np.concatenate([draw(scene, SIZE) for scene in scenes])
    return pixel_values(images), torch.tensor([caption_ids(scene) for scene in scenes])


def _contrastive(model: CLIPModel, images: Tensor, captions: Tensor) -> Tensor:
    """CLIP's symmetric loss, where equal captions (empty scenes) count as equally right."""
    scores = model(input_ids=captions, attention_mask=(captions != _PAD).long(), pixel_values=images).logits_per_image
    same = (captions[:, None] == captions[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    entropy = torch.nn.functional.cross_entropy
    return (entropy(scores, target) + entropy(scores.T, target)) / 2


def train(steps: int, seed: int, report: int = 200) -> CLIPModel:
    """Train for a fixed number of steps; on one thread the same seed gives the same weights."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 10])
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=min(0.1, 50 / steps))
    for step in range(steps):
        loss = _contrastive(model, *_batch(rng))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6)
        if step % report == 0 or step == steps - 1:
            print(f"clip step {step + 1}/{steps}: contrastive loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def probe(model: CLIPModel, seed: int = 0, count: int = 900) -> tuple[float, float]:
    """R2 of a linear map from image embeddings to the red thing's centre: alone, and among two others.

    Fitted on two thirds of `count` fresh stills, measured on the rest; 0 is what a constant reaches.
    """
    rng = np.random.default_rng([seed, 11])
    scores = []
    for others in (0, 2):
        scenes = []
        for _ in range(count):
            colours = rng.choice([c for c in COLOURS if c != "red"], others, replace=False)
            scenes.append(sample_still(rng, [(str(c), str(rng.choice(SHAPES))) for c in ("red", *colours)]))
        images = np.concatenate([draw(scene, SIZE) for scene in scenes])
        features = model.get_image_features(pixel_values=pixel_values(images))
        features = getattr(features, "pooler_output", features).double()
        x = torch.cat((features, torch.ones(count, 1, dtype=torch.double)), 1)
        y = torch.tensor(np.stack([scene.things[0].path[0] for scene in scenes]))
        split = count * 2 // 3
        fit = torch.linalg.lstsq(x[:split], y[:split]).solution
        error = (x[split:] @ fit - y[split:]).square().sum()
        scores.append(1 - float(error / (y[split:] - y[:split].mean(0)).square().sum()))
    return scores[0], scores[1]


def save(model: CLIPModel, directory: Path) -> None:
    """Write the model and its preprocessor's settings as `CLIPVisionModelWithProjection` and friends read them."""
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=1))
