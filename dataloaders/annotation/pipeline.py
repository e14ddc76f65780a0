"""The four steps for one video. A step is skipped if its file exists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dataloaders.annotation import steps
from dataloaders.annotation.choices import open_detector, open_tracker
from dataloaders.annotation.key_points import key_points
from dataloaders.annotation.models import Detector, Tracker
from dataloaders.annotation.objects import Following, track_all
from dataloaders.annotation.people import PeopleDetector
from dataloaders.annotation.phrases import SPACY_MODEL, SpacyPhrases, StanzaPhrases
from dataloaders.annotation.record import Existing, pite_record, with_trajectories
from dataloaders.annotation.refinding import Refinding, refind
from dataloaders.annotation.report import measure
from dataloaders.annotation.steps import STEPS, Masks, Phrase, Phrases, Step, Tracks, step_path
from dataloaders.annotation.tracking import LucasKanade, Moments, count_frames, first_frames
from dataloaders.decode.readable import DecodeError
from dataloaders.failures import Failure
from dataloaders.formats.activitynet import EventVideo
from dataloaders.formats.pite_143k import read_pite
from dataloaders.media import wrong_duration
from dataloaders.records import Media


@dataclass(frozen=True)
class Settings:
    """Settings of all steps.

    work        folder for the files of each step
    num_frames  N: events are sampled at least as densely as N frames sample the video
    num_points  P key points of a trajectory
    stanza      directory of Stanza's models; None for spaCy, or if the phrases files exist
    spacy       whether spaCy makes phrases
    detector, segmenter  directories for `open_detector`; None if the masks files exist
    tracker     directory for `open_tracker`; None for `track_all`
    people      whether `PeopleDetector` makes masks, where there is no detector
    refind      whether lost objects are looked for with the detector, after `track_all`
    threshold   minimum score of the detector
    device      where the models run
    lost        share of its moments below which a trajectory is lost
    until       last step to run, of `steps.STEPS`
    when_questions  add a question for the time of one event to each record that has none
    """

    work: Path
    num_frames: int = 100
    num_points: int = 3
    stanza: Path | None = None
    spacy: bool = False
    detector: Path | None = None
    segmenter: Path | None = None
    tracker: Path | None = None
    people: bool = False
    refind: bool = False
    threshold: float = 0.35
    device: str = "cpu"
    lost: float = 0.3
    until: Step = "records"
    when_questions: bool = True

    def by_step(self) -> dict[str, dict[str, Any]]:
        """By step, the settings that its files depend on; without the steps that this run cannot make."""
        made: dict[str, dict[str, Any]] = {}
        if self.stanza:
            made["phrases"] = {"stanza": _name(self.stanza)}
        elif self.spacy:
            made["phrases"] = {"spacy": SPACY_MODEL}
        if self.detector:
            segmenter = self.segmenter and _name(self.segmenter)
            made["masks"] = {"detector": _name(self.detector), "segmenter": segmenter, "threshold": self.threshold}
        elif self.people:
            made["masks"] = {"people": "HOG"}
        ours = {**asdict(LucasKanade()), "objects": asdict(Following())}
        if self.refind:
            ours["refinding"] = asdict(Refinding())
        made["tracks"] = {
            "num_frames": self.num_frames,
            **({"tracker": _name(self.tracker)} if self.tracker else ours),
        }
        made["records"] = {"num_points": self.num_points, "lost": self.lost, "when_questions": self.when_questions}
        return {step: made[step] for step in STEPS[: STEPS.index(self.until) + 1] if step in made}


def _name(directory: Path) -> str:
    return str(directory.resolve())


@dataclass(frozen=True)
class Video:
    """A captioned video.

    name      name of its files in each step: its id in the captions
    media     its file, or the clip in it
    source    name of the data set, for the record
    captions  its events, in seconds within the clip
    record    a record to which trajectories are added, with the turn and the character of each event's sentence in its
              answer; None to write a new record
    """

    name: str
    media: Media
    source: str
    captions: EventVideo
    record: Existing | None = None

    @property
    def path(self) -> Path:
        return self.media.path


def annotate(video: Video, settings: Settings) -> None:
    """Run the steps whose files `video` lacks. Raises ValueError (also DecodeError, RecordError) with one sentence."""
    work, name = settings.work, video.name
    path = {step: step_path(work, step, name) for step in STEPS}
    last = STEPS.index(settings.until)
    if path[settings.until].exists():
        return
    if not path["phrases"].exists():
        parser = _parser(settings)
        if parser is None:
            raise ValueError(f"{path['phrases']}: no such file; write it, or make it with spaCy or --stanza")
        steps.write_phrases(path["phrases"], video.captions, [parser(e.sentence) for e in video.captions.events])
    phrases = steps.read_phrases(path["phrases"], video.captions)
    if last == 0:
        return
    masks: Masks | None = None
    if last == 1 or path["masks"].exists() or not path["tracks"].exists():  # Tracks of another tool need no masks.
        if not path["masks"].exists():
            _make_masks(path["masks"], video, phrases, settings)
        masks = steps.read_masks(path["masks"], phrases)
    if last == 1:
        return
    if not path["tracks"].exists():
        assert masks is not None
        _make_tracks(path["tracks"], video, masks, phrases, settings)
    tracks = steps.read_tracks(path["tracks"], phrases)
    if last == 2:
        return
    chosen = {
        key: found for key, track in tracks.items() if (found := key_points(track, settings.num_points)) is not None
    }
    measured = {key: measure(phrases[key[0]][key[1]].text, found, settings.lost) for key, found in chosen.items()}
    points = {key: found for key, found in chosen.items() if not measured[key].lost}
    if video.record is None:
        record = pite_record(name, video.source, video.captions, phrases, points, settings.when_questions)
    else:
        record = with_trajectories(video.record, video.captions, phrases, points, settings.when_questions)
    # Validate with the reader that training uses: here the record can still be corrected.
    read_pite(record, name, work, num_frames=settings.num_frames, num_points=settings.num_points)
    counts = {
        "events": len(phrases),
        "phrases": sum(map(len, phrases)),
        "found": len(tracks) if masks is None else sum(mask is not None for event in masks for mask in event),
        "followed": len(tracks),
        "trajectories": len(points),
        "lost": len(chosen) - len(points),
    }
    outcome = [asdict(each) for each in measured.values()]
    steps.write_json(path["records"], {"record": record, "counts": counts, "trajectories": outcome})


def attempt(video: Video, settings: Settings) -> Failure | None:
    """Annotate a video, and turn an exception into a Failure. OpenCV and models can raise anything for a bad file."""
    try:
        annotate(video, settings)
    except DecodeError as error:
        return Failure(video.name, str(video.path), "decode", str(error))
    except ValueError as error:
        return Failure(video.name, str(video.path), "annotate", str(error))
    except (OSError, MemoryError):
        raise  # A full disk or full memory is not the video's fault.
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; torch is imported only with models
            raise MemoryError(f"{error}; give fewer --workers") from None
        return Failure(video.name, str(video.path), "annotate", f"{video.path}: {type(error).__name__}: {error}")
    return None


def _make_masks(path: Path, video: Video, phrases: Phrases, settings: Settings) -> None:
    detector = _detector(settings)
    if detector is None:
        raise ValueError(f"{path}: no such file; write it, or make it with --detector and --segmenter, or --people")
    moments = _moments(video, settings)
    frames = first_frames(video.path, [m for m, found in zip(moments, phrases) if found])
    masks: Masks = [
        detector(frames[each.first], [phrase.text for phrase in found]) if found else []
        for each, found in zip(moments, phrases)
    ]
    steps.write_masks(path, masks)


def _make_tracks(path: Path, video: Video, masks: Masks, phrases: Phrases, settings: Settings) -> None:
    if settings.refind and _detector(settings) is None:
        raise ValueError(
            f"{path}: no such file; write it, or make it with --detector or --people, which --refind needs"
        )
    tracker, moments = _tracker(settings), _moments(video, settings)
    steps.write_tracks(path, tracker(video.path, moments, masks, phrases))


def _moments(video: Video, settings: Settings) -> Sequence[Moments]:
    """Moments of each event. Raises DecodeError if the file's duration is not that of its captions."""
    reason = wrong_duration(replace(video.media, duration=video.captions.duration))
    if reason is not None:
        raise DecodeError(reason)
    first, total = count_frames(video.path, video.media.clip)
    events = video.captions.events
    return [Moments.of(e, video.captions.duration, total, settings.num_frames).after(first) for e in events]


