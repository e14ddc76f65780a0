"""A chat about videos, in Python: `Session.load("runs/pite-7b/stage3/final").answer("video.mp4", "What happens?")`.

Several questions about one video are the turns of one conversation, as in PiTe-143k and VTimeLLM's stage 2: the prompt
of a later question is the beginning of the training sample that holds all turns. The keys and values of the rows that
it shares with the prompt and answer before are not computed again. That is usually all of them; where the model wrote a
word in other tokens than training has for it, it is all up to there.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from dataloaders.records import Turn
from pite import checkpoint, devices
from pite.chat.flags import CLIP
from pite.chat.pieces import Pieces
from pite.chat.reply import Reply, reply_of
from pite.chat.videos import Computed, Video, Videos
from pite.clip import ClipEncoder
from pite.config import PiTeConfig, check_family
from pite.families import Name
from pite.generate import Generator, cleaned
from pite.lineage import check_encoder, sampling_of
from pite.pooled import load_encoder
from pite.published import load_published
from pite.tokenizers import load_tokenizer

log = logging.getLogger(__name__)


class Model:
    """A model with its encoder, and the videos that were encoded with it; sessions share it.

    The encoder is loaded and checked at once, the language model at its first use.
    """

    def __init__(
        self,
        model: Path | str,
        clip: str,
        device: str,
        max_videos: int,
        adapters: Sequence[Path] = (),
        family: Name | None = None,
    ) -> None:
        self._directory, self._adapters, self._device = checkpoint.resolve(model), adapters, device
        if not adapters:
            checkpoint.check_trained(self._directory)
        self.config = PiTeConfig.load(self._directory)
        # A published model has no record, and its family's rule.
        sampling = sampling_of(self._directory) if not self.config.choices.marks else self.config.choices.sampling
        check_family(self.config, family, model)
        self.videos = Videos(self._encoder(model, clip), self.config.num_frames, sampling, max_videos)

    @cached_property
    def generator(self) -> Generator:
        if not self._adapters:
            return Generator.from_pretrained(self._directory, self._device)
        dtype = devices.dtype(devices.resolve(self._device))
        model = load_published(self._directory, self._adapters, dtype, self._device)
        return Generator(model, load_tokenizer(self._directory))

    def _encoder(self, model: Path | str, name: str) -> ClipEncoder:
        """The CLIP `name`. Raises ValueError if the model was trained on the features of another one."""
        name = self.config.choices.clip if name == CLIP else name
        clip, remedy = (
            load_encoder(self.config.choices, name, self._device),
            "pass --clip the encoder that made its features",
        )
        if clip.channels != self.config.vision_feature_size:
            raise ValueError(
                f"{name} gives {clip.channels} numbers per frame, but {model} takes "
                f"{self.config.vision_feature_size}: {remedy}"
            )
        check_encoder(self._directory, clip.checksum, f"--clip {name}", remedy)
        return clip


class Session:
    """Conversations of one user, one for each video.

    last  the reply to the last question; None while it is generated, and after an answer that was stopped
    """

    def __init__(self, model: Model, max_videos: int = 8, history: bool = True, transcript: str | None = None) -> None:
        self.model, self.history, self.transcript = model, history, transcript
        self.last: Reply | None = None
        self._max_videos = max_videos
        self._turns: OrderedDict[Path, list[Turn]] = OrderedDict()

    @staticmethod
    def load(
        model: Path | str,
        *,
        clip: str = CLIP,
        device: str = "auto",
        max_videos: int = 8,
        adapters: Sequence[Path] = (),
        history: bool = True,
        family: Name | None = None,
        transcript: str | None = None,
    ) -> Session:
        """Load a stage's output, an export or a model's name on the hub.

        adapters    folders of the authors' published adapters, in order (pite/published.py); then `model` is Vicuna
        history     a prompt holds the earlier turns about its video; off for a model that was trained on single questions
        clip        path or Hugging Face name of the CLIP that made the model's features
        max_videos  encoded videos and conversations to keep; after that the oldest is forgotten
        family      the model's family, which is refused if it is another; None for any
        transcript  of the videos' sound, which PG-Video-LLaVA's prompts quote
        The language model's weights are loaded for the first answer, after the video was decoded. Raises ValueError
        (one sentence) for what cannot be loaded, and for another encoder than the model's.
        """
        loaded = Model(model, clip, str(devices.resolve(device)), max_videos, adapters, family)
        if transcript is not None and not loaded.config.choices.marks:
            raise ValueError(f"{model} reads no transcript, which is for PG-Video-LLaVA: leave it out")
        return Session(loaded, max_videos, history, transcript)

    def fork(self) -> Self:
        """A session of another user, with the same model and encoded videos and no conversation."""
        return type(self)(self.model, self._max_videos, self.history, self.transcript)

    def forget(self, video: Path | str) -> None:
        """Start a new conversation about a video."""
        self._turns.pop(Path(video).resolve(), None)

    def answer(
        self,
        video: Path | str,
        question: str,
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        phrases: Sequence[str] = (),
    ) -> Reply:
        """The reply to a question, after the earlier questions about the same video; greedy at temperature 0.

        phrases  draw these parts of the answer, instead of its noun phrases
        Raises ValueError (one sentence) for a file that is no video, and for a question without text or of more tokens
        than the model's context holds.
        """
        stream = self.stream(video, question, max_new_tokens=max_new_tokens, temperature=temperature, phrases=phrases)
        for _ in stream:
            pass
        assert self.last is not None
        return self.last

    def stream(
        self,
        video: Path | str,
        question: str,
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        phrases: Sequence[str] = (),
    ) -> Iterator[str]:
        """As `answer`, but an iterator of pieces of the text, as they are made. After the last one, `last` is the reply.

        An iterator that is closed before its end stops the answer, and the conversation is as before the question.
        """
        self.last = None
        found, text = self.model.videos.get(Path(video)), cleaned(question)
        generator, turns = self.model.generator, self._turns.get(Path(video).resolve(), [])
        turns = self._fitting(turns, text, max_new_tokens)
        ids, frame_start = generator.prompt(text, len(found.features), turns, self.transcript)
        pieces, tokens, hidden = Pieces(generator), list[int](), list[Tensor]()
        for token, state in self._tokens(found, ids, frame_start, max_new_tokens, temperature):
            tokens.append(token)
            hidden.append(state)
            if piece := pieces.of(tokens):
                yield piece
        answer = generator.decoded(tokens)
        self.last = reply_of(answer, generator.trajectories(hidden), found, generator.tokenizer, phrases)
        self._remember(Path(video).resolve(), turns, Turn(text, answer.text))
        if rest := pieces.rest(answer.text):
            yield rest

    def _tokens(
        self, video: Video, ids: np.ndarray, frame_start: int, max_new_tokens: int, temperature: float
    ) -> Iterator[tuple[int, Tensor]]:
        """The tokens and hidden states of an answer. Only the rows that are not computed yet are."""
        generator, computed = self.model.generator, video.computed
        shared = computed.common(ids)
        cache, made = computed.cache(shared), list[int]()
        rest = generator.embed(ids, frame_start, video.features)[shared:]
        for token, state in generator.tokens(rest, cache, generator.room(len(ids), max_new_tokens), temperature):
            # Kept at each token, because the reader may stop the answer; in the middle of a step a cache is not whole.
            video.computed = Computed.of([*ids, *made], cache)
            made.append(token)
            yield token, state
        video.computed = Computed.of([*ids, *made], cache)

    def _fitting(self, turns: list[Turn], question: str, max_new_tokens: int) -> list[Turn]:
        """The last turns that leave room in the context for an answer, or for a quarter of it."""
        context, generator = self.model.config.context_length, self.model.generator
        limit, dropped = context - min(max_new_tokens, context // 4), 0
        rows = self.model.config.num_features
        while turns and len(generator.ids(question, rows, turns, self.transcript)[0]) > limit:
            turns, dropped = turns[1:], dropped + 1
        if dropped:
            log.warning("the first %d questions are left out: the context of the language model is full", dropped)
        return turns

    def _remember(self, video: Path, turns: list[Turn], turn: Turn) -> None:
        # Training has no empty answers.
        self._turns[video] = [*turns, turn] if turn.answer and self.history else turns
        self._turns.move_to_end(video)
        while len(self._turns) > self._max_videos:
            self._turns.popitem(last=False)
