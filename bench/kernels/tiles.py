"""Tile sizes of the trajectory kernels on this GPU: the shipped sizes against others that do not spill registers.

`python -m bench.gpu` runs this in its section `tiles`. Copy the fastest sizes into kernels/pite_kernels/gpu/trajectory.py by
hand. They are not tuned at run time, so that every machine computes the same sums in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.kernels.inputs import Case, Inputs
from bench.measure import Step, interleaved


def tile(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=stages)


# Compiled for sm_90 and sm_100 without spills; 128 x 256 spills in the forward kernel.
CANDIDATES = {
    "forward_tiles": [
        tile(128, 128, 64, 8, 4),
        tile(256, 128, 64, 8, 3),
        tile(128, 128, 128, 8, 2),
        tile(64, 128, 64, 4, 3),
    ],
    "hidden_tiles": [tile(128, 128, 64, 8, 4), tile(128, 256, 64, 8, 3), tile(256, 128, 64, 8, 3)],
    "weight_tiles": [tile(128, 128, 64, 8, 4), tile(128, 256, 64, 8, 3), tile(128, 128, 128, 8, 3)],
}


@contextmanager
def tiled(choice: str, tiles: dict[str, int] | None) -> Iterator[None]:
    """Context in which the kernel is launched with `tiles`; None: with the shipped sizes."""
    from pite_kernels.gpu import trajectory

    if tiles is None:
        yield
    else:
        with patch.object(trajectory, choice, lambda *_: tiles):
            yield


def kernels_of(x: Inputs) -> dict[str, Callable[[], list[Tensor]]]:
    """Name of the function that chooses a kernel's tiles -> a step that runs the kernel."""
    from pite_kernels.gpu import trajectory

    hidden, weight, bias = (t.detach() for t in (x.hidden, x.weight, x.bias))

    def forward() -> list[Tensor]:
        # Signs differ by 2, 1 or not at all.
        return list(trajectory.forward(hidden, weight, bias, x.targets, x.rows, None, True)[:3])

    _, sign, scale = forward()

    def grad_hidden() -> list[Tensor]:
        gradient = torch.empty_like(hidden)
        trajectory.write_grad_hidden(gradient, scale, weight, sign, x.rows, False)
        return [gradient]

    def grad_weight() -> list[Tensor]:
        return [trajectory.grad_weight(scale, hidden, weight, sign, x.rows)]

    return {"forward_tiles": forward, "hidden_tiles": grad_hidden, "weight_tiles": grad_weight}


def measure_tiles(case: Case, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """One record per kernel and tile size: its times in milliseconds, or the problem if it is not timed."""
    records = []
    for choice, step in kernels_of(Inputs(case, device)).items():
        shipped = step()
        steps: dict[str, Step] = {}
        problems: dict[str, str] = {}
        for tiles in (None, *CANDIDATES[choice]):
            name = "shipped" if tiles is None else " ".join(str(v) for v in tiles.values())

            def timed(tiles: dict[str, int] | None = tiles, step: Step = step, choice: str = choice) -> Any:
                with tiled(choice, tiles):
                    return step()

            try:
                results = timed()
            except Exception as error:  # for example, not enough shared memory on this GPU
                problems[name] = f"fails: {type(error).__name__}"
                continue
            if any(differ(a, b) for a, b in zip(results, shipped, strict=True)):
                problems[name] = "wrong"
            else:
                steps[name] = timed
        timings = interleaved(steps, device, rounds)
        for name in (*problems, *timings):
            record: dict[str, Any] = {"case": case.name, "kernel": choice.removesuffix("_tiles"), "tiles": name}
            if name in timings:
                t = timings[name]
                record |= {"median_ms": t.median * 1e3, "low_ms": t.low * 1e3, "high_ms": t.high * 1e3}
            records.append(record | {"problem": problems.get(name)})
    return records


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether two results differ by more than the rounding of another summation order in half precision."""
    return not bool(((a - b).abs().max() <= 0.01 * b.abs().max()).item())
