"""A model's answers to the questions of benchmarks, with each video's prefix computed once."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloaders.ranks import Ranks
from dataloaders.store.features import FeatureStore
from dataloaders.transcripts import Transcripts
from pite import checkpoint, devices
from pite.config import PiTeConfig, check_family
from pite.evaluate.answer_log import AnswerLog, Settings
from pite.evaluate.inputs import Inputs, key_of
from pite.evaluate.plan import Window, plan, share_of
from pite.evaluate.predictions import Prediction
from pite.evaluate.questions import Question
from pite.families import Name
from pite.generate import Generator
from pite.lineage import check_encoder
from pite.prefixes import SharedPrefixes, VideoPrefixes

log = logging.getLogger(__name__)


def check_features(store: FeatureStore, model: Path) -> None:
    """Raise ValueError if a store holds other features of videos than a model in a local directory takes."""
    config, manifest = PiTeConfig.load(model), store.manifest
    if (manifest.tokens, manifest.channels) != (config.num_features, config.vision_feature_size):
        rows = "rows" if config.choices.marks else "frames"
        raise ValueError(
            f"the feature store {store.path} holds {manifest.channels} numbers for each of {manifest.tokens} {rows}, but "
            f"{model} takes {config.vision_feature_size} for each of {config.num_features}: give the features of "
            "its own encoder and frames"
        )
    if manifest.extractor != config.choices.extractor:
        raise ValueError(
            f"the feature store {store.path} holds {manifest.extractor}, and {model} takes {config.choices.extractor}: "
            f"give features that engine.encode --family {config.family} made"
        )
    check_encoder(model, manifest.encoder, f"the feature store {store.path}", "give the features of its own encoder")


class Model:
    """A model to evaluate. Its small files are checked at once; its weights are loaded when they are first needed.

    model       directory, or name on the hub
    device      as on the command line; of several processes each takes the GPU of its rank
    batch_size  questions per batch, and videos whose frames are in memory
    transcripts  folder of VIDEO.json or VIDEO.txt, for a model between two marks
    """

    def __init__(
        self,
        model: Path,
        device: str,
        batch_size: int,
        ranks: Ranks,
        family: Name | None = None,
        transcripts: Path | None = None,
    ) -> None:
        self.name, self.batch_size, self.ranks = str(model), batch_size, ranks
        self.device = devices.select(device_of(device, ranks))
        self.directory = checkpoint.resolve(model)
        checkpoint.check_trained(self.directory)
        self.config = PiTeConfig.load(self.directory)
        check_family(self.config, family, model)
        if transcripts is not None and not self.config.choices.marks:
            raise ValueError(f"{model} reads no transcript, which is for PG-Video-LLaVA: leave --transcripts out")
        self._transcripts = None if transcripts is None else Transcripts(transcripts)
        self._prefixes: SharedPrefixes | None = None

    @property
    def prefixes(self) -> SharedPrefixes:
        """The loaded model."""
        if self._prefixes is None:
            self._prefixes = SharedPrefixes(Generator.from_pretrained(self.directory, self.device))
        return self._prefixes

    @property
    def num_frames(self) -> int:
        return self.config.num_frames

    @property
    def generator(self) -> Generator:
        return self.prefixes.generator

    def check_features(self, store: FeatureStore) -> None:
        """Raise ValueError as the function of this name."""
        check_features(store, self.directory)

    def check_transcripts(self, inputs: Sequence[Inputs]) -> None:
        """Raise ValueError if none of the videos of these inputs has a transcript in --transcripts."""
        if self._transcripts is not None:
            self._transcripts.check(question.video for each in inputs for question in each.questions)

    def count_transcripts(self, inputs: Inputs) -> list[str]:
        """How many videos have a transcript, in a sentence; [] without --transcripts."""
        if self._transcripts is None:
            return []
        found, total = self._transcripts.count(question.video for question in inputs.questions)
        return [f"{found:,} of {total:,} videos have a transcript"]

    def settings(self, inputs: Inputs, max_new_tokens: int) -> Settings:
        """What the answers to questions depend on."""
        manifest = inputs.store.manifest
        quoted = sorted({(q.video, self._transcript(q.video)) for q in inputs.questions} if self._transcripts else ())
        return {
            **({"transcripts": hashlib.sha256(json.dumps(quoted).encode()).hexdigest()[:12]} if quoted else {}),
            "model": f"{self.name} ({checkpoint.identity(self.directory)})",
            "features": f"{inputs.store.path} ({manifest.encoder[:12]}, {manifest.compute_dtype})",
            "questions": inputs.checksum,
            "dtype": str(devices.dtype(devices.resolve(self.device))).removeprefix("torch."),
            "max_new_tokens": max_new_tokens,
        }

    def answer(
        self, inputs: Inputs, path: Path | None, max_new_tokens: int, overwrite: bool = False
    ) -> list[Prediction] | None:
        """Answer the questions of one task that `path` does not hold yet; returns all answers, in the questions' order.

        Everything but the weights is checked before they are loaded. Of several processes the first returns the answers
        of all, the others None. Raises ValueError for a file of other answers, as `AnswerLog`, and before the first
        answer for a question that the model cannot hold.
        """
        assert path is not None or self.ranks.size == 1
        settings = {} if path is None else self.settings(inputs, max_new_tokens)
        answers = AnswerLog(path, inputs.questions[0].task, settings, self.ranks, overwrite)
        mine = share_of(inputs.questions, self.ranks.rank, self.ranks.size)
        if any(question.key not in answers.answers for question in mine):
            self._answer(mine, inputs.store, answers, max_new_tokens)
        return answers.finish(inputs.questions)

    def _answer(self, questions: Sequence[Question], store: FeatureStore, answers: AnswerLog, most: int) -> None:
        rows, quoted = self.config.num_features, [self._transcript(question.video) for question in questions]
        lengths = [len(self.generator.prompt(q.text, rows, (), text)[0]) for q, text in zip(questions, quoted)]
        done = sum(question.key in answers.answers for question in questions)
        title = questions[0].task if self.ranks.size == 1 else f"{questions[0].task}, rank {self.ranks.rank}"
        with tqdm(
            total=len(questions),
            initial=done,
            desc=title,
            unit="question",
            file=sys.stderr,
            disable=self.ranks.rank > 0,
        ) as progress:
            for window in plan(questions, lengths, self.batch_size):
                for batch in self._answer_window(window, questions, store, answers, most):
                    new = [each for each in batch if each.key not in answers.answers]
                    answers.append(batch)
                    progress.update(len(new))
        if self.config.choices.marks:
            return
        shared = self.prefixes.rows
        log.info(
            "computed %s rows of the prompts' head, %s of frames and %s of questions",
            *(f"{count:,}" for count in (shared.head, shared.frames, shared.questions)),
        )

    def _answer_window(
        self, window: Window, questions: Sequence[Question], store: FeatureStore, answers: AnswerLog, most: int
    ) -> Iterator[list[Prediction]]:
        """The answers of each batch that is not complete yet.

        A batch that a kill left half written is answered anew as a whole, so that its answers are those of a run that
        was not killed.
        """
        batches = [[questions[i] for i in batch] for batch in window.batches]
        batches = [batch for batch in batches if any(question.key not in answers.answers for question in batch)]
        if not batches:
            return
        question_first = self.config.choices.marks
        prefixes = None if question_first else self._compute_frames(window.videos, store.read)
        number = {video: i for i, video in enumerate(window.videos)}
        for batch in batches:
            texts = [question.text for question in batch]
            if prefixes is None:
                # Nothing but the head is the same in two prompts.
                records = [store.read(key_of(question.video)).copy() for question in batch]
                quoted = [self._transcript(question.video) for question in batch]
                found = self.generator.answer(texts, records, transcripts=quoted, max_new_tokens=most)
            else:
                videos = [number[question.video] for question in batch]
                found = self.prefixes.answer(texts, prefixes, videos, max_new_tokens=most)
            yield [
                Prediction.of(question, answer.text, num_frames=self.num_frames)
                for question, answer in zip(batch, found, strict=True)
            ]

    def _transcript(self, video: str) -> str | None:
        return None if self._transcripts is None else self._transcripts.text(video)

    def _compute_frames(self, videos: Sequence[str], read: Callable[[str], np.ndarray]) -> VideoPrefixes:
        # Stacking copies the store's read-only views, which torch does not accept.
        return self.prefixes.videos([read(key_of(video)) for video in videos])


def device_of(name: str, ranks: Ranks) -> str:
    """The device of one of several processes: each takes the GPU of its rank, unless one is named."""
    if ranks.size == 1 or ":" in name or name == "cpu":
        return name
    import torch

    return f"cuda:{ranks.local}" if torch.cuda.is_available() else name
