"""Predictions of a model: answers to grounding questions, and trajectories."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from dataloaders.store.features import FeatureStore
from dataloaders.store.layout import store_of
from pite import checkpoint, devices
from pite.config import PiTeConfig
from pite.evaluate import grounding
from pite.evaluate.flags import SPLIT, GroundingFlags, TrajectoriesFlags
from pite.evaluate.predictions import Prediction, PredictionWriter
from pite.evaluate.reports import Report
from pite.evaluate.trajectories import predict_trajectories, read_samples, report, trajectory_head_warning
from pite.generate import Generator
from pite.lineage import check_encoder

log = logging.getLogger(__name__)


def check_features(store: FeatureStore, model: Path) -> None:
    """Raise ValueError if a store holds other features of videos than a model in a local directory takes."""
    config, manifest = PiTeConfig.load(model), store.manifest
    if (manifest.tokens, manifest.channels) != (config.num_frames, config.vision_feature_size):
        raise ValueError(
            f"the feature store {store.path} holds {manifest.channels} numbers for each of {manifest.tokens} frames, but "
            f"{model} takes {config.vision_feature_size} for each of {config.num_frames}: give the features of "
            "its own encoder and frames"
        )
    check_encoder(model, manifest.encoder, f"the feature store {store.path}", "give the features of its own encoder")


def answer_all(flags: GroundingFlags, truth: grounding.Truth) -> tuple[list[Prediction], int]:
    """The model's answer for every event, which --predictions stores, and its number of frames."""
    assert flags.model is not None and flags.store is not None, "GroundingFlags requires them"
    num_frames = PiTeConfig.load(checkpoint.resolve(flags.model)).num_frames
    if flags.num_frames not in (None, num_frames):
        raise ValueError(
            f"--num-frames {flags.num_frames}: {flags.model} has {num_frames} frames; leave --num-frames out"
        )
    generator, store = _open(flags.model, flags.store, flags.device)
    questions = grounding.questions(truth, flags.question)
    predictions: list[Prediction] = []
    for start in range(0, len(questions), flags.batch_size):
        batch = questions[start : start + flags.batch_size]
        features = [np.array(store.read(f"{SPLIT}/{question.video}")) for question in batch]
        answers = generator.answer([q.text for q in batch], features, max_new_tokens=grounding.MAX_NEW_TOKENS)
        predictions += [
            Prediction.of(question, answer.text, num_frames=num_frames) for question, answer in zip(batch, answers)
        ]
    if flags.predictions is not None:
        with PredictionWriter(flags.predictions) as writer:
            writer.append(predictions)
    return predictions, num_frames


def trajectories(flags: TrajectoriesFlags) -> Report:
    """Scores of the model's trajectories in the held-out answers."""
    generator, store = _open(flags.model, flags.store, flags.device)
    if warning := trajectory_head_warning(flags.model):
        log.warning(warning)
    samples = list(read_samples(flags.samples, generator.model, generator.tokenizer))
    return report(*predict_trajectories(generator.model, samples, store.read), len(samples))


def _open(model: Path, features: Path, device: str) -> tuple[Generator, FeatureStore]:
    """The model on its device, and the store of the videos' features, checked before the weights are read."""
    device, store = devices.select(device), FeatureStore(store_of(features, SPLIT))
    directory = checkpoint.resolve(model)
    checkpoint.check_trained(directory)
    check_features(store, directory)
    return Generator.from_pretrained(directory, device), store
