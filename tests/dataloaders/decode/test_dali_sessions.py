"""Several pipelines decode in turn: batches of one size, results in order, a bad file costs its own pipeline. With a stand-in
for DALI's pipeline, and with DALI on the CPU; not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.dali.request import DecodeRequest
from dataloaders.decode.dali.sessions import Sessions
from dataloaders.decode.decoder import decode_cropped
from dataloaders.decode.preprocess import Preprocess
from dataloaders.records import Media
from tests.media import needs_dali, write_video

N, PREPROCESS = 4, Preprocess(32, 32)
SIZES = [(64, 48), (96, 72), (160, 112)]
THREE = Sessions(pipelines=3, threads=1, batch=2)


class StandIn:
    """A pipeline that decodes with PyAV and records its batches; it fails for a batch with a file named bad*."""

    made: list[StandIn]
    log: list[tuple[int, list[tuple[int, int]]]]

    def __init__(self, *arguments: object) -> None:
        self.number, self.waiting = len(self.made), []
        self.made.append(self)

    def start(self, requests: list[DecodeRequest]) -> None:
        self.waiting.append(requests)
        if requests[0].media.key != "trial":
            self.log.append((self.number, [request.size for request in requests]))

    def finish(self, requests: list[DecodeRequest], seconds: float | None) -> list[np.ndarray]:
        assert self.waiting.pop(0) == requests, "batches of a pipeline are in order"
        if any(request.media.path.stem.startswith("bad") for request in requests):
            raise RuntimeError("encountered: a bad file")
        return [decode_cropped(r.media, N, PREPROCESS)[np.unique(r.places, return_index=True)[1]] for r in requests]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[Media]:
    folder = tmp_path_factory.mktemp("videos")
    vp9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}}
    paths = [write_video(folder / f"v{i}.webm", 6 + i % 4, size=SIZES[i % 3], **vp9) for i in range(14)]
    paths.insert(5, write_video(folder / "bad.webm", 8, size=SIZES[0], **vp9))
    return [Media(path.stem, path) for path in paths]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    StandIn.made, StandIn.log = [], []
    monkeypatch.setattr(dali, "Pipeline", StandIn)
    monkeypatch.setattr(dali, "require", lambda: None)
    yield StandIn


def test_pipelines_in_turn(media: list[Media], stand_in: type[StandIn]) -> None:
    good = [m for m in media if m.key != "bad"]
    with dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1, sessions=THREE) as decoder:
        results = list(decoder.map(good))
    assert [result.media for result in results] == good and {result.by for result in results} == {"DALI (vp9)"}
    assert len(stand_in.made) == 3
    assert [number for number, _ in stand_in.log] == [i % 3 for i in range(len(stand_in.log))]
    first = [size for _, batch in stand_in.log[: THREE.window // THREE.batch] for size in batch]
    assert first == sorted(first), "files of a size follow one another, within a window"
    for m, result in zip(good, results):
        np.testing.assert_array_equal(result.frames, decode_cropped(m, N, PREPROCESS))


def test_a_bad_file_costs_its_own_pipeline(media: list[Media], stand_in: type[StandIn]) -> None:
    with dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1, sessions=THREE) as decoder:
        first = list(decoder._pipelines)
        results = list(decoder.map(media))
        kept = sum(now is before for now, before in zip(decoder._pipelines, first))
    assert [result.media for result in results] == media
    assert kept == 2, "the other pipelines go on"
    by = {result.media.key: result.by for result in results}
    assert by.pop("bad") == "PyAV (DALI cannot decode it)" and set(by.values()) == {"DALI (vp9)"}
    assert all(result.frames is not None for result in results)


@needs_dali
def test_several_pipelines_of_dali_give_the_bytes_of_one(media: list[Media]) -> None:
    found = []
    for sessions in (Sessions(1, 1, 16), THREE):
        with dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1, sessions=sessions) as decoder:
            found.append([np.asarray(result.frames).tobytes() for result in decoder.map(media)])
    assert found[0] == found[1]
