"""Build the model at the start of a stage: the language model, earlier stages merged into it, a new LoRA on top."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase

from dataloaders.files import sha256
from dataloaders.samples.dataset import StageDataset
from dataloaders.store.features import FeatureStore, Manifest
from engine.config import TrainConfig
from engine.distributed.world import World, shard_frozen
from engine.identity import ModelIdentity, first_difference
from engine.layout import Layout
from engine.recipes import RANDOM, Recipe, Size, Stage
from engine.tiny.tokenizer import build_tokenizer
from pite import checkpoint, names, tokenizers
from pite.config import PiTeConfig
from pite.families import ADDED_TOKENS, Name
from pite.families import family as choices_of
from pite.llava import weight_files
from pite.model import PiTe


def random_shape(
    size: Size,
    num_points: int,
    num_frames: int = 100,
    vision_feature_size: int = 768,
    family: Name = "pite",
    num_places: int = 0,
) -> PiTeConfig:
    """The shape of a size's language model; "tiny" is a stand-in of a million weights."""
    if size == "tiny":
        llm = LlamaConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=len(build_tokenizer()),
        )
    else:
        llm = PiTeConfig.preset(size).llm
    if choices_of(family).marks:
        llm.vocab_size += ADDED_TOKENS
    return PiTeConfig(llm, num_frames, num_points, vision_feature_size, family, num_places)


def load_tokenizer(llm: Path | str) -> PreTrainedTokenizerBase:
    """A language model's tokenizer; for random weights the synthetic world's, whose ids fit any vocabulary.

    Raises ValueError as `pite.tokenizers` does, and OSError if a Hugging Face name cannot be loaded.
    """
    if llm == RANDOM:
        return build_tokenizer()
    directory = Path(llm).expanduser()
    return tokenizers.load_tokenizer(directory) if directory.is_dir() else tokenizers.fetch_tokenizer(str(llm))


def model_config(llm: Path, config: TrainConfig) -> PiTeConfig:
    """The configuration: the language model's shape, the stored video features' frames and channels, and P."""
    return PiTeConfig.load(llm, num_points=config.model.num_points, **shape_of_features(config))


def shape_of_features(config: TrainConfig) -> dict[str, Any]:
    """The fields of `PiTeConfig` that the stored video features give. Raises ValueError for another family's features."""
    path, chosen = config.video_features, config.choices
    manifest = Manifest.load(path)
    if manifest.extractor != chosen.extractor:
        raise ValueError(
            f"the feature store {path} holds {manifest.extractor}, and --family {chosen.name} takes {chosen.extractor}: "
            f"give another --store, made by engine.encode --family {chosen.name}"
        )
    shape = {"num_frames": manifest.num_frames, "vision_feature_size": manifest.channels, "family": chosen.name}
    return {**shape, "num_places": manifest.tokens - manifest.num_frames}


def merged_stages(stage: Stage, start: Path | None, model: ModelIdentity) -> list[str]:
    """Directories whose LoRA is merged, in order, when a stage starts from `start` (an earlier stage's output).

    model  must be the same in both stages
    Raises ValueError if `start` is not a stage's output, or if something in `model` differs.
    """
    if start is None:
        return []
    if not (start / checkpoint.LINEAGE).exists():
        raise ValueError(
            f"stage {stage} starts from an earlier stage's output and {start} is not one: train that first"
        )
    lineage = checkpoint.read_lineage(start)
    difference = first_difference((lineage.get("made_of") or {}).get("model") or {}, asdict(model))
    if difference is not None:
        name, was, now = difference
        raise ValueError(f"stage {stage} cannot start from {start}: its {name} was {was} there and is {now} now")
    return [entry["path"] for entry in lineage["merged"]] + [str(start.resolve())]


