"""Rows of results as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.kernels.cases import BARE, CANDIDATES, OURS, PLAIN
from bench.kernels.rows import Row

# Target milliseconds on an H200, for one packed row of 16,384 tokens; docs/kernels.md derives them.
TARGETS_MS = {
    "trajectory: T=16384, d=4096, 100% of rows": 0.40,
    "cross_entropy: T=16384, d=4096, 100% of rows, V=32000, frozen, smoothing 0.1": 12.5,
    "cross_entropy: T=16384, d=4096, 25% of rows, V=32000, frozen, smoothing 0.1": 3.3,
}


def spread_of(environment: Mapping[str, str]) -> str:
    """The meaning of the lower and upper times; those of bench.gpu and bench.step are deciles."""
    return environment.get("spread", "10% to 90%")


def cases_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def speedup(rows: Sequence[Row]) -> float | None:
    """The time of the fastest peer over ours; None if either is missing or ours is not correct."""
    ours = next((r for r in rows if r.implementation == OURS), None)
    peers = [r.median_ms for r in rows if r.implementation in _peers(rows) and r.median_ms is not None]
    if ours is None or ours.problem is not None or ours.median_ms is None or not peers:
        return None
    return min(peers) / ours.median_ms


def _peers(rows: Iterable[Row]) -> list[str]:
    """The implementations that do the same work and are not ours."""
    return [r.implementation for r in rows if r.implementation not in (OURS, BARE, *CANDIDATES)]


def overhead(rows: Sequence[Row]) -> float | None:
    """How much longer ours takes than the bare GEMMs, as a fraction; None if either is missing."""
    times = {r.implementation: r.median_ms for r in rows}
    ours, bare = times.get(OURS), times.get(BARE)
    return None if ours is None or bare is None else ours / bare - 1


def markdown(environment: Mapping[str, str], rows: Sequence[Row]) -> str:
    lines = [f"## {environment.get('device', 'unknown device')}", ""]
    lines += [", ".join(f"{k} {v}" for k, v in environment.items() if k != "device"), ""]
    return "\n".join([*lines, case_tables(environment, rows)])


def case_tables(environment: Mapping[str, str], rows: Sequence[Row]) -> str:
    """All numbers of each case."""
    lines: list[str] = []
    for case, members in cases_of(rows).items():
        gain, target = speedup(members), TARGETS_MS.get(case)
        notes = ([f"{gain:.2f} times the best peer"] if gain else []) + ([f"target {target} ms"] if target else [])
        extra = overhead(members)
        notes += [] if extra is None else [f"{extra:.0%} over the bare GEMMs, target 8% on an H200"]
        lines += [f"### {case}" + (f" ({'; '.join(notes)})" if notes else ""), ""]
        lines += [f"| | median ms | {spread_of(environment)} | peak MB | roofline |", "|---|---|---|---|---|"]
        for row in members:
            lines.append(_line(row))
        lines.append("")
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row.median_ms is None or row.low_ms is None or row.high_ms is None:
        return f"| {row.implementation} | {row.problem} | | | |"
    peak = "" if row.peak_mb is None else f"{row.peak_mb:.0f}"
    share = "" if row.roofline_share is None else f"{row.roofline_share:.0%}"
    spread = f"{row.low_ms:.3f} to {row.high_ms:.3f}"
    return f"| {row.implementation} | {row.median_ms:.3f} | {spread} | {peak} | {share} |"


def summary(environment: Mapping[str, str], rows: Sequence[Row]) -> str:
    """One line per case: ours, plain PyTorch and the best peer, each a median in milliseconds."""
    about = f"{environment.get('device', 'unknown device')}, commit {environment.get('commit', 'unknown')}"
    lines = [f"| {about} | ours, ms ({spread_of(environment)}) | eager, ms | best peer, ms |", "|---|---|---|---|"]
    for case, members in cases_of(rows).items():
        ours = next((r for r in members if r.implementation == OURS), None)
        peers = {r.implementation: r.median_ms for r in members if r.median_ms and r.implementation in _peers(members)}
        if ours is None or ours.median_ms is None or ours.problem is not None:
            lines.append(f"| {case} | {'not measured' if ours is None else ours.problem} | | |")
            continue
        best = min(peers, key=lambda name: peers[name], default=None)
        eager = f"{peers[PLAIN]:.2f}" if PLAIN in peers else ""
        peer = "" if best is None else f"{peers[best]:.2f} ({best})"
        lines.append(f"| {case} | {ours.median_ms:.2f} ({ours.low_ms:.2f} to {ours.high_ms:.2f}) | {eager} | {peer} |")
    return "\n".join(lines)


def step_table(environment: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """One line per model and implementation of a training step."""
    about = (
        f"training step, {environment.get('device', 'unknown device')}, commit {environment.get('commit', 'unknown')}"
    )
    head = f"| {about} | sample tokens/s (10% to 90%) | samples/s | computed rows/s | MFU | peak GB |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in rows:
        name = f"{row['model']}: {row['implementation']}"
        if row["tokens_per_second"] is None:
            lines.append(f"| {name} | {row['problem']} | | | | |")
            continue
        rate = f"{row['tokens_per_second']:,.0f} ({row['slow']:,.0f} to {row['fast']:,.0f})"
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
        computed = f"{row['rows_per_second']:,.0f}" if row.get("rows_per_second") else ""
        lines.append(f"| {name} | {rate} | {row['videos_per_second']:,.1f} | {computed} | {mfu} | {peak} |")
    return "\n".join(lines)
