"""`python -m bench.report PATH...`: results folders of `bench.gpu`, and result files, as Markdown and one PNG.

If our results fail the correctness check, the case shows the problem and no speed-up. `--output bench/results/report`
writes the committed tables; `--readme README.md` rewrites the table of costs in that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.costs import cost_table
from bench.encode.results import table as encoding_table
from bench.gpu.report import is_session, session_report
from bench.gpu.results import SESSION
from bench.kernels.cases import OURS
from bench.kernels.rows import Row
from bench.tables import cases_of, markdown, step_table, summary

BEGIN, END = "<!-- costs: python -m bench.report --readme README.md -->", "<!-- table: end -->"
RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> tuple[Mapping[str, str], list[Row]]:
    """The environment and rows of a file of kernel benchmarks. Raises ValueError for another file."""
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
    raise ValueError(f"{path}: has neither rows of kernels nor benchmarks of pytest-benchmark")


def of_load(path: Path) -> bool:
    """Whether a result file is one of `bench.load`, whose table is in docs/install.md."""
    content = json.loads(path.read_text())
    return isinstance(content, dict) and any("share" in row and "policy" in row for row in content.get("rows", ()))


def of_annotation(path: Path) -> bool:
    """Whether a result file is that of `bench.annotation`, whose figures are in docs/data.md."""
    content = json.loads(path.read_text())
    return isinstance(content, dict) and "annotation" in content


def of_machine_code(path: Path) -> bool:
    """Whether a result file is that of `bench.machine_code`, which writes its own table."""
    content = json.loads(path.read_text())
    return isinstance(content, dict) and any("registers" in row for row in content.get("rows", ()))


def _environment(info: Mapping[str, Any]) -> Mapping[str, str]:
    known = ("device", "commit", "python", "torch", "triton")
    return {**{k: v for k, v in info.items() if k in known}, "spread": "quartiles"}


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
    parser.add_argument("files", nargs="*", type=Path, help="result files and folders; default: all in bench/results")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.png instead of printing")
    parser.add_argument("--readme", type=Path, help="rewrite the table of costs in this file instead of printing")
    options = parser.parse_args(arguments)
    if options.readme is not None:
        options.readme.write_text(fill(options.readme.read_text(), cost_table(RESULTS)))
        return 0
    paths = options.files or sorted([*RESULTS.glob("*.json"), *(file.parent for file in RESULTS.glob(f"*/{SESSION}"))])
    if not paths:
        parser.error("no result files: run python -m bench.gpu, or pytest bench --benchmark-json=FILE")
    files = [path for path in paths if not is_session(path)]
    for path in files:
        if path.is_dir():
            parser.error(f"{path} has no {SESSION}: its session ended before it measured anything")
    try:
        sessions = [session_report(path) for path in paths if is_session(path)]
        steps = [found for path in files if (found := read_steps(path))]
        encodings = [content for path in files if (content := encoding(path))]
        others = (read_steps, encoding, of_load, of_annotation, of_machine_code)
        files = [path for path in files if not any(other(path) for other in others)]
        results = [read(path) for path in files]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    step_tables = [step_table(*found) for found in steps] + [encoding_table(content) for content in encodings]
    summaries = [*(summary(*result) for result in results), *step_tables]
    tables = [*(f"{table}\n" for table in summaries), *(markdown(*result) for result in results)]
    text = "\n".join([*sessions, *tables])
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
