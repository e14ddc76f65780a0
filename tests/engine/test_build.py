"""A stage's model before its first step: weights, the aligned adapter, coordinate heads that start near the centre."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from dataloaders.records import TokenizedSample
from engine.build import align_adapter, build_model
from engine.distributed.world import World
from engine.layout import Layout, Memory
from engine.recipes import recipe
from pite import checkpoint, names
from pite.checkpoint import save_pretrained
from pite.families import MODULES
from pite_kernels import quantize_weight
from tests.engine.distributed.ranks import launch
from tests.peak_memory import PeakMemory
from tests.samples import tiny_config, tiny_model

WORDS, ALWAYS, FRAME = (7, 8, 9), 5, 0
LAYERS, RANKS, SEED = 24, 2, 5
RECIPE = replace(recipe("tiny", 3), lora_rank=2)


class Features(dict):
    """A feature store in memory."""

    read = dict.__getitem__


def test_the_adapter_starts_as_the_map_from_features_to_the_captions_words():
    model = tiny_model(lora=False)
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((16, 16)))[0][: len(WORDS)]
    samples, features = [], Features()
    for present in product((False, True), repeat=len(WORDS)):
        words = [ALWAYS, *(word for word, there in zip(WORDS, present) if there), ALWAYS]
        ids = np.array([1, FRAME, *words])
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
    # A word that is in every caption has weight 0 and adds nothing.
    nothing_there = torch.from_numpy(features[str((False,) * 3)])
    assert model.vision_adapter(nothing_there).abs().max() < 1e-3 * embedding[ALWAYS].abs().max()


def test_coordinate_heads_start_near_the_centre_of_the_frame():
    model = tiny_model(lora=False)
    hidden = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for head in ("localization", "trajectory"):
        predicted = model.predict(hidden, head)
        assert (predicted - 0.5).abs().max() < 0.25
        assert predicted.std() > 0.01


def build_stage_3(directory: Path, shards: int, fp8: bool) -> int:
    """Build in bfloat16 with two earlier stages merged; save the tensors, the bytes kept and the peak above them."""
    world = World.join("cpu")
    with PeakMemory() as live:
        model = build_model(
            3, RECIPE, tiny_config(num_hidden_layers=LAYERS), llm=directory / "llm",
            merged=[str(directory / "one"), str(directory / "two")], dataset=None, store=None, seed=SEED, dtype=torch.bfloat16, fp8=fp8, world=world, layout=Layout(shards, 0, 1, Memory(0, 0, 0, 0)),
        )  # fmt: skip
        kept, extra = live.now, live.peak - live.now
    parameters = dict(model.named_parameters())
    sharded = {name for name, p in parameters.items() if isinstance(p, DTensor)}
    built = {name: p.to_local() if name in sharded else p.data for name, p in parameters.items()}
    torch.save((built, sharded, kept, extra), directory / f"{shards}-{fp8}-{world.rank}.pt")
    world.leave()
    return 0


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of many small layers, and two stages trained on it."""
    root = tmp_path_factory.mktemp("stages")
    save_pretrained(tiny_model(lora=False, num_hidden_layers=LAYERS), root / "llm")
    for i, stage in enumerate(("one", "two")):
        (root / stage).mkdir()
        lineage = {"stage": i + 1, "language_model": str(root / "llm"), "merged": [str(root / "one")] * i}
        model = tiny_model(seed=i + 1, num_hidden_layers=LAYERS)
        checkpoint.save_stage(model, root / stage, lineage)
    return root


@pytest.mark.parametrize("shards, fp8", [(1, False), (RANKS, False), (RANKS, True)])
def test_a_model_is_built_a_layer_at_a_time(stages: Path, shards: int, fp8: bool):
    ranks = launch(shards, stages / "logs", build_stage_3, stages, shards, fp8)
    assert ranks.wait() == [0] * shards, ranks.stderr(0)

    # The expected weights: those of the file and both stages' updates, summed in float32 and rounded once.
    expected = load_file(stages / "llm" / "model.safetensors")
    for stage in ("one", "two"):
        lora = load_file(stages / stage / "adapter_model.safetensors")
        for name in [n for n in lora if "lora_B" in n]:
            target = name.removeprefix("base_model.model.").replace("lora_B.", "")
            update = lora[name] @ lora[name.replace("lora_B", "lora_A")]
            expected[target] = expected[target] + 2 * update
    model = checkpoint.empty(tiny_config(num_hidden_layers=LAYERS), torch.bfloat16, "cpu")
    for name, tensor in names.language_model_tensors(model).items():
        tensor.copy_(expected[name].bfloat16())
    checkpoint.load_heads(model, stages / "two")
    model.add_lora(RECIPE.lora_rank, RECIPE.lora_alpha, seed=SEED + 3)
    layers = sum(p.nbytes for name, p in model.named_parameters() if "layers" in name and "lora" not in name)
    outside = sum(p.nbytes for name, p in model.named_parameters() if "layers" not in name)
    learning = {name: p.nbytes for name, p in model.named_parameters() if "lora_" in name or name.startswith(MODULES)}
    wanted = {name: p.data for name, p in model.named_parameters()}
    if fp8:
        for name in [n for n in wanted if n.endswith(("qkv.weight", "o.weight", "gate_up.weight", "down.weight"))]:
            for kind, tensor in quantize_weight(wanted.pop(name))._asdict().items():
                wanted[name.replace("weight", kind)] = tensor

    for rank in range(shards):
        built, sharded, kept, extra = torch.load(stages / f"{shards}-{fp8}-{rank}.pt")
        assert built.keys() == wanted.keys()
        assert sharded == (set(wanted) - set(learning) if shards > 1 else set())
        for name, tensor in wanted.items():
            assert torch.equal(built[name], tensor.chunk(shards)[rank] if name in sharded else tensor), name
        assert kept <= 1.1 * (layers + outside) / shards + sum(learning.values())
        # One layer, a float32 copy and update of a weight while it is merged or quantized, and the weights outside the
        # layers.
        assert extra <= 4 * layers / LAYERS + outside, f"{extra / layers:.0%} of all layers"
        assert 4 * layers / LAYERS + outside < layers / 5
