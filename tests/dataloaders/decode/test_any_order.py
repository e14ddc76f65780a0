"""Which decoder a file gets, and its frames, do not depend on the files before it: a run may be killed and resumed anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.dali import share
from dataloaders.decode.dali.request import DecodeRequest
from dataloaders.decode.dali.sessions import ON_CPU
from dataloaders.decode.dali.share import is_compared, is_for_the_cpu
from dataloaders.decode.decoder import Decoded, decode_cropped
from dataloaders.decode.preprocess import Preprocess
from dataloaders.records import Media
from tests.damage import garbled
from tests.media import TWO_PASS, needs_dali, write_video

N, PREPROCESS = 5, Preprocess(32, 32)
VP9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}


class InThisProcess:
    """Workers without processes, which take a second each to start."""

    def __init__(self, count: int, time_limit: float | None = None) -> None:
        self.count = count

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_result(function(*arguments))
        return answer

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "Workers", InThisProcess)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[Media]:
    """Files for DALI and for PyAV, and more bad ones than good ones."""
    d = tmp_path_factory.mktemp("order")
    good = [write_video(d / f"v{i}.webm", 12 + i, **VP9) for i in range(4)]
    others = {
        "odd": write_video(d / "odd.webm", 12, size=(65, 47), **VP9),
        "vp8": write_video(d / "vp8.webm", 12, codec="libvpx", options={"cpu-used": "8"}),
        "h264": write_video(d / "h264.mp4", 12),
        "hidden": TWO_PASS,
    }
    rng = np.random.default_rng(0)
    for i in range(9):
        (path := d / f"bad{i}.webm").write_bytes(garbled(good[i % 4].read_bytes(), rng, d))
        others[path.stem] = path
    return [*(Media(p.stem, p) for p in good), *(Media(key, path) for key, path in others.items())]


def decoded(media: list[Media], *ends: int, cpu_share: float = 0.0) -> dict[str, tuple[str, str, bytes]]:
    """By key: what decoded a file, why it has no frames, and its frames, by a run that was killed after `ends` files."""
    found: list[Decoded] = []
    for begin, end in zip((0, *ends), (*ends, len(media))):
        sessions = replace(ON_CPU, batch=2, threads=1)
        with dali.DaliDecoder("video", N, PREPROCESS, "cpu", 1, sessions=sessions, cpu_share=cpu_share) as decoder:
            found += decoder.map(media[begin:end])
    return {d.media.key: (d.by, d.reason, b"" if d.frames is None else np.asarray(d.frames).tobytes()) for d in found}


@needs_dali
def test_any_order_and_any_kill(media: list[Media]) -> None:
    """Eight bad files at the start once disabled DALI for all others."""
    expected = decoded(media, cpu_share=0.2)
    assert {by for by, reason, _ in expected.values() if not reason} == {
        "PyAV",
        "DALI (vp9)",
        "DALI (vp8)",
        "PyAV (odd size)",
        "PyAV (hidden pictures)",
        "PyAV (DALI has no h264 on cpu)",
    }
    assert sum(bool(reason) for _, reason, _ in expected.values()) == 9
    assert decoded(media[::-1], 1, 9, cpu_share=0.2) == expected
    shuffled = random.Random(0).sample(media, len(media))
    assert decoded(shuffled, 6, cpu_share=0.2) == expected


class Conceals:
    """A pipeline that gives frames of files that PyAV finds damaged, as hardware does."""

    def __init__(self, *arguments: object) -> None:
        pass

    def start(self, requests: list[DecodeRequest]) -> None:
        pass

    def finish(self, requests: list[DecodeRequest], seconds: float | None) -> list[np.ndarray]:
        paths = [r.media.path.with_name(r.media.path.name.replace("bad", "v")) for r in requests]
        return [
            decode_cropped(Media("", path), N, PREPROCESS)[np.unique(r.places, return_index=True)[1]]
            for path, r in zip(paths, requests)
        ]


def test_damage_that_only_pyav_finds(media: list[Media], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV decides on the files that are compared, by their names, and not on the one that comes first."""
    monkeypatch.setattr(dali, "Pipeline", Conceals)
    monkeypatch.setattr(dali, "require", lambda: None)
    monkeypatch.setattr(share, "COMPARED_EVERY", 3)
    compared: list[str] = []
    around = dali.surroundings
    monkeypatch.setattr(dali, "surroundings", lambda m, **settings: (compared.append(m.key), around(m, **settings))[1])
    some = [m for m in media if m.key in ("v0", "v1", "v2", "v3", "bad0", "bad1", "bad2", "bad3")]
    chosen = {m.key for m in some if is_compared(m)}
    assert chosen & {"v0", "v1", "v2", "v3"} and chosen & {"bad0", "bad1", "bad2", "bad3"} and len(chosen) < 6
    expected = decoded(some)
    assert {key for key, (_, reason, _) in expected.items() if reason} == {k for k in chosen if k.startswith("bad")}
    assert set(compared) - chosen == {"v0"} - chosen, (
        "and the first of its codec, so that a wrong decoder is found at once"
    )
    assert decoded(some[::-1]) == decoded(some[::-1], 1, 2, 5) == decoded(some[4:] + some[:4]) == expected


def test_which_files_are_compared() -> None:
    """One of COMPARED_EVERY by name, in the CPU's share or not."""
    many = [Media(f"stage2/{i}", Path(f"/a/{i}.mp4")) for i in range(10_000)]
    chosen = [m for m in many if is_compared(m)]
    assert 1 <= len(chosen) <= 12
    moved = [replace(m, key=f"stage3/{m.key}", path=Path("/b") / m.path.name) for m in chosen]
    assert all(map(is_compared, moved)) and 0 < sum(is_for_the_cpu(m, 0.5) for m in chosen) < len(chosen)
