"""Write a complete data folder: four splits in the layout and formats of the real data sets.

Every video and still is a pure function of (seed, part, number). So the bytes do not depend on the number of processes,
and a run after a kill makes only the missing files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataloaders.files import write_atomically
from dataloaders.synthetic import language, scene
from dataloaders.synthetic.config import WorldConfig
from dataloaders.synthetic.render import draw, write_jpeg, write_mp4

VERSION = 4
"""Version of the world's rules. A folder of another version is refused."""

_STILL, _TRAINING, _HELD_OUT = range(3)
_CHUNK = 16


def _generator(seed: int, part: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, part, number])


def _write_still(directory: Path, config: WorldConfig, number: int) -> dict[str, Any]:
    rng = _generator(config.seed, _STILL, number)
    still, name = scene.sample_still(rng), f"i{number:06d}"
    path = directory / f"{name}.jpg"
    if not path.exists():
        write_jpeg(path, draw(still, config.size)[0])
    return language.narrative_record(name, still, rng)


def _write_video(directory: Path, config: WorldConfig, part: int, number: int) -> dict[str, Any]:
    rng = _generator(config.seed, part, number)
    twins = config.twins > 0 and rng.random() < config.twins
    video, name = (
        scene.sample_twins(rng) if twins else scene.sample_video(rng),
        f"{'e' if part == _HELD_OUT else 'v'}{number:06d}",
    )
    path = directory / f"{name}.mp4"
    if not path.exists():
        write_mp4(path, draw(video, config.size))
    return {
        "id": name,
        "pite": language.pite_record(name, video, rng),
        "activitynet": language.activitynet_record(video),
        "valley": language.valley_records(name, video, config.frames, rng),
        "instruct": language.instruct_record(name, video, rng),
    }


@contextmanager
def _mapper(processes: int) -> Iterator[Callable[..., Iterable[dict[str, Any]]]]:
    """The built-in map, or one over a pool of processes; both keep the order."""
    if processes == 1:
        yield map
        return
    # A forked child of a process with threads may hang; spawned processes cost half a second.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=_CHUNK)


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(record, separators=(',', ':'))}\n" for record in records)


def _array(records: list[dict[str, Any]]) -> str:
    return f"[\n{_lines(records).rstrip().replace(chr(10), f',{chr(10)}')}\n]\n"


def make_world(output: Path, config: WorldConfig, processes: int = 2, progress: bool = False) -> bool:
    """Write the data folder `output`. Returns False if it was already complete.

    progress  show a progress bar for each part
    Raises ValueError if `output` holds a world of another configuration, or other files.
    """
    manifest_path = output / "world.json"
    wanted = {"version": VERSION, **asdict(config)}
    if manifest_path.exists():
        manifest = json.loads(manifest_path.read_text())
        complete = manifest.pop("complete", False)
        if manifest != wanted:
            raise ValueError(
                f"{output} holds another synthetic world ({manifest}, not {wanted}); choose another folder"
            )
        if complete:
            return False
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is no synthetic world; choose an empty or new folder")

    images, videos, held_out = (output / part for part in ("stage1/images", "stage2/videos", "evaluation/videos"))
    for directory in (images, videos, held_out, output / "stage3"):
        directory.mkdir(parents=True, exist_ok=True)
    write_atomically(manifest_path, json.dumps(wanted | {"complete": False}, indent=1))
    shared = output / "stage3/videos"
    if not shared.is_symlink():
        # Stages 2 and 3 train on the same videos, which are encoded once.
        shared.symlink_to("../stage2/videos")

    with _mapper(processes) as mapper:

        def run(part: str, write: Callable[[int], dict[str, Any]], total: int) -> list[dict[str, Any]]:
            records = mapper(write, range(total))
            return list(tqdm(records, part, total, disable=None if progress else True, file=sys.stderr))

        narratives = run("narrated stills", partial(_write_still, images, config), config.images)
        training = run("training videos", partial(_write_video, videos, config, _TRAINING), config.videos)
        test = run("held-out videos", partial(_write_video, held_out, config, _HELD_OUT), config.evaluation)

    write_atomically(output / "stage1/localized_narratives.jsonl", _lines(narratives))
    write_atomically(output / "stage2/pite_143k.jsonl", _lines(video["pite"] for video in training))
    write_atomically(
        output / "stage3/valley.json", _array([record for video in training for record in video["valley"]])
    )
    write_atomically(output / "stage3/video_instruct.json", _array([video["instruct"] for video in training]))
    write_atomically(output / "evaluation/pite_143k.jsonl", _lines(video["pite"] for video in test))
    captions = {video["id"]: video["activitynet"] for video in test}
    write_atomically(output / "evaluation/activitynet_captions.json", json.dumps(captions, indent=1))
    write_atomically(manifest_path, json.dumps(wanted | {"complete": True}, indent=1))
    return True
