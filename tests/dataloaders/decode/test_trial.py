"""Whether DALI works on a machine is found before the first file of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.dali.request import DecodeRequest, prepare
from dataloaders.decode.dali.trial import small_video
from dataloaders.decode.preprocess import Preprocess
from dataloaders.records import Media
from tests.media import needs_dali

pytestmark = needs_dali
N, PREPROCESS = 7, Preprocess(32, 32)


def test_a_pipeline_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("Critical error when building pipeline: no driver")

    monkeypatch.setattr(dali, "Pipeline", fail)
    with pytest.raises(ValueError, match=r"DALI cannot decode on cpu here \(.*no driver\); use pyav"):
        dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_dali_that_does_not_work_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, kind: Literal["video", "image"]
) -> None:
    """As in a container whose driver decodes nothing: before the first file, so that it does not depend on the files."""

    def fail(self: dali.Pipeline, requests: list[DecodeRequest]) -> None:
        raise RuntimeError("encountered: NVDEC is not there")

    monkeypatch.setattr(dali.Pipeline, "start", fail)
    with pytest.raises(ValueError, match=r"DALI cannot decode on cpu here \(NVDEC is not there\); use pyav"):
        dali.DaliDecoder(kind, N, PREPROCESS, "cpu", workers=1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dali_gets_the_trial_on_each_device(tmp_path: Path, device: str) -> None:
    (path := tmp_path / "trial.mkv").write_bytes(small_video(device))
    request = prepare(Media("trial", path), 100, PREPROCESS, device)
    assert isinstance(request, DecodeRequest) and request.decoded == (192, 144)


def test_a_trial_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali.Pipeline, "_await", lambda *_: None)
    with pytest.raises(ValueError, match=r"DALI cannot decode on cpu here \(DALI timed out after 0\.1 s\)"):
        dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1, time_limit=0.1)
