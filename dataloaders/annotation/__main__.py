"""Make PiTe-143k records from videos and their event captions.

python -m dataloaders.annotation --captions train.json --videos DATA/stage2/videos --output DATA/stage2/pite_143k.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dataloaders.annotation.pipeline import Settings, Video, attempt, load_models
from dataloaders.annotation.steps import STEPS, join_records, step_path
from dataloaders.annotation.tracking import opencv
from dataloaders.cpu import available_cores
from dataloaders.decode import TIME_LIMIT
from dataloaders.decode.workers import TaskLost, Workers
from dataloaders.failures import LEDGER, Failure, Ledger
from dataloaders.files import write_atomically
from dataloaders.formats import Where, iter_json, read_activitynet
from dataloaders.formats.fields import find_media, identifier
from dataloaders.ranks import Ranks
from dataloaders.records import RecordError

SETTINGS = "settings.json"


def read_captions(captions: Path, videos: Path) -> Iterator[Video | Failure]:
    """Captioned videos in order, and a Failure for each that cannot be read. Raises ValueError if it is not JSON."""
    seen: set[str] = set()
    for offset, _, record in iter_json(captions):
        where = Where(captions, offset)
        try:
            name = identifier(record, "id", where)
            if name in seen:
                raise RecordError(f"{where}: duplicate id {name!r}")
            seen.add(name)
            yield Video(
                name, find_media(videos / f"{name}.mp4"), captions.stem, read_activitynet(record, where, videos)
            )
        except RecordError as error:
            yield Failure(str(record.get("id")), str(captions), "read", str(error))


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


def summary(counts: Sequence[dict[str, int]]) -> str:
    total = sum((Counter(each) for each in counts), Counter[str]())
    return (
        f"{len(counts):,} videos, {total['events']:,} events, {total['phrases']:,} phrases; {total['found']:,} of them "
        f"found in their event's first frame, {total['followed']:,} tracked, "
        f"{total['trajectories']:,} with a trajectory"
    )


def run(flags: argparse.Namespace) -> int:
    """Annotate this rank's share of the videos. A run without torchrun then joins the records."""
    ranks = Ranks.read()
    device = f"cuda:{ranks.local}" if flags.device == "cuda" else flags.device
    work = flags.work or flags.output.with_suffix(".steps")
    if flags.segmenter and not flags.detector:
        raise ValueError("--segmenter needs the boxes of a detector; give --detector, too")
    workers = _usual_workers(flags.device) if flags.workers is None else flags.workers
    if workers < 0 or flags.time_limit <= 0:
        raise ValueError("--workers must be 0 or more, and --time-limit more than 0")
    if flags.num_points < 1 or flags.num_frames < 2:
        raise ValueError("--num-points must be at least 1, and --num-frames at least 2")
    if not flags.videos.is_dir():
        raise ValueError(f"--videos: {flags.videos} is no folder")
    settings = Settings(
        work,
        flags.num_frames,
        flags.num_points,
        flags.stanza,
        flags.detector,
        flags.segmenter,
        flags.threshold,
        device,
        flags.until,
    )
    if flags.output.exists() and not (work / SETTINGS).exists():
        raise ValueError(f"{flags.output} exists and was not made from {work}; move it, or choose another --output")
    entries = list(read_captions(flags.captions, flags.videos))
    if not entries:
        raise ValueError(f"{flags.captions}: holds no video")
    videos = [video for video in entries if isinstance(video, Video)]
    check_settings(settings)
    ledger = Ledger(work / LEDGER, len(entries), flags.failure_budget)
    if ranks.rank == 0:
        for failure in entries:
            if isinstance(failure, Failure):
                ledger.add(failure)
    mine = [v for v in videos[ranks.rank :: ranks.size] if not _is_done(work, flags.until, v)]
    if STEPS.index(flags.until) >= STEPS.index("tracks") and any(not _is_done(work, "tracks", v) for v in mine):
        opencv()
    failed = 0
    workers = min(workers, len(mine))
    results = annotate_all(mine, settings, workers, flags.time_limit) if mine else iter(())
    for failure in tqdm(results, "annotating", len(mine), unit=" videos", disable=None):
        if failure is not None:
            failed += 1
            ledger.add(failure)
    print(f"{len(mine) - failed:,} videos annotated" + (f", {failed:,} failed: see {ledger.files}" if failed else ""))
    if flags.until != "records":
        print(f"the files of each step are in {work}")
    elif ranks.size > 1:
        print(f"when all ranks are done, run the same command without torchrun to write {flags.output}")
    else:
        counts = join_records((step_path(work, "records", v.name) for v in videos), flags.output)
        print(f"{flags.output}: {summary(counts)}")
    return 0


def _is_done(work: Path, step: str, video: Video) -> bool:
    return step_path(work, step, video.name).exists()


def _usual_workers(device: str) -> int:
    if device != "cpu":
        return 1  # more would share the device's memory
    return max(1, available_cores() // Ranks.read().local_size)


def parser() -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        "python -m dataloaders.annotation", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    command.add_argument(
        "--captions", type=Path, required=True, help="ActivityNet Captions' {id: {duration, timestamps, sentences}}"
    )
    command.add_argument("--videos", type=Path, required=True, help="folder of {id}.mp4, or .mkv, .webm, ...")
    command.add_argument(
        "--output", type=Path, required=True, help="such as DATA/stage2/pite_143k.jsonl; an existing file is replaced"
    )
    command.add_argument(
        "--work", type=Path, help="folder for the files of each step (default: OUTPUT with .steps for .jsonl)"
    )
    command.add_argument("--until", choices=STEPS, default="records", help="last step to run (default: records)")
    command.add_argument(
        "--stanza",
        type=Path,
        metavar="DIR",
        help="Stanza's models, which make the phrases; not needed if their files exist",
    )
    command.add_argument(
        "--detector",
        type=Path,
        metavar="DIR",
        help="a GroundingDINO, which makes the masks; not needed if their files exist",
    )
    command.add_argument("--segmenter", type=Path, metavar="DIR", help="a SAM; without it a mask is the detector's box")
    command.add_argument("--threshold", type=float, default=0.35, help="minimum score of a detection (default: 0.35)")
    command.add_argument("--device", default="cpu", help="cpu or cuda, where the models run (default: cpu)")
    command.add_argument("--num-frames", type=int, default=100, help="N frames that PiTe will see (default: 100)")
    command.add_argument("--num-points", type=int, default=3, help="P key points of a trajectory (default: 3)")
    command.add_argument(
        "--workers",
        type=int,
        help="worker processes, each with its own models; 0 for none (default: one per core, one for a GPU)",
    )
    command.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT, help="timeout for one video, in seconds (default: %(default)g)"
    )
    command.add_argument(
        "--failure-budget", type=float, default=0.01, help="share of videos that may fail (default: 0.01)"
    )
    return command


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(parser().parse_args(argv))
    except (ValueError, OSError, MemoryError) as error:
        print(f"dataloaders.annotation: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
