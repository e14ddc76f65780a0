"""Part `decode`: files to 100 cropped frames each, by PyAV on all cores, and by DALI and torchcodec's CUDA decoder with 1 to 14
sessions.

Before a decoder is timed, its frames of the first file are compared with PyAV's, frame by frame and with their neighbours.
A file that it leaves to PyAV is counted in the row: its rate is then that of both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Final, Literal

import numpy as np

from bench.encode.files import Files, videos
from bench.encode.results import NUM_FRAMES, Results, Row
from bench.encode.settings import Clock, Settings, problem_of, rates
from dataloaders.cpu import available_cores
from dataloaders.decode.dali.agreement import compare, surroundings
from dataloaders.decode.dali.sessions import Sessions
from dataloaders.decode.decoder import DecodePool, Decoder, decode_cropped
from dataloaders.decode.preprocess import Preprocess
from dataloaders.records import Media

PYAV: Final = "PyAV"
DALI: Final = "DALI"
TORCHCODEC: Final = "torchcodec"


def measure(settings: Settings, results: Results) -> None:
    clock = Clock(settings.budget)
    for files in videos(settings):
        for name, sessions, make in _decoders(settings):
            if clock.is_up:
                results.add("decode", Row(files.kind, name, sessions, problem="not run: the budget is used up"))
                continue
            try:
                results.add("decode", _row(files, name, sessions, make, settings.rounds))
            except Exception as error:  # One failure must not stop the others.
                results.add("decode", Row(files.kind, name, sessions, problem=problem_of(error)))


def _decoders(settings: Settings) -> list[tuple[str, int | None, Callable[[], AbstractContextManager[Decoder]]]]:
    """Name, sessions and maker of each decoder."""
    cores = available_cores()
    cropped = partial(decode_cropped, num_frames=NUM_FRAMES, preprocess=Preprocess())

    def on_device(engine: Literal["DALI", "torchcodec"], sessions: int) -> AbstractContextManager[Decoder]:
        from dataloaders.decode.dali.decoder import DaliDecoder

        return DaliDecoder(
            "video",
            NUM_FRAMES,
            Preprocess(),
            settings.device,
            workers=cores,
            sessions=_sessions(sessions),
            engine=engine,
        )

    on_gpu = settings.device == "cuda"
    number = settings.sessions if on_gpu else settings.sessions[:1]
    # torchcodec finds FFmpeg's libraries on the GPU machine; on a CPU `bench.test_decode` measures it.
    engines: tuple[Literal["DALI", "torchcodec"], ...] = (DALI, TORCHCODEC) if on_gpu else (DALI,)
    return [
        (PYAV, None, lambda: DecodePool(cropped, cores)),
        *((engine, sessions, partial(on_device, engine, sessions)) for sessions in number for engine in engines),
    ]


def _sessions(files_at_once: int) -> Sessions:
    """Up to four pipelines, with this many threads together."""
    pipelines = min(4, files_at_once)
    threads = -(-files_at_once // pipelines)
    return Sessions(pipelines, threads, 2 * threads)


def _row(
    files: Files, name: str, sessions: int | None, make: Callable[[], AbstractContextManager[Decoder]], rounds: int
) -> Row:
    media = [Media(f"{files.kind}/{path.stem}", path) for path in files.paths]
    with make() as decoder:
        (first,) = decoder.map(media[:1])  # Processes start, and codecs are compared.
        if first.frames is None:
            raise ValueError(first.reason)
        ours = first.frames if isinstance(first.frames, np.ndarray) else first.frames.cpu().numpy()
        agreement = compare(ours, surroundings(media[0], NUM_FRAMES, Preprocess()).frames)
        if not agreement:
            raise ValueError(f"{name} {agreement}")
        by: Counter[str] = Counter()

        def decode_all() -> int:
            for decoded in decoder.map(media):
                if decoded.frames is None:
                    raise ValueError(decoded.reason)
                by[decoded.by] += 1
            return files.frames

        measured = rates(decode_all, rounds)
    notes = [f"within {agreement.difference:.1f}/255"]
    notes += [f"{count // rounds} files by {kind}" for kind, count in by.items() if not kind.startswith(name)]
    return Row(files.kind, name, sessions, agreement="; ".join(notes), **measured)
