"""Which questions can be answered: the features of their videos are looked up before the model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dataloaders.failures import LEDGER, read_failures
from dataloaders.formats import Split
from dataloaders.store.features import FeatureStore
from dataloaders.store.layout import store_of
from pite.evaluate.questions import Question

SPLIT: Split = "evaluation"
"""The held-out split: its folder in a data folder, and the first part of its features' keys."""


def key_of(video: str) -> str:
    """The key of a video's features."""
    return f"{SPLIT}/{video}"


@dataclass(frozen=True)
class LeftOut:
    """Videos without features, whose questions are not put to the model.

    failed   video -> the reason in the ledger of engine.encode
    missing  those that the ledger does not name
    """

    failed: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def videos(self) -> set[str]:
        return {*self.failed, *self.missing}

    def lines(self) -> list[str]:
        """A sentence for each kind of video that was left out."""
        lines = []
        if self.failed:
            video, reason = next(iter(self.failed.items()))
            lines.append(f"{_videos(len(self.failed))} left out that could not be encoded, such as {video}: {reason}")
        if self.missing:
            lines.append(f"{_videos(len(self.missing))} left out without features, such as {self.missing[0]}")
        return lines

    def counts(self) -> dict[str, int]:
        return {"videos left out, not encoded": len(self.failed), "videos left out, missing": len(self.missing)}


@dataclass(frozen=True)
class Inputs:
    """The questions that can be answered, the features of their videos, and the videos that are left out.

    checksum  of all questions, also of those that are left out
    """

    questions: list[Question]
    store: FeatureStore
    left_out: LeftOut
    checksum: str


def open_store(features: Path) -> FeatureStore:
    """The store of the held-out videos' features in a folder of feature stores."""
    return FeatureStore(store_of(features, SPLIT))


def find_features(
    questions: Sequence[Question], store: FeatureStore, features: Path, skip_missing: bool = False
) -> Inputs:
    """The questions about videos that have features. Arguments and errors as of `look_up`."""
    left_out = look_up((question.video for question in questions), store, features, skip_missing)
    absent = left_out.videos
    texts = json.dumps(sorted((str(question.key), question.text) for question in questions))
    checksum = hashlib.sha256(texts.encode()).hexdigest()[:12]
    return Inputs([question for question in questions if question.video not in absent], store, left_out, checksum)


def look_up(videos: Iterable[str], store: FeatureStore, features: Path, skip_missing: bool = False) -> LeftOut:
    """The videos that a store in the folder `features` lacks.

    Videos that the ledger of engine.encode names as failed are left out. Raises ValueError for others without features,
    unless `skip_missing` leaves these out too, and if no video has features.
    """
    videos = dict.fromkeys(videos)
    absent = [video for video in videos if key_of(video) not in store]
    reasons = {failure.id: failure.reason for failure in read_failures(features / LEDGER)} if absent else {}
    failed = {video: reasons[key_of(video)] for video in absent if key_of(video) in reasons}
    missing = tuple(video for video in absent if video not in failed)
    if missing and not skip_missing:
        raise ValueError(
            f"the feature store {store.path} lacks {len(missing):,} of {len(videos):,} videos, the first is "
            f"{missing[0]!r}: run engine.encode for them, or leave them out with --skip-missing"
        )
    if absent and len(absent) == len(videos):
        raise ValueError(f"the feature store {store.path} holds none of the {len(videos):,} videos: run engine.encode")
    return LeftOut(failed, missing)


def _videos(count: int) -> str:
    return "1 video is" if count == 1 else f"{count:,} videos are"
