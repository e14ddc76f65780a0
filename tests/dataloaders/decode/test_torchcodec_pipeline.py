"""torchcodec in the place of DALI's pipeline. It decodes on the CPU here; its CUDA decoder has not run yet."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.media import link_ffmpeg
from dataloaders.decode.dali import torchcodec as module
from dataloaders.decode.dali.agreement import compare, surroundings
from dataloaders.decode.dali.decoder import DaliDecoder
from dataloaders.decode.dali.request import DecodeRequest
from dataloaders.decode.dali.sessions import Sessions
from dataloaders.decode.dali.torchcodec import CANNOT_DECODE, TorchcodecPipeline
from dataloaders.decode.decoder import decode_cropped
from dataloaders.decode.preprocess import Preprocess
from dataloaders.records import Media
from engine.encode import backend
from engine.encode.config import EncodeConfig
from tests import SOURCE_PATH
from tests.damage import garbled
from tests.media import TWO_PASS, write_video

N, PREPROCESS = 7, Preprocess(32, 32)
SCRIPT = """
import sys, pathlib
from tests.dataloaders.decode.test_torchcodec_pipeline import decode_folder
if __name__ == "__main__":
    decode_folder(pathlib.Path(sys.argv[1]))
"""


def decode_folder(folder: Path) -> None:
    """Decode the files of a folder by two pipelines of torchcodec; print by what, and whether PyAV agrees."""
    media = [Media(path.stem, path) for path in sorted(folder.glob("*.webm"))]
    sessions = Sessions(pipelines=2, threads=2, batch=2)
    with DaliDecoder("video", N, PREPROCESS, "cpu", workers=1, sessions=sessions, engine="torchcodec") as decoder:
        for m, result in zip(media, decoder.map(media)):
            frames = "no frames"
            if result.frames is not None:
                agrees = compare(np.asarray(result.frames), surroundings(m, N, PREPROCESS).frames)
                frames = "the same" if agrees else str(agrees)
            print(f"{m.key}: {result.by}: {frames}")


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is None, reason="torchcodec is not installed")
def test_its_frames_are_those_of_pyav(tmp_path: Path) -> None:
    """Also of two-pass VP9, which DALI would count wrongly; a bad file fails alone."""
    vp9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}
    (tmp_path / "a.webm").write_bytes(TWO_PASS.read_bytes())
    good = write_video(tmp_path / "b.webm", 30, **vp9)
    write_video(tmp_path / "c.webm", 20, codec="libvpx", options={"cpu-used": "8"})
    (tmp_path / "d.webm").write_bytes(garbled(good.read_bytes(), np.random.default_rng(0), tmp_path))
    (tmp_path / "script.py").write_text(SCRIPT)
    links = tmp_path / "links"
    links.mkdir()
    link_ffmpeg(links)
    environment = {**os.environ, "PYTHONPATH": SOURCE_PATH, "LD_LIBRARY_PATH": str(links)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "a: torchcodec (vp9): the same",
        "b: torchcodec (vp9): the same",
        "c: torchcodec (vp8): the same",
    ]
    assert lines[3].endswith("no frames")


class StandIn:
    """A decoder of torchcodec: BAD raises, SLOW hangs for a while, others give frames of their content's length."""

    def __init__(self, content: bytes, device: str) -> None:
        self.content = content

    def get_frames_at(self, indices: list[int]) -> Any:
        if self.content == b"BAD":
            raise RuntimeError("damaged")
        if self.content == b"SLOW":
            time.sleep(1)
        return SimpleNamespace(data=torch.full((len(indices), 3, 40, 64), len(self.content), dtype=torch.uint8))


def request(content: bytes) -> DecodeRequest:
    places = np.arange(2)
    return DecodeRequest(
        Media("k", Path("k")), "h264", places, places, 0, content=content, size=(64, 36), decoded=(64, 40)
    )


def test_one_file_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_decoder", StandIn)
    pipeline = TorchcodecPipeline("video", PREPROCESS, "cpu", 4, 2)
    batches = [[request(b"a"), request(b"BAD"), request(b"abc")], [request(b"ab")]]
    for batch in batches:
        pipeline.start(batch)
    one, bad, three = pipeline.finish(batches[0], 60)
    assert bad == CANNOT_DECODE and (np.asarray(one) == 1).all() and (np.asarray(three) == 3).all()
    (two,) = pipeline.finish(batches[1], 60)
    assert np.asarray(two).shape == (2, 32, 32, 3) and (np.asarray(two) == 2).all(), "batches are in order"
    slow = [request(b"SLOW")]
    pipeline.start(slow)
    with pytest.raises(TimeoutError, match=r"torchcodec timed out after 0\.05 s"):
        pipeline.finish(slow, 0.05)


def test_the_part_that_is_not_shown_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[tuple[int, ...]] = []
    crop = Preprocess.cropped_batch
    monkeypatch.setattr(
        Preprocess, "cropped_batch", lambda self, frames: (cut.append(frames.shape), crop(self, frames))[1]
    )
    monkeypatch.setattr(module, "_decoder", StandIn)
    pipeline = TorchcodecPipeline("video", PREPROCESS, "cpu", 1, 1)
    pipeline.start([request(b"a")])
    pipeline.finish([request(b"a")], 60)
    assert [tuple(shape) for shape in cut] == [(2, 36, 64, 3)]


def test_it_is_refused_where_it_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EncodeConfig(data=tmp_path, store=tmp_path, clip="c", decoder="torchcodec-cuda")
    with pytest.raises(ValueError, match="needs --device cuda"):
        backend._choose_decoder(config, "cpu")
    tried: list[int] = []

    def refuse(content: bytes, device: str) -> StandIn:
        tried.append(len(content))
        raise RuntimeError("Unsupported device: cuda. This is a CPU build")

    monkeypatch.setattr(module.torchcodec, "require", lambda: None)
    monkeypatch.setattr(module.nvdec, "require", lambda: None)
    monkeypatch.setattr(module, "_decoder", refuse)
    with pytest.raises(ValueError, match=r"torchcodec cannot decode on cuda here \(Unsupported device.*--decoder dali"):
        backend._choose_decoder(config, "cuda")
    (tmp_path / "small.mp4").write_bytes(module.small_video("cuda"))
    assert tried and decode_cropped(Media("k", tmp_path / "small.mp4"), 1, PREPROCESS).shape == (1, 32, 32, 3)
