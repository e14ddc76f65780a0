"""DALI cannot be interrupted: after a timeout its batch goes to PyAV and a new pipeline continues."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.dali.sessions import ON_CPU
from dataloaders.decode.decoder import decode_cropped, guarded
from dataloaders.decode.preprocess import Preprocess
from dataloaders.records import Media
from tests import SOURCE_PATH
from tests.damage import decode_or_hang
from tests.media import needs_dali, write_video

pytestmark = needs_dali
N, FILES, LIMIT = 5, 10, 2.0
PREPROCESS = Preprocess(32, 32)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[Media]:
    """Ten VP9 files; "v2.mp4" is the one that `decode_or_hang` hangs on."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [folder / f"v{i}.mp4" for i in range(FILES)]
    for i, path in enumerate(paths):
        write_video(path, 12 + i, codec="libvpx-vp9", options={"cpu-used": "8"})
    return [Media(path.stem, path) for path in paths]


def hanging(patch: Callable[..., None], released: threading.Event, pipelines: int | None = None) -> None:
    """Let the first pipelines, or all, wait for `released` before they decode. The first decodes its first file, the trial."""
    from nvidia.dali import fn

    decode, built, tried = fn.decoders.video, [], []

    def wait(content: Any) -> Any:
        if tried:
            released.wait()
        tried.append(content)
        return content

    def decode_later(content: Any, **options: Any) -> Any:
        built.append(content)
        hangs = pipelines is None or len(built) <= pipelines
        return decode(fn.python_function(content, function=wait) if hangs else content, **options)

    patch(fn.decoders, "video", decode_later)


def test_a_batch_that_hangs(
    media: list[Media], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first pipeline hangs while it reads. One of the four files of its batch hangs PyAV as well."""
    released = threading.Event()
    with monkeypatch.context() as patch:
        hanging(patch.setattr, released)
        decoder = dali.DaliDecoder(
            "video", N, PREPROCESS, "cpu", workers=1, time_limit=LIMIT, sessions=replace(ON_CPU, batch=4)
        )
    decoder._decode = partial(guarded, partial(decode_or_hang, num_frames=N, preprocess=PREPROCESS))
    try:
        with decoder:
            results = list(decoder.map(media))
    finally:
        released.set()
    assert [result.media for result in results] == media, "none is lost, none is repeated"
    by = [result.by for result in results]
    assert by[:2] + by[3:4] == ["PyAV (DALI timed out after 2 s)"] * 3 and set(by[4:]) == {"DALI (vp9)"}
    assert results[2].frames is None and results[2].reason == f"{media[2].path}: it took more than 2 s and was stopped"
    for result in results[:2] + results[3:]:
        assert isinstance(result.frames, np.ndarray)
        assert np.abs(result.frames.astype(int) - decode_cropped(result.media, N, PREPROCESS)).max() <= 2
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert all((str(m.path) in warning) == (place < 4) for place, m in enumerate(media)), warning


def always_hanging(folder: Path) -> None:
    """Decode with a DALI that always hangs, and end as a program does."""
    hanging(setattr, threading.Event())
    media = [Media(str(i), path) for i, path in enumerate(sorted(folder.glob("*.mp4")))]
    with dali.DaliDecoder(
        "video", N, PREPROCESS, "cpu", workers=1, time_limit=1.5, sessions=replace(ON_CPU, batch=2)
    ) as decoder:
        results = list(decoder.map(media))
    print([result.by for result in results if result.frames is not None])


def test_dali_that_always_hangs_is_disabled(media: list[Media]) -> None:
    """After three pipelines PyAV decodes everything, and the threads that hang do not keep the program from ending."""
    code = (
        "import sys, pathlib\nfrom tests.dataloaders.decode.test_dali_hangs import always_hanging\n"
        "if __name__ == '__main__':\n    always_hanging(pathlib.Path(sys.argv[1]))\n"
    )
    script = media[0].path.parent / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, media[0].path.parent],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": SOURCE_PATH},
    )
    assert done.returncode == 0, done.stderr
    expected = ["PyAV (DALI timed out after 1.5 s)"] * 4 + ["PyAV (DALI is disabled)"] * 6
    assert done.stdout == f"{expected}\n"
    assert done.stderr.count("One of these files hangs") == 3 and done.stderr.count("disabling DALI after 3 hangs") == 1