def build_model(
    stage: Stage,
    recipe: Recipe,
    config: PiTeConfig,
    *,
    llm: Path | None,
    merged: Sequence[str],
    dataset: StageDataset,
    store: FeatureStore,
    seed: int,
    dtype: torch.dtype,
    fp8: bool,
    world: World,
    layout: Layout,
) -> PiTe:
    """A stage's model before its first step, laid out over the ranks, built on the device one decoder layer at a time.

    llm     directory of the language model; None for random weights
    merged  outputs of earlier stages, in order: their LoRA is merged, and training continues from the adapter and heads
            of the last one
    fp8     whether to quantize the layers' frozen weights to float8, after everything is merged into them
    """
    origin = checkpoint.WeightLoader(
        config, llm, [*map(Path, merged)], dtype=dtype, device=str(world.device), seed=seed
    )
    model = origin.without_layers()
    if merged:
        checkpoint.load_heads(model, Path(merged[-1]))
    elif recipe.align_adapter:
        if world.is_main:
            align_adapter(model, dataset, store)
        # Computed by one rank: linear algebra on another kind of CPU differs in the last bits.
        for parameter in model.vision_adapter.parameters():
            world.broadcast(parameter.data)
    if stage == 2 and recipe.head_init:
        model.initialize_trajectory_head()
    mesh = world.shard_mesh(layout.shards) if layout.shards > 1 else None
    draws = torch.Generator().manual_seed(seed + stage)
    for i in origin.layers(model):
        world.set_status(f"building layer {i + 1} of the model")
        for _, linear, _ in names.linear_layers(model, i):
            if recipe.lora_rank:
                linear.add_lora(recipe.lora_rank, recipe.lora_alpha, draws)
            if fp8:
                linear.quantize()
        if mesh is not None:
            shard_frozen(model.decoder.layers[i], mesh)
    if mesh is not None:
        shard_frozen(model, mesh)
    model.set_trainable(recipe.trainable_modules)
    model.decoder.checkpoint_activations(layout.recompute)
    return model


@torch.no_grad()
def align_adapter(
    model: PiTe, dataset: StageDataset, store: FeatureStore, most: int = 16_384, ridge: float = 0.01
) -> None:
    """Initialize the adapter as the linear map from features to the captions' words, in closed form.

    It is the ridge regression of each answer's bag of words on its media's mean feature. A bag of words is the sum of
    its tokens' embeddings, weighted by inverse document frequency, so "a" and "the" weigh nothing. An object in the
    picture is then mapped to the directions of the words for it in the language model's embedding.
    most   maximum number of samples to use, evenly spread over the data set
    ridge  regularization in units of the features' mean variance
    """
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int))
    samples = [dataset[int(i)] for i in chosen]
    features = torch.from_numpy(np.stack([store.read(sample.media).mean(0) for sample in samples])).double()
    answers = [torch.from_numpy(sample.token_ids[sample.target_positions]) for sample in samples]
    embedding = model.decoder.embed_tokens.detach().cpu()
    appears = torch.zeros(len(embedding))
    for answer in answers:
        appears[answer.unique()] += 1
    weight = torch.log(len(answers) / appears.clamp_min(1))
    words = torch.stack([weight[answer] @ embedding[answer].float() for answer in answers]).double()

    mean, words_mean = features.mean(0), words.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / len(centred)
    if not covariance.any():
        raise ValueError(f"the features of {store.path} are all the same: encode the media again")
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.double)
    solution = torch.linalg.solve(covariance, centred.T @ (words - words_mean) / len(centred)).T
    model.vision_adapter.weight.copy_(solution)
    model.vision_adapter.bias.copy_(words_mean - solution @ mean)


@cache
def language_model_checksum(directory: Path) -> str:
    """Shortened SHA-256 of each weight file that is read from a model directory: in order of their names, a projector last.

    In the Hugging Face cache a weight file is a link to a blob whose name is this checksum, so it is not read.
    """
    return " ".join((_blob_checksum(file) or sha256(file))[:16] for file in weight_files(directory))


def _blob_checksum(file: Path) -> str | None:
    blob = file.resolve()
    named = file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name)
    return blob.name if named else None