@lru_cache(1)
def _parser(settings: Settings) -> Callable[[str], list[Phrase]] | None:
    """Loaded once per process."""
    if settings.stanza:
        return StanzaPhrases(settings.stanza, settings.device)
    return SpacyPhrases() if settings.spacy else None


@lru_cache(1)
def _detector(settings: Settings) -> Detector | None:
    """Loaded once per process."""
    if settings.detector is None:
        return PeopleDetector() if settings.people else None
    return open_detector(settings.detector, settings.segmenter, settings.device, settings.threshold)


@lru_cache(1)
def _tracker(settings: Settings) -> Tracker:
    """Loaded once per process."""
    if settings.tracker is not None:
        return open_tracker(settings.tracker, settings.device)
    return _OwnTracker(_detector(settings) if settings.refind else None)


@dataclass(frozen=True)
class _OwnTracker:
    """`track_all`, then `refind` where there is a detector."""

    detector: Detector | None

    def __call__(self, path: Path, moments: Sequence[Moments], masks: Masks, phrases: Phrases) -> Tracks:
        tracks = track_all(path, moments, masks)
        return tracks if self.detector is None else refind(path, moments, masks, phrases, tracks, self.detector)


def load_models(settings: Settings) -> None:
    """Load the models, so that a wrong directory is an error before the first video. Raises ValueError."""
    _parser(settings)
    if settings.until != "phrases":
        _detector(settings)
    if STEPS.index(settings.until) >= STEPS.index("tracks"):
        _tracker(settings)
