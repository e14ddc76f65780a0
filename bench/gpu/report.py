"""The results folder of a GPU session as Markdown, finished or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.gpu.results import SESSION
from bench.kernels.rows import Row
from bench.tables import case_tables, spread_of, step_table, summary
from dataloaders.files import read_json_object

Content = Mapping[str, Any]


def is_session(path: Path) -> bool:
    return (path / SESSION).is_file()


def session_report(folder: Path) -> str:
    """The states of the sections, what was not run, and the tables of each section.

    Raises ValueError, naming the file, if one is no JSON object.
    """
    session = read_json_object(folder / SESSION)
    environment, sections = session["environment"], session["sections"]
    lines = [f"# Session on {environment['device']}, commit {environment['commit']}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in environment.items() if key not in ("device", "commit")), ""]
    lines += ["| section | measures | state | seconds | estimated |", "|---|---|---|---|---|"]
    lines += [_state(name, record) for name, record in sections.items()]
    missing = {name: record for name, record in sections.items() if record["state"] != "done"}
    lines += ["", "Not run, or not to the end:" if missing else "All sections ran.", *([""] if missing else [])]
    lines += [f"- {name}: {record.get('problem', 'killed while it ran')}" for name, record in missing.items()]
    for name in sections:
        path = folder / f"{name}.json"
        if path.exists():
            lines += ["", *_section(name, read_json_object(path))]
    return "\n".join(lines) + "\n"


def _state(name: str, record: Content) -> str:
    state = "killed" if record["state"] == "running" else record["state"]
    state += f", {record['red']} red" if record.get("red") else ""
    return f"| {name} | {record['measures']} | {state} | {record.get('seconds', '')} | {record['estimate']:.0f} |"


def _section(name: str, content: Content) -> Iterator[str]:
    yield f"## {name}: {content['measures']}"
    if "traceback" in content:
        yield from ("", "```", content["traceback"].rstrip(), "```")
    for field, table in TABLES.items():
        if content.get(field) is not None:
            yield from ("", *table(content))


def _checks(content: Content) -> Iterator[str]:
    yield f"| on {content['tokens']:,} rows | result | synchronizes |"
    yield "|---|---|---|"
    for record in content["checks"]:
        yield f"| {record['check']} | {record['wrong'] or 'right'} | {record['synchronizes'] or 'no'} |"


def _rows(content: Content) -> Iterator[str]:
    """Rows of steps, of kernels or of tile sizes."""
    rows, environment = content["rows"], content["environment"]
    if "tokens_per_second" in rows[0]:
        yield step_table(environment, rows)
        yield from _memory(rows)
    elif "tiles" in rows[0]:
        yield f"| {environment['device']}, commit {environment['commit']} | tiles | median ms | {spread_of(environment)} |"
        yield "|---|---|---|---|"
        yield from map(_tile, rows)
    else:
        names = {field.name for field in fields(Row)}
        found = [Row(**{key: value for key, value in row.items() if key in names}) for row in rows]
        yield from (summary(environment, found), "", case_tables(environment, found).rstrip())


def _memory(rows: list[Content]) -> Iterator[str]:
    """Peak memory against engine.layout's estimate, and the tokens of the micro-batches."""
    for row in rows:
        if row["peak_gb"] and row["estimated_gb"]:
            error = row["estimated_gb"] / row["peak_gb"] - 1
            yield (
                f"\n{row['implementation']}: {row['peak_gb']:.2f} GB at the peak, {row['estimated_gb']:.2f} estimated "
                f"({error:+.1%}), {row['reserved_gb']:.2f} reserved, up to {row['token_budget']:,} rows a micro-batch."
            )


def _tile(row: Content) -> str:
    case = f"| {row['case']}, {row['kernel']} | {row['tiles']} |"
    if row["problem"]:
        return f"{case} {row['problem']} | |"
    return f"{case} {row['median_ms']:.4f} | {row['low_ms']:.4f} to {row['high_ms']:.4f} |"


def _synchronizes(content: Content) -> Iterator[str]:
    yield f"In a step of the loop, with synchronization forbidden, there synchronizes: {content['synchronizes']}."


def _kernels(content: Content) -> Iterator[str]:
    busy = "unknown" if content["busy"] is None else f"{content['busy']:.1%}"
    idle = "unknown" if content["idle"] is None else f"{content['idle']:.1%}"
    yield f"{content['seconds']:.3f} s, busy {busy}, idle {idle}, {content['launches']:,} launches; {content['trace']}"
    yield from ("", "| kernel | ms | calls |", "|---|---|---|")
    for kernel in content["kernels"]:
        yield f"| `{kernel['name'][:100].replace('|', '/')}` | {kernel['ms']:.2f} | {kernel['calls']:,} |"


def _tests(content: Content) -> Iterator[str]:
    yield f"{'Passed' if content['passed'] else 'Failed'}: {content['summary']}"
    if "log" in content:
        yield from ("", "```", content["log"].rstrip(), "```")


TABLES: dict[str, Callable[[Content], Iterator[str]]] = {
    "checks": _checks,
    "rows": _rows,
    "synchronizes": _synchronizes,
    "kernels": _kernels,
    "passed": _tests,
}
"""Field of a section's file -> the lines for it."""
