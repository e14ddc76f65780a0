"""Profile chosen steps: PyTorch's profiler trace, and on CUDA the history of all allocations."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from engine.distributed.world import World


class Profile:
    """Profiles this rank's steps `first` to `last`, counted from 1, into `directory`; does nothing if `steps` is None.

    rankN.trace.json.gz opens in https://ui.perfetto.dev, rankN.memory.pickle in https://docs.pytorch.org/memory_viz
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None, world: World, start: int) -> None:
        self._directory, self._world = directory, world
        self._first, self._last = steps or (0, 0)
        self._profiler: torch.profiler.profile | None = None
        self._begin(start)

    def after_step(self, done: int) -> None:
        if self._profiler is not None and done >= self._last:
            self._end()
        self._begin(done)

    def _begin(self, done: int) -> None:
        if done + 1 != self._first:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def _end(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"rank{self._world.rank}"
        self._profiler.export_chrome_trace(str(self._directory / f"{name}.trace.json.gz"))
        if self._world.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._directory / f"{name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profiler = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that ends before its last profiled step still writes what was recorded.
        if self._profiler is not None:
            self._end()
