"""Annotates the videos of one rank, in worker processes, and joins the records."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dataloaders.annotation.flags import AnnotationFlags
from dataloaders.annotation.people import PeopleDetector
from dataloaders.annotation.phrases import INSTALL, has_spacy
from dataloaders.annotation.pipeline import Settings, Video, attempt, load_models
from dataloaders.annotation.report import Measured, summary, table
from dataloaders.annotation.sheets import draw_sheets
from dataloaders.annotation.sources import read_captions, read_records
from dataloaders.annotation.steps import STEPS, join_records, step_path
from dataloaders.annotation.tracking import opencv
from dataloaders.cpu import available_cores
from dataloaders.decode import TIME_LIMIT
from dataloaders.decode.workers import TaskLost, Workers
from dataloaders.failures import LEDGER, Failure, Ledger
from dataloaders.files import write_atomically
from dataloaders.ranks import Part, Ranks

log = logging.getLogger(__name__)

SETTINGS = "settings.json"


def annotate_all(
    videos: Sequence[Video], settings: Settings, workers: int, time_limit: float = TIME_LIMIT
) -> Iterator[Failure | None]:
    """Annotate in `workers` processes, or in this one with 0. Yields None or a Failure for each video, in order.

    time_limit  seconds after which a video's process is killed; not applied with 0 workers
    Raises ValueError for models that cannot be loaded.
    """
    if not workers:
        load_models(settings)
        yield from map(partial(attempt, settings=settings), videos)
        return
    with Workers(workers, time_limit) as pool:
        try:
            pool.submit(load_models, settings).result()
        except TaskLost as error:
            raise ValueError(f"the models cannot be loaded: {error}") from None
        waiting: deque[tuple[Video, Future[Failure | None]]] = deque()
        remaining = iter(videos)
        while True:
            while len(waiting) < 4 * workers and (video := next(remaining, None)) is not None:
                waiting.append((video, pool.submit(attempt, video, settings)))
            if not waiting:
                return
            video, future = waiting.popleft()
            try:
                yield future.result()
            except TaskLost as error:
                yield Failure(video.name, str(video.path), "annotate", f"{video.path}: {error}")


def check_settings(settings: Settings) -> None:
    """Store the settings of each step; raises ValueError if a step has files that were made with other settings."""
    path, wanted = settings.work / SETTINGS, settings.by_step()
    known = json.loads(path.read_text()) if path.exists() else {}
    for step, made in wanted.items():
        if known.get(step, made) != made and (settings.work / step).is_dir():
            later = " and ".join(str(settings.work / other) for other in STEPS[STEPS.index(step) :])
            raise ValueError(
                f"{settings.work / step} was made with {known[step]}, not {made}: remove {later}, or use another --work"
            )
    settings.work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(known | wanted, indent=1))


def check_models(videos: Sequence[Video], settings: Settings, allowed: float) -> None:
    """Raise ValueError if the model of a step is not given, and more than `allowed` videos lack the file of the step."""
    last = STEPS.index(settings.until)
    for step, flag, model in (
        ("phrases", "--stanza", settings.stanza or settings.spacy or None),
        ("masks", "--detector", settings.detector or settings.people or None),
    ):
        if model is not None or STEPS.index(step) > last:
            continue
        lacking = _lacking(videos, settings, step)
        if step == "masks" and settings.until != "masks":  # tracks of another tool need no masks
            lacking = [f for f in lacking if not step_path(settings.work, "tracks", f.stem).exists()]
        if len(lacking) > allowed:
            raise ValueError(
                f"{flag} must be given, the folder of the model that makes the {step}: {len(lacking):,} of {len(videos):,} "
                f"videos have no file of {step}, such as {lacking[0]}; or write these files with another program"
                + (f", or use spaCy: {INSTALL}" if step == "phrases" else ", or find people with --people")
            )
    if settings.refind and not settings.detector and not settings.people and last >= STEPS.index("tracks"):
        lacking = _lacking(videos, settings, "tracks")
        if len(lacking) > allowed:
            raise ValueError(
                f"--refind needs --detector or --people: {len(lacking):,} of {len(videos):,} videos have no file of tracks, "
                f"such as {lacking[0]}"
            )


def _lacking(videos: Sequence[Video], settings: Settings, step: str) -> list[Path]:
    """The files of a step that are missing, of videos that are not done."""
    files = [step_path(settings.work, step, v.name) for v in videos if not _is_done(settings.work, settings.until, v)]
    return [file for file in files if not file.exists()]


def run(flags: AnnotationFlags) -> None:
    """Annotate this rank's share of the videos. A run without torchrun then joins the records."""
    ranks = Ranks.read()
    settings = _settings(flags, ranks)
    work = settings.work
    if flags.output.exists() and not (work / SETTINGS).exists():
        raise ValueError(f"{flags.output} exists and was not made from {work}; move it, or choose another --output")
    source = flags.captions or flags.records
    assert source is not None, "AnnotationFlags requires one of the two"
    entries = list((read_captions if flags.captions else read_records)(source, flags.videos))
    if not entries:
        raise ValueError(f"{source}: holds no video")
    videos = [video for video in entries if isinstance(video, Video)]
    if settings.stanza is None and has_spacy():
        settings = replace(settings, spacy=not all(_is_done(work, "phrases", video) for video in videos))
    check_models(videos, settings, flags.failure_budget * len(entries))
    check_settings(settings)
    ledger = Ledger(work / LEDGER, len(entries), flags.failure_budget)
    if ranks.rank == 0 and Part.parse(flags.part).number == 1:
        for failure in entries:
            if isinstance(failure, Failure):
                ledger.add(failure)
    part = Part.parse(flags.part)
    ours = videos[part.number - 1 :: part.count]
    mine = [v for v in ours[ranks.rank :: ranks.size] if not _is_done(work, flags.until, v)]
    log.info("%s of %s videos to annotate", f"{len(mine):,}", f"{len(videos):,}")
    if (
        STEPS.index(flags.until) >= STEPS.index("tracks")
        and not flags.tracker
        and any(not _is_done(work, "tracks", v) for v in mine)
    ):
        opencv()
    if flags.people and flags.until != "phrases" and any(not _is_done(work, "masks", v) for v in mine):
        PeopleDetector()  # Refused before the first video, not once for each.
    failed = 0
    workers = min(_usual_workers(flags.device) if flags.workers is None else flags.workers, len(mine))
    results = annotate_all(mine, settings, workers, flags.time_limit) if mine else iter(())
    for failure in tqdm(results, "annotating", len(mine), unit=" videos", disable=None):
        if failure is not None:
            failed += 1
            ledger.add(failure)
    print(f"{len(mine) - failed:,} videos annotated" + (f", {failed:,} failed: see {ledger.files}" if failed else ""))
    if flags.until != "records":
        print(f"the files of each step are in {work}")
    elif ranks.size > 1 or part.count > 1:
        print(f"when all ranks are done, run the same command without torchrun and --part to write {flags.output}")
    else:
        found = join_records((step_path(work, "records", v.name) for v in videos), flags.output)
        print(f"{flags.output}: {summary([counts for counts, _ in found], flags.lost)}")
        print(table([Measured(**each) for _, trajectories in found for each in trajectories]))
        draw_sheets(videos, work, flags.sheets)


def _settings(flags: AnnotationFlags, ranks: Ranks) -> Settings:
    return Settings(
        work=flags.work or flags.output.with_suffix(".steps"),
        num_frames=flags.num_frames,
        num_points=flags.num_points,
        stanza=flags.stanza,
        detector=flags.detector,
        segmenter=flags.segmenter,
        people=flags.people,
        refind=flags.refind,
        tracker=flags.tracker,
        threshold=flags.threshold,
        device=f"cuda:{ranks.local}" if flags.device == "cuda" else flags.device,
        lost=flags.lost,
        until=flags.until,
        when_questions=flags.when_questions,
    )


def _is_done(work: Path, step: str, video: Video) -> bool:
    return step_path(work, step, video.name).exists()


def _usual_workers(device: str) -> int:
    if device != "cpu":
        return 1  # more would share the device's memory
    return max(1, available_cores() // Ranks.read().local_size)
