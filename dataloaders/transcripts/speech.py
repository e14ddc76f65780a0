"""Speech to text: a model of the Whisper family, or PocketSphinx, whose English model is in its wheel. Models are local.

PocketSphinx is a default without downloads. It understands clear English at best, and is no match for Whisper.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.errors import reason
from dataloaders.transcripts.sound import RATE, TOP

WINDOW = 10
"""Seconds of AudioSet's clips."""


class Whisper:
    """A speech-to-text model in Hugging Face's format, such as openai/whisper-base. Raises ValueError for another one.

    Reads safetensors only and runs no code from the directory.
    """

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForSpeechSeq2Seq

        self._device = device
        self._processor, self._model = _load(AutoModelForSpeechSeq2Seq, directory, device)
        if not hasattr(self._model, "detect_language"):
            raise ValueError(f"{directory}: a {self._model.config.model_type}, where a Whisper is needed")
        self._multilingual = bool(getattr(self._model.generation_config, "is_multilingual", False))

    def language(self, sound: np.ndarray) -> str:
        """The language of speech (n,), such as "en"; the model hears its first 30 seconds."""
        if not self._multilingual:
            return "en"
        token = self._model.detect_language(self._features(sound))[0]
        return str(self._processor.tokenizer.decode(token)).strip("<|>")

    def text(self, sound: np.ndarray) -> str:
        """The English words of a stretch of sound (n,), at most 30 seconds."""
        english = {"language": "en", "task": "transcribe"} if self._multilingual else {}
        tokens = self._model.generate(self._features(sound), do_sample=False, **english)
        return str(self._processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()

    def _features(self, sound: np.ndarray) -> Any:
        inputs = self._processor(sound, sampling_rate=RATE, return_tensors="pt")
        return inputs["input_features"].to(self._device, self._model.dtype)


class PocketSphinx:
    """PocketSphinx with the model of its wheel: English only. Raises ValueError if it is not installed."""

    def __init__(self) -> None:
        try:
            import pocketsphinx
        except ImportError:
            raise ValueError(
                "speech to text needs --model, or the small model of PocketSphinx: pip install pocketsphinx"
            ) from None
        self._make = lambda: pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL")

    def language(self, sound: np.ndarray) -> str:
        return "en"

    def text(self, sound: np.ndarray) -> str:
        """The words of a stretch of sound (n,)."""
        decoder = self._make()  # A decoder adapts to the sound so far, and the next text would depend on it.
        decoder.start_utt()
        decoder.process_raw((sound.clip(-1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()
        hypothesis = decoder.hyp()
        return "" if hypothesis is None else str(hypothesis.hypstr)


class Tagger:
    """A classifier of sounds with AudioSet's names, such as an Audio Spectrogram Transformer.

    Such a model hears 10 seconds. The logits of longer sound are the means over windows of equal length.
    """

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        from transformers import AutoModelForAudioClassification

        self._device = device
        self._processor, self._model = _load(AutoModelForAudioClassification, directory, device)
        if "Speech" not in self._model.config.id2label.values():
            raise ValueError(f"{directory}: has no class 'Speech', so it was not trained on AudioSet")

    def __call__(self, sound: np.ndarray) -> tuple[tuple[str, float], ...]:
        """The most probable tags of sound (n,) and their logits, most probable first."""
        import torch

        windows = np.array_split(sound, math.ceil(len(sound) / (WINDOW * RATE)))
        inputs = [self._processor(window, sampling_rate=RATE, return_tensors="pt") for window in windows]
        with torch.inference_mode():
            logits = [self._model(**each.to(self._device, self._model.dtype)).logits[0].float() for each in inputs]
        best = torch.stack(logits).mean(0).topk(TOP)
        names = self._model.config.id2label
        return tuple((names[int(i)], round(float(v), 3)) for v, i in zip(best.values, best.indices))


def _load(kind: Any, directory: Path, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoFeatureExtractor, AutoProcessor

    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device} cannot be used: torch finds no GPU here; give cpu")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: not a model directory in Hugging Face's format: it holds no config.json")
    options = {"local_files_only": True, "trust_remote_code": False}
    # A CPU computes float16 slowly, and some operations not at all.
    dtype = torch.float32 if device == "cpu" else "auto"
    try:
        model = kind.from_pretrained(directory, use_safetensors=True, dtype=dtype, **options)
        maker = AutoProcessor if hasattr(model, "generate") else AutoFeatureExtractor
        processor = maker.from_pretrained(directory, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{directory}: cannot be loaded: {reason(error)}") from None
    return processor, model.to(device).eval()
