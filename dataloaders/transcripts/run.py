"""Transcribes the videos of a folder, one after the other."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataloaders.decode.readable import DecodeError
from dataloaders.failures import LEDGER, Failure, Ledger
from dataloaders.files import write_atomically
from dataloaders.ranks import Part
from dataloaders.transcripts.files import Segment, is_transcribed, write_transcript
from dataloaders.transcripts.flags import TranscriptFlags
from dataloaders.transcripts.sound import LONGEST, RATE, is_speech, read_sound, voice_segments
from dataloaders.transcripts.speech import PocketSphinx, Tagger, Whisper

log = logging.getLogger(__name__)

SETTINGS = ".settings.json"
"""Hidden, so that no video's transcript has this name."""


def run(flags: TranscriptFlags) -> None:
    """Write the missing transcripts. Raises ValueError for models that cannot be loaded, and BudgetExceeded."""
    _check_settings(flags)
    part, files = Part.parse(flags.part), flags.files
    (name, number), *_ = Counter(file.stem for file in files).most_common(1)
    if number > 1:
        raise ValueError(
            f"--videos {flags.videos}: {number} videos differ from {name!r} in their suffixes only; rename them"
        )
    ours = files[part.number - 1 :: part.count]
    mine = [file for file in ours if not is_transcribed(_path(flags, file), file)]
    log.info("%s of %s videos to transcribe", f"{len(mine):,}", f"{len(files):,}")
    if not mine:
        return
    speech = Whisper(flags.model, flags.device) if flags.model else PocketSphinx()
    tagger = Tagger(flags.tagger, flags.device) if flags.tagger else None
    ledger = Ledger(flags.output / LEDGER, len(files), flags.failure_budget)
    for file in tqdm(mine, "transcribing", unit=" videos", disable=None):
        try:
            transcribe(file, _path(flags, file), speech, tagger, flags.threshold)
        except DecodeError as error:
            ledger.add(Failure(file.stem, str(file), "decode", str(error)))
    failed = f", {ledger.count:,} failed: see {ledger.files}" if ledger.count else ""
    print(f"{flags.output}: {len(mine) - ledger.count:,} transcripts{failed}")


def transcribe(
    video: Path, output: Path, speech: Whisper | PocketSphinx, tagger: Tagger | None = None, threshold: float = 0.5
) -> None:
    """Write the transcript of one video. Speech that is not English is not transcribed, as published.

    The language is that of the first 30 seconds of speech. The published pipeline differs: WhisperX detects the language in
    the first 30 seconds of the file, aligns words by their phonemes, and gives sentences, each of which is kept or left out
    by the tags of Whisper-AT; here these are the segments of the voice activity, and the tags those of any classifier.

    Raises DecodeError for a file that cannot be decoded.
    """
    sound = read_sound(video)
    found = voice_segments(sound, threshold)
    voice = np.concatenate([sound[start:end] for start, end in found]) if found else None
    language = None if voice is None else speech.language(voice[: round(LONGEST * RATE)])
    segments = []
    for start, end in found if language == "en" else []:
        tags = tagger(sound[start:end]) if tagger else ()
        kept = is_speech(tags) if tagger else True
        text = speech.text(sound[start:end])
        segments.append(Segment(round(start / RATE, 3), round(end / RATE, 3), text, kept, tags))
    write_transcript(output, video, len(sound) / RATE, language, segments)


def _path(flags: TranscriptFlags, video: Path) -> Path:
    return flags.output / f"{video.stem}.json"


def _check_settings(flags: TranscriptFlags) -> None:
    """Store the settings; raises ValueError if the folder's transcripts were made with other ones."""
    flags.output.mkdir(parents=True, exist_ok=True)
    path, wanted = flags.output / SETTINGS, flags.settings()
    try:
        known = json.loads(path.read_text()) if path.exists() else wanted
    except ValueError:
        raise ValueError(f"{path}: damaged: remove it if the transcripts next to it are of {wanted}") from None
    if known != wanted:
        raise ValueError(f"{flags.output}: made with {known}, not {wanted}: give another --output")
    write_atomically(path, json.dumps(wanted, indent=1) + "\n")
