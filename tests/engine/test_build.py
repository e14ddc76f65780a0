"""How a stage's model starts: the adapter in the words of the captions, the coordinate heads near the centre."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch

from dataloaders.records import TokenizedSample
from engine.build import align_adapter
from tests.samples import tiny_model

WORDS, ALWAYS, FRAME = (7, 8, 9), 5, 0


class Features(dict):
    """A feature store in memory."""

    read = dict.__getitem__


def test_the_adapter_starts_as_the_map_from_features_to_the_captions_words():
    model = tiny_model(lora=False)
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((16, 16)))[0][: len(WORDS)]
    samples, features = [], Features()
    for present in product((False, True), repeat=len(WORDS)):
        said = [ALWAYS, *(word for word, there in zip(WORDS, present) if there), ALWAYS]
        ids = np.array([1, FRAME, *said])
        name = str(present)
        nothing = np.zeros((0, 1, 1, 2), np.float32)
        samples.append(TokenizedSample(name, name, ids, 1, 1, np.arange(2, len(ids)), np.array([], int), nothing))
        features[name] = (3 + np.array(present) @ directions)[None].astype(np.float32)
    align_adapter(model, samples, features, ridge=1e-6)

    weight, embedding = model.vision_adapter.weight.detach(), model.decoder.embed_tokens.detach()
    for word, direction in zip(WORDS, directions):
        # Each word is in half of the captions.
        torch.testing.assert_close(
            weight @ torch.from_numpy(direction).float(), np.log(2) * embedding[word], rtol=1e-3, atol=1e-4
        )
    # A word of every caption says nothing about any picture, and adds nothing.
    nothing_there = torch.from_numpy(features[str((False,) * 3)])
    assert model.vision_adapter(nothing_there).abs().max() < 1e-3 * embedding[ALWAYS].abs().max()


def test_coordinate_heads_start_near_the_centre_of_the_frame():
    model = tiny_model(lora=False)
    hidden = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for head in ("localization", "trajectory"):
        predicted = model.predict(hidden, head)
        assert (predicted - 0.5).abs().max() < 0.25
        assert predicted.std() > 0.01
