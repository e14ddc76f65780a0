"""The result file of `bench.encode`: written after each row, so that results survive the loss of the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dataloaders.decode.dali.sessions import ENGINES, engines

FRAMES_PER_VIDEO, VIDEOS, NUM_FRAMES = 1560, 143_640, 100
"""PiTe-143k: frames of a mean video of 52 s at 30 per second, number of videos, frames that are encoded of each."""

SATURATED = 1.1
"""More sessions that raise the rate by less than this factor show that the engines are busy."""

PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s of the data sheets."""

OURS = "pite"


@dataclass(frozen=True)
class Row:
    """Rates of one implementation: median, slowest and fastest round; or `problem`, the reason for no numbers.

    sessions           files that are decoded at once
    frames_per_second  counts all frames of the files, not only those that are kept
    agreement          how its frames compare with PyAV's, checked before it is timed
    """

    case: str
    implementation: str
    sessions: int | None = None
    frames_per_second: float | None = None
    slow: float | None = None
    fast: float | None = None
    agreement: str | None = None
    mfu: float | None = None
    problem: str | None = None


@dataclass
class Results:
    """Rows by part. Parts that are measured again replace their rows; the others are kept."""

    path: Path
    content: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, environment: Mapping[str, str]) -> Results:
        """The results of earlier parts on this device, if there are any, with a new environment."""
        content = json.loads(path.read_text()) if path.exists() else {}
        before = content.get("environment", {}).get("device", "")
        if (
            before.partition(",")[0] != environment["device"].partition(",")[0]
        ):  # A CPU has its number of threads there.
            content = {}
        parts: dict[str, Any] = {"nvdec": [], "decode": [], "clip": [], "encode": [], "projection": None}
        return Results(path, {**parts, **content, "environment": dict(environment)})

    def begin(self, part: str) -> None:
        """Forget the rows of a part."""
        self.content[part] = []

    def add(self, part: str, row: Row) -> None:
        """Add a row, print it, and save everything."""
        self.content[part].append(asdict(row))
        self.content["projection"] = projection(self.content)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        print(_line(asdict(row)), flush=True)


def saturated(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The rate at which more sessions do not help, of the rows of one case; None where it was not reached."""
    rates = [r["frames_per_second"] for r in sorted(rows, key=lambda r: r["sessions"] or 0) if r["frames_per_second"]]
    return max(rates) if len(rates) > 1 and max(rates) < SATURATED * rates[-2] else None


def projection(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Hours of PiTe-143k on eight GPUs of this kind, and on eight A100s where this device's engines are saturated.

    Assumes that decoding and CLIP overlap, that CLIP reaches the same share of the peak, and an NVDEC engine the same rate.
    None for an unknown GPU, or where decoding on the GPU or CLIP was not measured.
    """
    name = content["environment"]["device"]
    here = next((known for known in PEAKS if known in name), None)
    clip = next((r["frames_per_second"] for r in content["clip"] if r["implementation"] == OURS), None)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in content["decode"]:
        if row["sessions"] and row["frames_per_second"]:
            groups.setdefault((row["implementation"], row["case"]), []).append(row)
    if here is None or not clip or not groups:
        return None
    mixed = {key: rows for key, rows in groups.items() if key[1] == "mixed"} or groups
    best = max(mixed, key=lambda key: max(r["frames_per_second"] for r in mixed[key]))
    rate = max(r["frames_per_second"] for r in mixed[best])
    found = {"decoder": best[0], "files": best[1], here: _hours(clip / NUM_FRAMES, rate / FRAMES_PER_VIDEO)}
    full = saturated(mixed[best])
    if full is not None and here != "A100":
        scaled = full * ENGINES["A100"] / engines(name)
        found["A100"] = _hours(clip / NUM_FRAMES * PEAKS["A100"] / PEAKS[here], scaled / FRAMES_PER_VIDEO)
    return found


def _hours(clip: float, decoding: float) -> dict[str, float]:
    """Hours on eight GPUs, given videos/s of one."""
    hours = {"clip": VIDEOS / (8 * clip) / 3600, "decode": VIDEOS / (8 * decoding) / 3600}
    return hours | {"hours": max(hours.values())}


def table(content: Mapping[str, Any]) -> str:
    """A result file as Markdown."""
    lines = [f"| encoding, {content['environment']['device']} | frames/s | |", "|---|---|---|"]
    for part in ("nvdec", "decode", "clip", "encode"):
        lines += map(_line, content[part])
    found = content["projection"] or {}
    for name, hours in found.items():
        if isinstance(hours, dict):
            lines.append(
                f"| PiTe-143k on 8 {name}, projected from {found['decoder']} on {found['files']} files | {hours['hours']:.2f} h:"
                f" CLIP {hours['clip']:.2f} h, decoding {hours['decode']:.2f} h | |"
            )
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    sessions = f", {row['sessions']} sessions" if row["sessions"] else ""
    name = f"{row['case']}: {row['implementation']}{sessions}"
    if row["problem"] is not None:
        return f"| {name} | {row['problem']} | |"
    if row["frames_per_second"] is None:
        return f"| {name} | {row['agreement'] or ''} | |"
    rate, slow, fast = (None if row[k] is None else _three(row[k]) for k in ("frames_per_second", "slow", "fast"))
    notes = [row["agreement"] or "", "" if row["mfu"] is None else f"{row['mfu']:.0%} of the peak"]
    return f"| {name} | {rate}{'' if slow is None else f' ({slow} to {fast})'} | {', '.join(filter(None, notes))} |"


def _three(value: float) -> str:
    """Three significant digits; all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
