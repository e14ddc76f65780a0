"""The paper's results: Tables 3, 4 and 5 of "PiTe: Pixel-Temporal Alignment for Large Video-Language Model" (ECCV 2024).

Values are those of the paper's text (arXiv 2409.07239). None stands where the paper has none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column: its title, and the report and the number in it that belong there."""

    title: str
    report: str
    number: str


@dataclass(frozen=True)
class Row:
    """A published row: model, size of its language model, and a value for each column."""

    model: str
    size: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Table:
    number: int
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def _qa(title: str, report: str) -> tuple[Column, Column]:
    return Column(f"{title} accuracy", report, "accuracy"), Column(f"{title} score", report, "score")


_GROUNDING = (
    *(Column(f"R@{threshold}", "grounding", f"R1@{threshold}") for threshold in (0.3, 0.5, 0.7)),
    Column("mIoU", "grounding", "mIoU"),
)
_CAPTIONING = (
    Column("SODA_c", "dense_captioning", "soda_c"),
    Column("CIDEr", "dense_captioning", "CIDEr"),
    Column("METEOR", "dense_captioning", "METEOR"),
)

TABLE_3 = Table(
    3,
    "zero-shot question answering",
    (*_qa("MSVD-QA", "msvd_qa"), *_qa("MSRVTT-QA", "msrvtt_qa"), *_qa("ActivityNet-QA", "activitynet_qa")),
    (
        Row("FrozenBiLM", "1B", (32.2, None, 16.8, None, 24.7, None)),
        Row("LLaMA-Adapter", "7B", (54.9, 3.1, 43.8, 2.7, 34.2, 2.7)),
        Row("VideoChat", "7B", (56.3, 2.8, 45.0, 2.5, None, 2.2)),
        Row("Video-LLaMA", "7B", (51.6, 2.5, 29.6, 1.8, 12.4, 1.1)),
        Row("Video-ChatGPT", "7B", (64.9, 3.3, 49.3, 2.8, 35.2, 2.7)),
        Row("PG-Video-LLaVA", "7B", (64.1, 3.7, 51.6, 3.3, 39.9, 3.3)),
        Row("PiTe (paper)", "7B", (68.4, 3.9, 56.4, 3.5, 42.0, 3.3)),
        Row("PiTe (paper)", "13B", (71.6, 4.0, 57.7, 3.5, 42.2, 3.4)),
    ),
)

TABLE_4 = Table(
    4,
    "temporal video grounding and dense video captioning on ActivityNet",
    (*_GROUNDING, *_CAPTIONING),
    (
        Row("VideoChat", "7B", (8.8, 3.7, 1.5, 7.2, 0.9, 2.2, 0.9)),
        Row("Video-LLaMA", "7B", (6.9, 2.1, 0.8, 6.5, 1.9, 5.8, 1.9)),
        Row("Video-ChatGPT", "7B", (26.4, 13.6, 6.1, 18.9, 1.9, 5.8, 2.1)),
        Row("PiTe (paper)", "7B", (30.4, 17.8, 7.8, 22.0, 5.1, 21.7, 5.8)),
        Row("PiTe (paper)", "13B", (37.9, 23.7, 10.0, 26.0, 5.0, 26.5, 6.6)),
    ),
)

TABLE_5 = Table(
    5,
    "ablation of the three-stage training strategy",
    (*_qa("MSVD-QA", "msvd_qa"), *_GROUNDING, *_CAPTIONING),
    (
        Row("PiTe (paper)", "7B", (68.4, 3.9, 30.4, 17.8, 7.8, 22.0, 5.1, 21.7, 5.8)),
        Row("w/o initialize (paper)", "7B", (68.2, 3.9, 22.8, 10.5, 4.6, 17.1, 5.1, 21.7, 5.8)),
        Row("w/o trajectory (paper)", "7B", (68.1, 3.9, 23.9, 12.8, 5.7, 17.4, 5.0, 21.4, 5.8)),
    ),
)
