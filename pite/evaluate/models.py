"""Predictions of a model: answers to grounding questions, and trajectories."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from dataloaders.store.features import FeatureStore
from dataloaders.store.layout import store_of
from pite import checkpoint, devices
from pite.config import PiTeConfig
from pite.evaluate.flags import SPLIT, GroundingFlags, TrajectoriesFlags
from pite.evaluate.grounding import Events, Prediction, answer_questions, write_predictions
from pite.evaluate.reports import Report, num_events, trajectory_report
from pite.evaluate.trajectories import predict_trajectories, read_samples, trajectory_head_warning
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


def answer_all(flags: GroundingFlags, truth: dict[str, Events]) -> tuple[list[Prediction], int]:
    """The model's answer for every event, which --predictions stores, and its number of frames."""
    assert flags.model is not None and flags.store is not None, "GroundingFlags requires them"
    num_frames = PiTeConfig.load(checkpoint.resolve(flags.model)).num_frames
    if flags.num_frames not in (None, num_frames):
        raise ValueError(
            f"--num-frames {flags.num_frames}: {flags.model} has {num_frames} frames; leave --num-frames out"
        )
    generator, store = _open(flags.model, flags.store, flags.device)
    answers = answer_questions(
        generator,
        truth,
        lambda video: store.read(f"{SPLIT}/{video}"),
        question=flags.question,
        batch_size=flags.batch_size,
    )
    predictions = list(tqdm(answers, "answers", num_events(truth), unit="event", file=sys.stderr))
    if flags.predictions is not None:
        write_predictions(flags.predictions, predictions)
    return predictions, num_frames


def trajectories(flags: TrajectoriesFlags) -> Report:
    """Scores of the model's trajectories in the held-out answers."""
    generator, store = _open(flags.model, flags.store, flags.device)
    if warning := trajectory_head_warning(flags.model):
        log.warning(warning)
    samples = list(read_samples(flags.samples, generator.model, generator.tokenizer))
    return trajectory_report(*predict_trajectories(generator.model, samples, store.read), len(samples))


def _open(model: Path, features: Path, device: str) -> tuple[Generator, FeatureStore]:
    """The model on its device, and the store of the videos' features, checked before the weights are read."""
    device, store = devices.select(device), FeatureStore(store_of(features, SPLIT))
    directory = checkpoint.resolve(model)
    checkpoint.check_trained(directory)
    check_features(store, directory)
    return Generator.from_pretrained(directory, device), store
