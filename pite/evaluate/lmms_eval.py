"""PiTe as a model of lmms-eval, which must be installed (pip install lmms-eval).

    python -m pite.evaluate.lmms_eval --model pite --model_args pretrained=DIR,clip=DIR --tasks activitynetqa --batch_size 16

takes the arguments of lmms-eval. lmms-eval hands over video files, so frames are decoded and encoded here, once for all
questions about a video. Answers are generated with shared prefixes, as in pite.evaluate.

`PiTeModel` is a subclass of lmms-eval's `lmms`, and exists when it is first used: importing this module needs neither
lmms-eval nor torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataloaders.ranks import Ranks
from pite.chat.flags import CLIP

if TYPE_CHECKING:
    from pite.clip import ClipEncoder
    from pite.config import PiTeConfig
    from pite.prefixes import SharedPrefixes

NAME = "pite"


def manifest() -> Any:
    """What registers the model with lmms-eval; it can be an entry point of the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path=f"{__name__}.PiTeModel")


def main() -> None:
    """lmms-eval's command line, with the model registered."""
    try:
        from lmms_eval.__main__ import cli_evaluate
        from lmms_eval.models import MODEL_REGISTRY_V2
    except ImportError as error:
        sys.exit(f"pite.evaluate.lmms_eval: lmms-eval cannot be imported ({error}): pip install lmms-eval")
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    cli_evaluate()


def __getattr__(name: str) -> Any:
    if name != "PiTeModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The next look-up finds it in the module.
    globals()[name] = found = _make_class()
    return found


def _make_class() -> type:
    from lmms_eval.api.model import lmms

    return type("PiTeModel", (_Adapter, lmms), {"__doc__": _Adapter.__doc__, "__module__": __name__})


class _Adapter:
    """A PiTe model that answers questions about one video each; the methods of lmms-eval's `lmms`.

    pretrained  a stage's output, an export, or OWNER/NAME on the hub
    clip        path or Hugging Face name of the CLIP that made the model's features
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        clip: str = CLIP,
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
    ) -> None:
        from pite import checkpoint, devices
        from pite.config import PiTeConfig

        super().__init__()
        if Ranks.read().size > 1:
            raise ValueError("PiTe runs in one process in lmms-eval: several GPUs are used by pite.evaluate")
        self.batch_size = _batch_size(batch_size)
        name, directory = devices.select(device), checkpoint.resolve(pretrained)
        checkpoint.check_trained(directory)
        self.device, self._config = devices.resolve(name), PiTeConfig.load(directory)
        if self._config.family != "pite":
            raise ValueError(
                f"{pretrained} is a model of the family {self._config.family}, which this adapter does not run: use pite.evaluate"
            )
        self._clip = _load_clip(clip, name, directory, self._config)
        self._prefixes = _load(directory, name)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request (text, settings, function to the visuals, number, task, split), in order."""
        every = [_Request(self, *request.args) for request in requests]
        answers: dict[int, str] = {}
        for limits in dict.fromkeys(each.limits for each in every):
            chosen = [i for i, each in enumerate(every) if each.limits == limits]
            found = _answer(self._prefixes, [every[i] for i in chosen], self._encode, self.batch_size, *limits)
            answers |= {chosen[i]: _cut(text, every[chosen[i]].until) for i, text in found}
        return [answers[i] for i in range(len(every))]

    def _encode(self, video: str) -> np.ndarray:
        """Features (N, C) of a video file, in half precision as those of the store."""
        from dataloaders.decode.video import sample_video

        frames = sample_video(Path(video), self._config.num_frames).frames
        cropped = np.stack([self._clip.preprocess.cropped(frame) for frame in frames])
        return np.asarray(self._clip.encode(cropped).half().cpu().numpy())

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("PiTe answers in text: choose a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("PiTe answers single questions: choose a task whose output_type is generate_until")


def _load_clip(clip: str, device: str, directory: Path, config: PiTeConfig) -> ClipEncoder:
    """The encoder of `clip`. Raises ValueError if the model was trained on features of another one."""
    from pite.clip import ClipEncoder
    from pite.lineage import check_encoder

    encoder, remedy = ClipEncoder(clip, device), "give the encoder that made its features, clip=..."
    if encoder.channels != config.vision_feature_size:
        raise ValueError(
            f"{clip} gives {encoder.channels} numbers per frame, but {directory} takes {config.vision_feature_size}: "
            f"{remedy}"
        )
    check_encoder(directory, encoder.checksum, f"clip={clip}", remedy)
    return encoder


def _load(directory: Path, device: str) -> SharedPrefixes:
    from pite.generate import Generator
    from pite.prefixes import SharedPrefixes

    return SharedPrefixes(Generator.from_pretrained(directory, device))


class _Request:
    """One request: the video's file, the question, and how its answer is generated."""

    def __init__(
        self, model: Any, text: str, settings: Mapping[str, Any], visuals: Any, number: Any, task: str, split: str
    ) -> None:
        found = visuals(model.task_dict[task][split][number])
        if not isinstance(found, list | tuple) or len(found) != 1 or not isinstance(found[0], str | Path):
            raise ValueError(f"{task}, {split} {number}: PiTe takes one video file for each question, not {found!r}")
        self.video, self.text = str(found[0]), text
        until = settings.get("until") or ()
        self.until = (until,) if isinstance(until, str) else tuple(until)
        # lmms-eval's tasks give a temperature also where they do not sample.
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        self.limits = (int(settings.get("max_new_tokens") or 1024), temperature)


def _answer(
    prefixes: SharedPrefixes,
    requests: Sequence[_Request],
    encode: Callable[[str], np.ndarray],
    batch_size: int,
    most: int,
    temperature: float,
) -> Iterator[tuple[int, str]]:
    """Position and answer of each request; each video's frames are computed once."""
    from pite.evaluate.plan import plan
    from pite.evaluate.questions import Question

    generator = prefixes.generator
    questions = [Question(each.video, NAME, i, each.text) for i, each in enumerate(requests)]
    num_frames = generator.model.config.num_frames
    lengths = [len(generator.prompt(question.text, num_frames)[0]) for question in questions]
    for window in plan(questions, lengths, batch_size):
        frames = prefixes.videos([encode(video) for video in window.videos])
        for batch in window.batches:
            texts = [questions[i].text for i in batch]
            numbers = [window.videos.index(questions[i].video) for i in batch]
            found = prefixes.answer(texts, frames, numbers, max_new_tokens=most, temperature=temperature)
            yield from zip(batch, (answer.text for answer in found))


def _cut(text: str, until: Sequence[str]) -> str:
    """An answer up to the first of the texts that end it."""
    ends = [position for stop in until if stop and (position := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text


def _batch_size(value: int | str) -> int:
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, not {value!r}")
    return size


if __name__ == "__main__":
    main()
