"""Boxes of a model's answers to a benchmark's questions: the answer, its phrase, and the object of that phrase.

The model sees the frames of the interval that a question is about, and the answer is grounded in them, as in the published
evaluation of PG-Video-LLaVA. That one lets a language model cut one phrase out of the answer; here it is that of
`pite.ground.matching.answering`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloaders.decode.readable import DecodeError
from dataloaders.errors import sentence
from dataloaders.formats.fields import VIDEO_SUFFIXES
from dataloaders.ranks import Ranks
from pite import checkpoint, devices
from pite.chat.session import Model
from pite.evaluate.answer_log import AnswerLog, Settings
from pite.evaluate.answering import device_of
from pite.evaluate.plan import share_of
from pite.evaluate.predictions import Prediction
from pite.evaluate.questions import Question
from pite.evaluate.spatial.answers import TASK
from pite.evaluate.spatial.flags import SpatialFlags
from pite.evaluate.spatial.truth import Tube
from pite.ground.grounding import Footage, Grounder
from pite.ground.matching import answering
from pite.ground.models import grounder_settings, open_grounder

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128


def answer_questions(flags: SpatialFlags, tubes: Sequence[Tube], ranks: Ranks) -> None:
    """Answer the questions that the file of --predictions does not hold yet; it is in their order when all are there.

    A question fails whose video cannot be decoded, or whose answer names nothing that is found: its line has no box, and in
    the first case an `error`, with which it counts as not answered the next time. Raises ValueError for videos that are not
    there, for a file of other answers, and for whatever else keeps a question from being answered.
    """
    assert flags.model is not None and flags.videos is not None, "SpatialFlags requires both"
    files = find_videos(flags.videos, {tube.video for tube in tubes}, flags.skip_missing)
    of_number = {tube.query_id: tube for tube in tubes if tube.video in files}
    questions = [_question(tube) for tube in of_number.values()]
    # The first process compares the settings: the others need not read the models for their checksums.
    settings = {} if ranks.rank else _settings(flags, tubes)
    answers = AnswerLog(flags.predictions, TASK, settings, ranks, flags.overwrite)
    for prediction in answers.answers.values():
        _check_same_video(prediction, files)
    todo = [each for each in share_of(questions, ranks.rank, ranks.size) if each.key not in answers.answers]
    if todo:
        device = devices.select(device_of(flags.device, ranks))
        answerer = Answerer(Model(flags.model, flags.clip, device, 1, family=flags.family), open_grounder(flags))
        for question in tqdm(todo, TASK, unit=" questions", file=sys.stderr, disable=ranks.rank > 0):
            answers.append([answerer(of_number[int(question.query_id)], files[question.video])])
    answers.finish(questions)


class Answerer:
    """Answers questions. Nothing of one question is kept for the next, but the last video's features and times."""

    def __init__(self, model: Model, grounder: Grounder) -> None:
        self._model, self._grounder = model, grounder
        self._last: Footage | None = None

    def __call__(self, tube: Tube, video: Path) -> Prediction:
        """The line of a question: one box in each frame that has one, or the error of a video that cannot be decoded."""
        known = {"bytes": video.stat().st_size}
        try:
            footage = self._footage(video)
            span = tube.span[0], min(tube.span[1], len(footage.times))
            if span[0] >= span[1]:
                raise DecodeError(
                    f"{video}: has {len(footage.times):,} frames, and the question is about frames {tube.span[0]:,} to "
                    f"{tube.span[1] - 1:,}"
                )
            features = self._model.videos.get(video, footage.seconds(span)).features
            (answer,) = self._model.generator.answer([tube.question], [features], max_new_tokens=MAX_NEW_TOKENS)
            grounded = self._grounder.find(footage, answer.text, span)
        except DecodeError as error:
            why = sentence(error).replace(str(video), video.name)
            return Prediction.of(_question(tube), "", **known, size=tube.size, boxes={}, error=why)
        phrase = answering(tube.question, grounded.phrases)
        own = dict(grounded.phrases)[phrase] if phrase is not None else ()
        boxes = grounded.objects[own[0]].boxes() if own else {}
        listed = {str(frame): [np.round(box, 1).tolist()] for frame, box in boxes.items()}
        name = None if phrase is None else phrase.text
        return Prediction.of(_question(tube), answer.text, **known, size=footage.size, phrase=name, boxes=listed)

    def _footage(self, video: Path) -> Footage:
        if self._last is None or self._last.path != video:
            self._last = Footage.of(video)
        return self._last


def find_videos(folder: Path, names: set[str], skip_missing: bool = False) -> dict[str, Path]:
    """The files of some videos in a folder and its folders, by name.

    Raises ValueError for two files of one name, and for videos that are not there: all of them with `skip_missing`.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.stem in names and file.suffix.lower() in VIDEO_SUFFIXES:
            if file.stem in files:
                raise ValueError(
                    f"--videos {folder}: holds {file.stem!r} twice, {files[file.stem]} and {file}: remove one"
                )
            files[file.stem] = file
    missing = sorted(names - files.keys())
    if missing and not (files and skip_missing):
        remedy = "" if not files else ", or count their questions as failures with --skip-missing"
        raise ValueError(
            f"--videos {folder}: lacks {len(missing):,} of {len(names):,} videos, such as {missing[0]}: give the folder that "
            f"holds them{remedy}"
        )
    if missing:
        log.warning("%s of %s videos are missing, such as %s", f"{len(missing):,}", f"{len(names):,}", missing[0])
    return files


def _question(tube: Tube) -> Question:
    return Question(tube.video, TASK, tube.query_id, tube.question)


def _settings(flags: SpatialFlags, tubes: Sequence[Tube]) -> Settings:
    """What the answers and boxes depend on, apart from the videos."""
    assert flags.model is not None
    chosen = json.dumps([[tube.video, tube.query_id, tube.question, *tube.span] for tube in tubes])
    return {
        "model": f"{flags.model} ({checkpoint.identity(checkpoint.resolve(flags.model))})",
        "clip": flags.clip,
        "questions": hashlib.sha256(chosen.encode()).hexdigest()[:12],
        "dtype": str(devices.dtype(devices.resolve(flags.device))).removeprefix("torch."),
        "max_new_tokens": MAX_NEW_TOKENS,
        **grounder_settings(flags),
    }


def _check_same_video(prediction: Prediction, files: Mapping[str, Path]) -> None:
    """Raise ValueError if an answer is about another file than that in --videos."""
    video = files.get(prediction.video)
    if video is not None and prediction.info.get("bytes") != video.stat().st_size:
        raise ValueError(f"--predictions holds an answer about another file than {video}: replace all with --overwrite")
