"""Part `nvdec`: whether NVDEC is there, what it decodes, and its bare rate by sessions, with PyNvVideoCodec.

Imports neither torch's CUDA nor a decoder of ours before NVDEC is found. PyNvVideoCodec decodes every frame, and neither
resizes nor copies it; a decoder is created for each file, which takes 50 to 70 ms on an H100.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from bench.encode.results import Results, Row
from bench.encode.settings import Clock, Settings, problem_of, rates
from dataloaders.decode import nvdec

CODECS = ("h264", "hevc", "vp8", "vp9")
BARE = "PyNvVideoCodec, all frames, left as decoded"


def measure(settings: Settings, results: Results) -> None:
    clock = Clock(settings.budget)
    try:
        library = nvdec.library()
    except ValueError as error:
        results.add("nvdec", Row("NVDEC", nvdec.LIBRARY, problem=str(error)))
        return
    results.add("nvdec", Row("NVDEC", nvdec.LIBRARY, agreement="loads"))
    if settings.device == "cuda":
        import torch

        torch.cuda.synchronize()  # Creates the context.
        for codec in CODECS:
            results.add("nvdec", Row("NVDEC", codec, agreement=str(nvdec.capabilities(codec, library))))
    try:
        import PyNvVideoCodec  # noqa: F401
    except ImportError as error:
        results.add("nvdec", Row("NVDEC", BARE, problem=problem_of(error)))
        return
    from bench.encode.files import videos

    for files in videos(settings):
        for sessions in settings.sessions:
            if clock.is_up:
                results.add("nvdec", Row(files.kind, BARE, sessions, problem="not run: the budget is used up"))
                continue
            try:
                measured = rates(partial(decode, files.paths, sessions), settings.rounds)
                results.add("nvdec", Row(files.kind, BARE, sessions, **measured))
            except Exception as error:  # One failure must not stop the others.
                results.add("nvdec", Row(files.kind, BARE, sessions, problem=problem_of(error)))


def decode(paths: tuple[Path, ...], sessions: int) -> int:
    """Decode every frame of every file, this many at a time; returns the number of frames."""
    import PyNvVideoCodec

    def frames_of(path: Path) -> int:
        demuxer = PyNvVideoCodec.CreateDemuxer(filename=str(path))
        decoder = PyNvVideoCodec.CreateDecoder(gpuid=0, codec=demuxer.GetNvCodecId(), usedevicememory=True)
        return sum(len(decoder.Decode(packet)) for packet in demuxer)

    with ThreadPoolExecutor(sessions) as threads:
        return sum(threads.map(frames_of, paths))
