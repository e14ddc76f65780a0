"""The decoding pool: results come in order, and a bad file does not affect the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.decode.decoder import DecodePool, decode_cropped
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.readable import DecodeError
from dataloaders.decode.workers import Workers
from dataloaders.records import Media
from tests import SOURCE_PATH
from tests.media import write_video

PREPROCESS = Preprocess(32, 32)


def pretend(media: Media) -> np.ndarray:
    """Decode by name: some files fail, some raise, some kill their process."""
    number = int(media.key)
    if media.path.stem == "bad":
        raise DecodeError(f"{media.path}: the file is empty")
    if media.path.stem == "bug":
        raise ZeroDivisionError("division by zero")
    if media.path.stem == "death":
        os.kill(os.getpid(), signal.SIGKILL)
    if media.path.stem == "hang":
        # As a decoder that hangs in C: no signal that Python handles stops it.
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
        while True:
            pass
    time.sleep(0.002 * (number % 3))
    return np.full((1, 2, 2, 3), number % 256, dtype=np.uint8)


def media(names: list[str]) -> list[Media]:
    return [Media(str(i), Path(f"{name}.mp4")) for i, name in enumerate(names)]


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_failures(workers: int) -> None:
    names = ["good", "bad", "good", "bug"] * 5 + ["good"] * 10
    with DecodePool(pretend, workers) as pool:
        results = list(pool.map(media(names)))
    assert [r.media for r in results] == media(names)
    for i, (name, result) in enumerate(zip(names, results)):
        if name == "good":
            assert result.frames is not None and result.frames[0, 0, 0, 0] == i and not result.reason
        else:
            assert result.frames is None
            expected = {"bad": "bad.mp4: the file is empty", "bug": "bug.mp4: ZeroDivisionError: division by zero"}
            assert result.reason == expected[name]


def test_a_file_that_kills_its_process_fails_alone() -> None:
    names = ["good"] * 3 + ["death"] + ["good"] * 4 + ["death", "bad", "good"]
    with DecodePool(pretend, 2) as pool:
        results = list(pool.map(media(names)))
    assert [r.media.key for r in results] == [str(i) for i in range(len(names))]
    assert [r.frames is not None for r in results] == [name == "good" for name in names]
    assert results[3].reason == "death.mp4: the process that decoded it died"


def test_a_file_that_hangs_is_stopped_after_the_time_limit_and_fails_alone() -> None:
    names = ["good", "hang", *["good"] * 6, "hang", "good"]
    started = time.monotonic()
    with DecodePool(pretend, 2, time_limit=0.5) as pool:
        results = list(pool.map(media(names)))
        assert _wait_for(lambda: len(multiprocessing.active_children()) == 2), "those that were killed are replaced"
    assert time.monotonic() - started < 15
    assert [r.media.key for r in results] == [str(i) for i in range(len(names))]
    assert [r.frames is not None for r in results] == [name == "good" for name in names]
    assert results[1].reason == "hang.mp4: it took more than 0.5 s and was stopped"


def test_an_idle_process_that_dies_is_replaced() -> None:
    with DecodePool(pretend, 2) as pool:
        for _ in range(2):
            assert next(pool.map(media(["good"]))).frames is not None
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
        assert next(pool.map(media(["good"]))).frames is not None


def test_a_timeout_error_of_a_task_is_its_own() -> None:
    with Workers(1, time_limit=60) as pool, pytest.raises(TimeoutError, match="the server did not answer"):
        pool.submit(raise_timeout).result()


def raise_timeout() -> None:
    raise TimeoutError("the server did not answer")


def test_leaving_the_pool_kills_processes_that_hang() -> None:
    with DecodePool(pretend, 1, time_limit=None) as pool:
        assert next(pool.map(media(["good", "hang"]))).frames is not None
        pids = [process.pid for process in multiprocessing.active_children()]
    assert pids and not any(_alive(pid) for pid in pids)


def test_processes_that_cannot_start_are_an_error(tmp_path: Path) -> None:
    """A script without a main guard, which the workers would run again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from tests.dataloaders.decode.test_decode import *\n"
        "with DecodePool(pretend, 1) as pool:\n    list(pool.map(media(['good'])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE_PATH}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert done.returncode != 0
    assert done.stderr.endswith("RuntimeError: the decoding processes have ended, or could not be started\n")


def test_prefetch_is_bounded() -> None:
    taken = 0

    def count() -> None:
        nonlocal taken
        taken += 1

    with DecodePool(pretend, 1, ahead=2) as pool:
        source = (count() or m for m in media(["good"] * 50))
        next(pool.map(source))
        assert taken == 3


def test_workers_import_no_torch() -> None:
    """There are many workers; with torch each would need hundreds of megabytes and start seconds later."""
    code = "import sys, engine.encode; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_workers_exit_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import multiprocessing, pathlib, time\nfrom tests.dataloaders.decode.test_decode import *\n"
        "if __name__ == '__main__':\n"
        f"    pool = DecodePool(pretend, 1)\n    list(pool.map(media(['good'])))\n"
        "    (pid,) = (process.pid for process in multiprocessing.active_children())\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(pid))\n    time.sleep(60)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": SOURCE_PATH})
    try:
        worker = _wait_for(lambda: int((tmp_path / "pid").read_text() or 0) if (tmp_path / "pid").exists() else 0)
        assert _alive(worker)
    finally:
        parent.kill()
        parent.wait()
    assert _wait_for(lambda: not _alive(worker))


def _wait_for(condition, seconds: float = 20):  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_decode_cropped(tmp_path: Path) -> None:
    decode = partial(decode_cropped, num_frames=4, preprocess=PREPROCESS)
    video = write_video(tmp_path / "v.mp4", 20)
    assert decode(Media("v", video)).shape == (4, 32, 32, 3)
    clip = decode(Media("v", video, clip=(0.5, 1.0)))
    assert not np.array_equal(clip, decode(Media("v", video)))
    Image.new("RGB", (50, 40), (10, 20, 30)).save(tmp_path / "i.png")
    still = decode(Media("i", tmp_path / "i.png", kind="image"))
    assert still.shape == (1, 32, 32, 3) and (still == [10, 20, 30]).all()


def test_negative_workers() -> None:
    with pytest.raises(ValueError, match="0 or more, not -1"):
        DecodePool(pretend, -1)
