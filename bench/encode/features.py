"""Parts `clip` and `encode`: CLIP alone, and engine.encode from files (in the page cache) to stored features."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from bench.encode.results import Results, Row
from bench.encode.settings import Settings, problem_of


def clip_folder(settings: Settings) -> Path:
    """The folder of the CLIP that is measured; a random one is written once."""
    from bench.clip import save_vit_l

    folder = settings.folder / "clip"
    if settings.clip is not None:
        return settings.clip
    return folder if folder.exists() else save_vit_l(folder, settings.image_size)


def measure_clip(settings: Settings, results: Results) -> None:
    """CLIP ViT-L/14: ours, ours with the last layer for every token, and transformers'."""
    from bench.clip import measure
    from pite.clip import ClipEncoder

    encoder = ClipEncoder(str(clip_folder(settings)), settings.device, compiled=settings.device == "cuda")
    for row in measure(encoder, settings.batch, settings.rounds):
        values: dict[str, Any] = {
            "frames_per_second": row.frames_per_second,
            "slow": row.slow,
            "fast": row.fast,
            "mfu": row.mfu,
        }
        results.add("clip", Row("CLIP", row.implementation, problem=row.problem, **values))


def measure_encoding(settings: Settings, results: Results) -> None:
    """engine.encode on all files. A first run on some fills the caches and compiles; its time is not counted.

    The rate is that of the difference between two runs, which excludes the start.
    """
    from bench.encode.files import count, videos
    from engine.encode.config import EncodeConfig
    from engine.encode.run import encode

    # In turn, so that the first files have all kinds.
    kinds = [files.paths for files in videos(settings)]
    paths = [paths[i] for i in range(max(map(len, kinds))) for paths in kinds if i < len(paths)]
    few, seconds = max(1, len(paths) // 8), []
    name = f"engine.encode, {settings.num_frames} frames of each file"
    try:
        for run, number in enumerate((few, few, len(paths))):
            config = EncodeConfig(
                data=_data(settings.folder / f"data{run}", paths[:number]),
                store=settings.folder / f"store{run}",
                clip=str(clip_folder(settings)),
                num_frames=settings.num_frames,
                batch_size=settings.batch,
                device="cuda" if settings.device == "cuda" else "cpu",
            )
            begin = time.perf_counter()
            done = encode(config)
            seconds.append(time.perf_counter() - begin)
            if done.failed or done.encoded != number:
                raise ValueError(f"{done.encoded} of {number} videos were encoded")
        if seconds[2] <= seconds[1]:
            raise ValueError(f"{len(paths)} files took no longer than {few}: too few to measure; use more")
    except Exception as error:  # A row with the reason, as in the other parts.
        results.add("encode", Row("encode", name, problem=problem_of(error)))
        return
    more = seconds[2] - seconds[1]
    name += f", {(len(paths) - few) / more:.2f} videos/s"
    results.add("encode", Row("encode", name, frames_per_second=sum(map(count, paths[few:])) / more))


def _data(folder: Path, paths: list[Path]) -> Path:
    """A data folder of links to these files."""
    (folder / "stage2/videos").mkdir(parents=True)
    records = []
    for i, path in enumerate(paths):
        os.link(path.resolve(), folder / f"stage2/videos/{i}{path.suffix}")
        records.append({"id": str(i), "conversations": [], "meta": {}})
    (folder / "stage2/pite_143k.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder
