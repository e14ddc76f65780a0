"""One question about one video: `python -m pite.chat --model DIR --video V --query Q [--trajectory overlay.mp4]`.

`--trajectory` draws the predicted trajectory of each object that the answer names: during the interval that the
object's sentence gives, or in every frame if it gives none. `pite.mentions` finds the objects; `--phrase` names them by
hand.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataloaders.decode.video import decode_video
from pite import devices
from pite.clip import ClipEncoder
from pite.draw import Track, save_video
from pite.evaluate.trajectories import trajectory_head_warning
from pite.generate import Answer, Generator
from pite.mentions import Phrase, find_named, find_phrases

CLIP = "openai/clip-vit-large-patch14"
"""The paper's encoder."""


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


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 after a one-sentence error."""
    arguments = _parser().parse_args(argv)
    try:
        _chat(arguments)
    except ValueError as error:
        print(f"pite.chat: {error}", file=sys.stderr)
        return 2
    return 0


def _chat(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {arguments.max_new_tokens}")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"--temperature must be 0 or more, not {arguments.temperature}")
    devices.select(arguments.device)
    generator = Generator.from_pretrained(arguments.model, device=arguments.device)
    clip = ClipEncoder(arguments.clip, arguments.device)
    config = generator.model.config
    if clip.channels != config.vision_feature_size:
        raise ValueError(
            f"{arguments.clip} gives {clip.channels} numbers per frame, but {arguments.model} was trained on "
            f"{config.vision_feature_size}: pass --clip the encoder that made its features"
        )
    frames = decode_video(arguments.video, config.num_frames)
    # Half precision, as the stored features in training.
    features = clip.encode(np.stack([clip.preprocess.cropped(frame) for frame in frames])).half().cpu().numpy()
    (answer,) = generator.answer(
        [arguments.query],
        [features],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )
    print(answer.text)
    if arguments.trajectory is None:
        return
    tracks = named_tracks(generator, arguments.query, features, answer, arguments.phrase)
    if not tracks and arguments.phrase:
        raise ValueError(f"the answer does not contain {' or '.join(map(repr, arguments.phrase))}: nothing was drawn")
    if warning := trajectory_head_warning(arguments.model):
        print(f"pite.chat: {warning}", file=sys.stderr)
    save_video(arguments.trajectory, frames, tracks)
    print(
        f"{arguments.trajectory}: {', '.join(track.label for track in tracks) or 'the answer names no object'}",
        file=sys.stderr,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pite.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", required=True, help="a stage's output, an export, or OWNER/NAME on the hub"
    )
    parser.add_argument("--video", type=Path, metavar="V", required=True, help="any file that FFmpeg decodes")
    parser.add_argument("--query", metavar="Q", required=True, help="the question")
    parser.add_argument(
        "--clip",
        default=CLIP,
        metavar="DIR",
        help="path or Hugging Face name of the CLIP that made the model's features (default: %(default)s)",
    )
    parser.add_argument("--trajectory", type=Path, metavar="MP4", help="draw the answer's objects into this file")
    parser.add_argument(
        "--phrase",
        action="append",
        default=[],
        help="draw this phrase of the answer instead of the phrases found by rule; can be repeated",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--device", default=devices.default(), help="cpu, cuda or cuda:1 (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
