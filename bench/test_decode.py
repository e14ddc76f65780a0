"""Decoding and pre-processing on one core: frames of the file per second, and the fraction of bare libav's rate.

Every back end decodes 52 s of video, 1,560 frames, and keeps 100 of them, resized and cropped for CLIP. Rates are per
second of CPU time, summed over all threads and processes, so other work on the machine changes them little.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from bench.measure import environment
from bench.media import CODECS, FRAMES, SIZES, link_ffmpeg, write_video
from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.decoder import DecodePool, decode_cropped
from dataloaders.decode.preprocess import Preprocess
from dataloaders.records import Media

N = 100
KINDS = [(codec, size) for size in ("360p", "720p") for codec in CODECS]
CROPPED = partial(decode_cropped, num_frames=N, preprocess=Preprocess())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {kind: write_video(folder / "-".join(kind), *kind) for kind in KINDS}


@lru_cache
def bare(path: Path) -> float:
    """CPU seconds in which libav decodes a file on one thread, without conversion; the smaller of two runs."""

    def decode() -> float:
        begin = time.process_time()
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            assert 0.9 * FRAMES <= sum(1 for _ in container.decode(video=0)) <= FRAMES
        return time.process_time() - begin

    return min(decode() for _ in range(2))


def worker_pids() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of this process since its start, plus that of the processes `pids`."""
    others = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    ticks = sum(int(values[11]) + int(values[12]) for values in others)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def decoder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A back end by name, with its processes started."""
    if importlib.util.find_spec("torchcodec") is None and request.param == "torchcodec":
        pytest.skip("torchcodec is not installed")
    if request.param == "torchcodec":
        link_ffmpeg(tmp_path)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        pool: Any = DecodePool(partial(CROPPED, reader="torchcodec"), 1)
    elif request.param == "DALI":
        try:
            pool = dali.DaliDecoder("video", N, Preprocess(), "cpu", workers=1)
        except ValueError as error:
            pytest.skip(str(error))
    else:
        pool = DecodePool(CROPPED, 1)
    with pool:
        yield pool


@pytest.mark.parametrize("decoder", ["PyAV", "torchcodec", "DALI"], indirect=True)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_decode(
    benchmark: Any,
    request: pytest.FixtureRequest,
    decoder: Any,
    kind: tuple[str, str],
    files: dict[tuple[str, str], Path],
) -> None:
    name = request.node.callspec.params["decoder"]
    if name == "DALI" and kind[0] != "VP9":
        pytest.skip("DALI decodes H.264 and HEVC on GPUs only")
    media = [Media("v", files[kind])]
    list(decoder.map([Media("one second, to warm up", files[kind], clip=(0, 1))]))
    spent: list[float] = []

    def decode() -> None:
        before = cpu_seconds(worker_pids())
        (decoded,) = decoder.map(media)
        assert decoded.frames is not None and len(decoded.frames) == N, decoded.reason
        assert decoded.by.startswith("DALI") == (name == "DALI"), decoded.by
        spent.append(cpu_seconds(worker_pids()) - before)

    benchmark.group = "-".join(kind)
    benchmark.pedantic(decode, rounds=2)
    rates = sorted(FRAMES / seconds for seconds in spent)
    share = bare(files[kind]) / min(spent)
    benchmark.extra_info.update(
        environment(torch.device("cpu")), decoder=name, frames_per_second=rates, share_of_bare_libav=share
    )
    print(
        f"\n{'-'.join(kind):12} {name:10} {rates[0]:7,.0f} to {rates[1]:,.0f} frames/s,"
        f" {share:.0%} of bare libav's {FRAMES / bare(files[kind]):,.0f}"
    )


@pytest.mark.parametrize("size", ["360p", "720p"])
def test_preprocess(benchmark: Any, size: str) -> None:
    """Resize and crop of one frame; a video has a hundred."""
    width, height = SIZES[size]
    frame = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    benchmark.group = "resize and crop"
    benchmark.extra_info.update(environment(torch.device("cpu")))
    benchmark.pedantic(Preprocess().cropped, (frame,), rounds=50, warmup_rounds=5)
