"""One row of results: an implementation is built, checked against float64, and timed only if it is correct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from bench.kernels.cases import BARE, IMPLEMENTATIONS, OURS, PLAIN
from bench.kernels.inputs import Case, Inputs
from bench.measure import Roofline, Step, Timing, gate, interleaved


@dataclass(frozen=True)
class Row:
    """The result of one implementation of a case. Times are in milliseconds; None if there is a `problem`.

    problem         the reason why there are no times: a failed import, an error or wrong results
    roofline_share  the roofline's lower bound (measured GEMM rate and bandwidth of this device) over the median; None
                    for bare GEMMs, which do not do all of the work
    """

    case: str
    op: str
    tokens: int
    depth: int
    fraction: float
    dtype: str
    implementation: str
    problem: str | None
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    peak_mb: float | None = None
    roofline_share: float | None = None

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def find_problem(case: Case, implementation: str, device: torch.device) -> str | None:
    """The reason not to time this implementation: a failed import, an error or wrong results. Else None."""
    # On a GPU with enough rows for a second chunk of logits and for several splits of dW.
    small = Inputs(replace(case, tokens=min(case.tokens, 4096 if device.type == "cuda" else 512)), device)
    try:
        step = IMPLEMENTATIONS[case.op][implementation](small)
    except (ImportError, AttributeError, ValueError) as error:
        return f"not available: {error}"
    if implementation == BARE:
        return None
    try:
        results = step()
    except Exception as error:  # a peer may raise anything
        return _failure(error)
    plain = IMPLEMENTATIONS[case.op][PLAIN]
    wrong = gate(results, plain(small)(), plain(small.double())())
    return f"wrong: {wrong}" if wrong else None


Checked = dict[tuple[Case, str], str | None]


def measure(
    case: Case,
    device: torch.device,
    roof: Roofline,
    rounds: int,
    checked: Checked,
    names: Sequence[str] | None = None,
) -> list[Row]:
    """Time the implementations of a case, interleaved.

    names    some of IMPLEMENTATIONS; None for all
    checked  cache of the peers' check results, updated here: a peer is checked once for all fractions of rows, because
             the check mostly waits for compilation. Ours is checked for every case
    """
    torch._dynamo.reset()  # otherwise the recompilation limit would be reached, and eager mode would be timed
    problems: dict[str, str | None] = {}
    for name in IMPLEMENTATIONS[case.op]:
        if names is not None and name not in names:
            continue
        key = (case if name == OURS else replace(case, fraction=0.5)), name
        if key not in checked:
            checked[key] = find_problem(key[0], name, device)
        problems[name] = checked[key]
    inputs = Inputs(case, device)
    steps: dict[str, Step] = {}
    for name, problem in problems.items():
        if problem is None:
            step = IMPLEMENTATIONS[case.op][name](inputs)
            try:
                # At the real shape a peer may run out of memory, or require a size to be a multiple of some number.
                step()
            except Exception as error:
                problems[name] = _failure(error)
            else:
                steps[name] = step
    timings = interleaved(steps, device, rounds)
    return [_row(case, name, problem, timings.get(name), roof) for name, problem in problems.items()]


def _failure(error: Exception) -> str:
    return f"fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _row(case: Case, name: str, problem: str | None, timing: Timing | None, roof: Roofline) -> Row:
    row = Row(
        case.name,
        case.op,
        case.tokens,
        case.depth,
        case.fraction,
        str(case.dtype).removeprefix("torch."),
        name,
        problem,
    )
    if timing is None:
        return row
    return replace(
        row,
        median_ms=timing.median * 1e3,
        low_ms=timing.low * 1e3,
        high_ms=timing.high * 1e3,
        peak_mb=None if timing.peak_bytes is None else timing.peak_bytes / 1e6,
        roofline_share=None if name == BARE else roof.floor(*case.work) / timing.median,
    )


def describe(rows: Sequence[Row]) -> str:
    """The rows of a case for the terminal."""
    lines = [rows[0].case]
    for row in rows:
        if row.median_ms is None:
            lines.append(f"  {row.implementation:24} {row.problem}")
        else:
            share = "" if row.roofline_share is None else f"  {row.roofline_share:6.1%} of the roofline"
            lines.append(f"  {row.implementation:24} {row.median_ms:9.3f} ms{share}")
    return "\n".join(lines)
