"""From a video file to an answer and the drawn trajectories of the objects that it names."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from dataloaders.decode.video import sample_video
from pite import checkpoint, devices
from pite.chat.flags import ChatFlags
from pite.clip import ClipEncoder
from pite.config import PiTeConfig
from pite.draw import Track, save_video
from pite.evaluate.trajectories import trajectory_head_warning
from pite.generate import Answer, Generator
from pite.lineage import check_encoder
from pite.mentions import Phrase, find_named, find_phrases

log = logging.getLogger(__name__)


def chat(flags: ChatFlags) -> None:
    """Print the answer, and draw its objects if --trajectory is given. Raises ValueError.

    Everything small is loaded and checked before the language model.
    """
    device = devices.select(flags.device)
    directory = checkpoint.resolve(flags.model)
    checkpoint.check_trained(directory)
    config = PiTeConfig.load(directory)
    clip = _encoder(flags, config, device)
    frames = sample_video(flags.video, config.num_frames).frames
    # Half precision, as the stored features in training.
    features = clip.encode(np.stack([clip.preprocess.cropped(frame) for frame in frames])).half().cpu().numpy()
    generator = Generator.from_pretrained(directory, device)
    (answer,) = generator.answer(
        [flags.query], [features], max_new_tokens=flags.max_new_tokens, temperature=flags.temperature
    )
    print(answer.text)
    if flags.trajectory is None:
        return
    tracks = named_tracks(generator, flags.query, features, answer, flags.phrase)
    if not tracks and flags.phrase:
        raise ValueError(f"the answer does not contain {' or '.join(map(repr, flags.phrase))}: nothing was drawn")
    if warning := trajectory_head_warning(flags.model):
        log.warning(warning)
    save_video(flags.trajectory, frames, tracks)
    if tracks:
        log.info("%s: %s", flags.trajectory, ", ".join(track.label for track in tracks))
    else:
        log.warning(
            "%s: written without points, because no object was found in the answer; name one with --phrase",
            flags.trajectory,
        )


def _encoder(flags: ChatFlags, config: PiTeConfig, device: str) -> ClipEncoder:
    """The CLIP of --clip. Raises ValueError if the model was trained on the features of another one."""
    clip, remedy = ClipEncoder(flags.clip, device), "pass --clip the encoder that made its features"
    if clip.channels != config.vision_feature_size:
        raise ValueError(
            f"{flags.clip} gives {clip.channels} numbers per frame, but {flags.model} takes "
            f"{config.vision_feature_size}: {remedy}"
        )
    check_encoder(checkpoint.resolve(flags.model), clip.checksum, f"--clip {flags.clip}", remedy)
    return clip


def named_tracks(
    generator: Generator, question: str, features: np.ndarray, answer: Answer, names: Sequence[str] = ()
) -> list[Track]:
    """Predicted track of each noun phrase of an answer, or of each occurrence of one of `names`.

    A phrase's track is the mean over its tokens: in training all tokens of a phrase have the same target.
    """
    num_frames = generator.model.config.num_frames
    phrases = find_named(answer.text, names, num_frames) if names else find_phrases(answer.text, num_frames)
    if not phrases:
        return []
    trajectories = generator.trajectories(question, features, answer).numpy()
    starts, ends = token_spans(generator, answer).T
    tracks = []
    for phrase in phrases:
        tokens = (starts < phrase.end) & (ends > phrase.start)
        tracks.append(Track(phrase.text, trajectories[tokens].mean(0), span=_span(phrase, num_frames)))
    return tracks


def token_spans(generator: Generator, answer: Answer) -> np.ndarray:
    """Character span (L, 2) in `answer.text` of each generated token: start, and end (exclusive).

    Every prefix is decoded, because tokenizing the text again may give other tokens than were generated.
    """
    texts = [
        str(generator.tokenizer.decode(list(answer.token_ids[:count]), skip_special_tokens=True))
        for count in range(len(answer.token_ids) + 1)
    ]
    stripped = len(texts[-1]) - len(texts[-1].lstrip())
    ends = np.array([len(text) for text in texts]) - stripped
    return np.stack([ends[:-1], ends[1:]], axis=1).clip(0, len(answer.text))


def _span(phrase: Phrase, num_frames: int) -> tuple[int, int] | None:
    if phrase.interval is None:
        return None
    first, last = (round(time * num_frames) for time in phrase.interval)
    return min(first, last), max(first, last)
