"""`python -m bench.report FILE...`: result files of `bench.gpu` or pytest-benchmark as Markdown and one PNG.

If our results fail the correctness check, the case shows the problem and no speed-up. `--output bench/results/report`
writes the committed tables; `--readme README.md` rewrites the table of costs in that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.costs import cost_table
from bench.encode import table as encoding_table
from bench.kernels.cases import BARE, CANDIDATES, OURS, PLAIN
from bench.kernels.rows import Row

BEGIN, END = "<!-- costs: python -m bench.report --readme README.md -->", "<!-- table: end -->"
RESULTS = Path(__file__).parent / "results"

# Target milliseconds on an H200, for one packed row of 16,384 tokens; docs/kernels.md derives them.
TARGETS_MS = {
    "trajectory: T=16384, d=4096, 100% of rows": 0.40,
    "cross_entropy: T=16384, d=4096, 100% of rows, V=32000, frozen, smoothing 0.1": 12.5,
    "cross_entropy: T=16384, d=4096, 25% of rows, V=32000, frozen, smoothing 0.1": 3.3,
}


def read(path: Path) -> tuple[Mapping[str, str], list[Row]]:
    """The environment and rows of a result file. Raises ValueError if it is neither from bench.gpu nor from pytest."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    if isinstance(content, dict) and "rows" in content:
        names = {f.name for f in fields(Row)}
        return content["environment"], [Row(**{k: v for k, v in r.items() if k in names}) for r in content["rows"]]
    if isinstance(content, dict) and "benchmarks" in content:
        benchmarks = [b for b in content["benchmarks"] if "implementation" in b["extra_info"]]
        if benchmarks:
            return _environment(benchmarks[0]["extra_info"]), [_from_pytest(b) for b in benchmarks]
    raise ValueError(f"{path}: has neither rows of bench.gpu nor kernel benchmarks of pytest-benchmark")


def of_load(path: Path) -> bool:
    """Whether a result file is one of `bench.load`, whose table is in docs/install.md."""
    content = json.loads(path.read_text())
    return isinstance(content, dict) and any("share" in row and "policy" in row for row in content.get("rows", ()))


def of_machine_code(path: Path) -> bool:
    """Whether a result file is that of `bench.machine_code`, which writes its own table."""
    content = json.loads(path.read_text())
    return isinstance(content, dict) and any("registers" in row for row in content.get("rows", ()))


def _environment(info: Mapping[str, Any]) -> Mapping[str, str]:
    known = ("device", "commit", "python", "torch", "triton")
    return {**{k: v for k, v in info.items() if k in known}, "spread": "quartiles"}


def _spread(environment: Mapping[str, str]) -> str:
    """The meaning of the lower and upper times; those of bench.gpu and bench.step are deciles."""
    return environment.get("spread", "10% to 90%")


def _from_pytest(benchmark: Mapping[str, Any]) -> Row:
    info, stats = benchmark["extra_info"], benchmark["stats"]
    return Row(
        case=benchmark["group"],
        op=info["op"],
        tokens=0,
        depth=0,
        fraction=info["fraction"],
        dtype="float32",
        implementation=info["implementation"],
        problem=None,
        median_ms=stats["median"] * 1e3,
        low_ms=stats["q1"] * 1e3,
        high_ms=stats["q3"] * 1e3,
        roofline_share=info["roofline_share"],
    )


def read_steps(path: Path) -> tuple[Mapping[str, str], list[Mapping[str, Any]]] | None:
    """The environment and rows of a result file of `bench.step`; None if the file is of another kind."""
    content = json.loads(path.read_text())
    rows = content.get("rows", []) if isinstance(content, dict) else []
    return (content["environment"], rows) if any("tokens_per_second" in row for row in rows) else None


def encoding(path: Path) -> Mapping[str, Any] | None:
    """The content of a result file of `bench.encode`; None if the file is of another kind."""
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) and "nvdec" in content else None


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
    for case, members in cases_of(rows).items():
        gain, target = speedup(members), TARGETS_MS.get(case)
        notes = ([f"{gain:.2f} times the best peer"] if gain else []) + ([f"target {target} ms"] if target else [])
        extra = overhead(members)
        notes += [] if extra is None else [f"{extra:.0%} over the bare GEMMs, target 8% on an H200"]
        lines += [f"### {case}" + (f" ({'; '.join(notes)})" if notes else ""), ""]
        lines += [f"| | median ms | {_spread(environment)} | peak MB | roofline |", "|---|---|---|---|---|"]
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
    lines = [f"| {about} | ours, ms ({_spread(environment)}) | eager, ms | best peer, ms |", "|---|---|---|---|"]
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


def fill(text: str, table: str, mark: str = BEGIN) -> str:
    """`text` with `table` between two marks. Raises ValueError if a mark is missing."""
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the file has no marks for the table: {mark} ... {END}")
    return f"{before}{mark}\n{table}\n{END}{after}"


def plot(environment: Mapping[str, str], rows: Sequence[Row], path: Path) -> None:
    """Plot the medians, one panel per case, with the spread as error bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = cases_of(r for r in rows if r.median_ms is not None)
    figure, panels = plt.subplots(len(cases), 1, figsize=(8, 1.5 * len(cases) + 1), squeeze=False)
    for panel, (case, members) in zip(panels[:, 0], cases.items()):
        medians = [r.median_ms or 0.0 for r in members]
        below = [max(0.0, m - (r.low_ms or m)) for m, r in zip(medians, members)]
        above = [max(0.0, (r.high_ms or m) - m) for m, r in zip(medians, members)]
        colours = ["tab:orange" if r.implementation == OURS else "tab:gray" for r in members]
        panel.barh([r.implementation for r in members], medians, xerr=[below, above], color=colours)
        panel.invert_yaxis()
        panel.set_title(case, fontsize=8, loc="left")
        panel.tick_params(labelsize=7)
    panels[-1, 0].set_xlabel("milliseconds, forward and backward")
    figure.suptitle(environment.get("device", ""), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="result files; default: all in bench/results")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.png instead of printing")
    parser.add_argument("--readme", type=Path, help="rewrite the table of costs in this file instead of printing")
    options = parser.parse_args(arguments)
    if options.readme is not None:
        options.readme.write_text(fill(options.readme.read_text(), cost_table(RESULTS)))
        return 0
    files = options.files or sorted(RESULTS.glob("*.json"))
    if not files:
        parser.error("no result files: run python -m bench.gpu, or pytest bench --benchmark-json=FILE")
    try:
        steps = [found for path in files if (found := read_steps(path))]
        encodings = [content for path in files if (content := encoding(path))]
        others = (read_steps, encoding, of_load, of_machine_code)
        files = [path for path in files if not any(other(path) for other in others)]
        results = [read(path) for path in files]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    step_tables = [step_table(*found) for found in steps] + [encoding_table(content) for content in encodings]
    summaries = [*(summary(*result) for result in results), *step_tables]
    text = "\n".join([*(f"{table}\n" for table in summaries), *(markdown(*result) for result in results)])
    if options.output is None:
        print(text)
        return 0
    options.output.with_suffix(".md").write_text(text)
    for index, result in enumerate(results):
        name = options.output.stem + (f"-{index}" if index else "")
        plot(*result, options.output.with_name(name).with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
