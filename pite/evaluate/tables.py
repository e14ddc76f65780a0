"""The paper's tables with rows of our own, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pite.evaluate.paper import TABLE_3, TABLE_4, TABLE_5, Column, Table

Metrics = Mapping[str, Mapping[str, str | float]]
"""Numbers of one model by report, as in the file of --metrics."""


def tables_for(models: Mapping[str, Metrics]) -> list[Table]:
    """Tables 3 and 4, and 5 for several models."""
    return [TABLE_3, TABLE_4, *([TABLE_5] if len(models) > 1 else [])]


def markdown(models: Mapping[str, Metrics]) -> str:
    """The tables with a row for each model below the paper's. A dash stands for what was not measured."""
    return "\n\n".join(_markdown(table, models) for table in tables_for(models)) + "\n"


def as_json(models: Mapping[str, Metrics]) -> dict[str, Any]:
    """The same for programs: {"table 3": {"caption", "rows": [{"model", "size", COLUMN: value}]}}, and all metrics."""
    found: dict[str, Any] = {}
    for table in tables_for(models):
        titles = [column.title for column in table.columns]
        rows = [{"model": row.model, "size": row.size, **dict(zip(titles, row.values))} for row in table.rows]
        rows += [{"model": name, "size": None, **dict(zip(titles, _ours(table, of)))} for name, of in models.items()]
        found[f"table {table.number}"] = {"caption": table.caption, "rows": rows}
    return {
        **found,
        "metrics": {name: {report: dict(each) for report, each in of.items()} for name, of in models.items()},
    }


def _markdown(table: Table, models: Mapping[str, Metrics]) -> str:
    lines = [
        f"**Table {table.number}**: {table.caption}",
        "",
        _line(["model", "size", *(column.title for column in table.columns)]),
        _line(["---", "---", *("---:" for _ in table.columns)]),
    ]
    lines += [_line([row.model, row.size, *map(_one_decimal, row.values)]) for row in table.rows]
    lines += [_line([f"**{name}**", "", *map(_one_decimal, _ours(table, of))]) for name, of in models.items()]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _one_decimal(value: float | None) -> str:
    """A value with the paper's one decimal."""
    return "-" if value is None else f"{value:.1f}"


def _ours(table: Table, metrics: Metrics) -> list[float | None]:
    return [_value(column, metrics) for column in table.columns]


def _value(column: Column, metrics: Metrics) -> float | None:
    value = metrics.get(column.report, {}).get(column.number)
    return None if value is None else float(value)
