"""Encoding: `python -m bench.encode` times files to features on this machine, by parts, from the source tree.

  nvdec    whether NVDEC is there, what it decodes, and its bare rate; needs torch, and PyNvVideoCodec for the rate
  decode   files of 10 to 120 s, 100 frames of each resized and cropped: PyAV with all cores, DALI with 1 to 14 sessions
  clip     ViT-L/14 with random weights: ours, ours with the last layer for every token, and transformers'
  encode   engine.encode, from files (in the page cache) to stored features

A part imports only what it uses, takes less than four minutes, and writes each row as soon as it has it. Parts that were
measured before on the same device are kept in the result file. `--device cpu` is for trying the script on small amounts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.encode.results import Results, table
from bench.encode.settings import Settings

PARTS = ("nvdec", "clip", "decode", "encode")
"""In the order of value: the first two are short and certain."""

RESULTS = Path(__file__).parents[1] / "results"
CPU = Settings("cpu", Path(), kinds=("H.264-360p",), number=2, rounds=1, num_frames=1, batch=1)


def measure(part: str, settings: Settings, results: Results) -> None:
    """Measure one part. Imported here: a part imports only what it uses."""
    results.begin(part)
    if part == "nvdec":
        from bench.encode.nvdec import measure as run
    elif part == "decode":
        from bench.encode.decode import measure as run
    elif part == "clip":
        from bench.encode.features import measure_clip as run
    else:
        from bench.encode.features import measure_encoding as run
    run(settings, results)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.encode", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--files", type=Path, help="folder of videos to decode; default: some are written")
    parser.add_argument("--kinds", nargs="+", help="kinds of files to write, such as H.264-720p, HEVC-360p or mixed")
    parser.add_argument("--number", type=int, help="files of each kind")
    parser.add_argument("--sessions", nargs="+", type=int, help="files that are decoded at once on the GPU")
    parser.add_argument("--budget", type=float, help="seconds for each part; default: 230")
    parser.add_argument("--clip", type=Path, help="folder of a CLIP model; default: ViT-L/14 with random weights")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of the random CLIP: 224 (PiTe) or 336")
    parser.add_argument("--output", type=Path, help="result file; default: bench/results/encode_<device>.json")
    options = parser.parse_args(arguments)
    import torch

    from bench.measure import environment

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible; use --device cpu to try the script on small amounts")
    described = environment(torch.device("cuda:0" if options.device == "cuda" else "cpu"))
    name = described["device"].split(",")[0].replace(" ", "_")
    results = Results.open(options.output or RESULTS / f"encode_{name}.json", described)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        base = CPU if options.device == "cpu" else Settings("cuda", Path())
        chosen = {k: getattr(options, k) for k in ("files", "number", "budget", "clip", "image_size")}
        chosen |= {k: tuple(v) for k in ("kinds", "sessions") if (v := getattr(options, k))}
        given = {k: v for k, v in chosen.items() if v is not None}
        for part in options.parts:
            folder = Path(temporary) / part
            folder.mkdir()
            try:
                measure(part, replace(base, folder=folder, **given), results)
            except (ValueError, ImportError) as error:
                parser.error(f"{part}: {error}")
    print(f"{table(results.content)}\nwrote {results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
