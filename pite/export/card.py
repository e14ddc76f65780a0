"""Writes the model card of an export: README.md with the Hugging Face hub's front matter."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataloaders.files import read_json_object
from pite.families import Name

_LOADING = {
    "full": """The language model alone, all stages merged:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({name})
```
""",
    "peft": """The language model alone, with the adapter of all stages:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
```
""",
}
_VIDEOS = """
```python
from pite.generate import Generator

generator = Generator.from_pretrained({name})
```

```shell
python -m pite.chat --model {quoted} --video video.mp4 --query "What happens in the video?"
```
"""
_PUBLISHED = """The published code takes this folder as well:

```shell
python video_chatgpt/chat.py --model-name {quoted} --projection_path {quoted}/mm_projector.bin --conv_mode pg-video-llava
```
"""
_ABOUT: dict[Name, str] = {
    "pite": "A PiTe video-language model (pixel-temporal alignment, ECCV 2024)",
    "pg-video-llava": "A PG-Video-LLaVA video-language model (arXiv 2311.13435)",
}
_NEEDED: dict[Name, str] = {
    "pite": """The code above takes text only. Video input needs PiTe's adapter, and trajectories need its head; both are in
`pite.safetensors`:
""",
    "pg-video-llava": """The code above takes text only. Video input needs the projector and the embeddings of a video's marks, which are in
`pite.safetensors`:
""",
}
_RECIPE = ("epochs", "global_batch", "learning_rate", "lora_rank", "lora_alpha")
_SETTINGS = ("dtype", "seed", "data", "left_out")
"""Settings in a lineage's `made_of` that the card shows; those of `_RECIPE` are in its "recipe"."""


@dataclass(frozen=True)
class Scores:
    """One file of scores: its name without the suffix, and rows of name and value."""

    title: str
    rows: tuple[tuple[str, str], ...]


def read_scores(path: Path) -> Scores:
    """Scores from a JSON object of numbers and strings, or of such objects. Raises ValueError with file and field."""
    rows: list[tuple[str, str]] = []
    for name, value in read_json_object(path).items():
        inner = {f"{name}, {key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
        for label, number in inner.items():
            if isinstance(number, bool) or not isinstance(number, int | float | str):
                raise ValueError(f"{path}: {label} is {number!r} where a number or a string is expected")
            rows.append((label, f"{number:.6g}" if isinstance(number, float) else str(number)))
    return Scores(path.stem, tuple(rows))


def model_card(
    name: str,
    kind: str,
    dtype: str,
    hub_base: str | None,
    stages: Sequence[Mapping[str, Any]],
    scores: Sequence[Scores],
    model_type: str = "llama",
    family: Name = "pite",
    published: bool = False,
) -> str:
    """The text of README.md.

    name      the name that loads the model: the repository's or the folder's
    kind      "full" or "peft"
    hub_base  Hugging Face name of the language model; None leaves it out
    stages    lineages in order, as `pite.lineage.history` returns them
    model_type  the language model's architecture, for the tags
    published   whether the family's published code loads the folder
    """
    parts = [
        _front_matter(kind, hub_base, model_type, family),
        f"# {name.rpartition('/')[2]}\n",
        f"{_ABOUT[family]}, trained with PiTe Engine. "
        + ("The weights of all stages are merged, in " if kind == "full" else "One LoRA holds all stages, in ")
        + f"{dtype}.\n",
        "## Loading\n",
        _LOADING[kind].format(name=json.dumps(name)),
        _NEEDED[family] + _VIDEOS.format(name=json.dumps(name), quoted=shlex.quote(name)),
        *([_PUBLISHED.format(quoted=shlex.quote(name))] if published else []),
        *_training(hub_base, stages),
        *_tables(scores),
    ]
    return "\n".join(parts)


def _front_matter(kind: str, hub_base: str | None, model_type: str, family: Name) -> str:
    lora = ("lora",) if family == "pite" or kind == "peft" else ()
    lines = [
        f"library_name: {'transformers' if kind == 'full' else 'peft'}",
        "pipeline_tag: video-text-to-text",
        *([f"base_model: {json.dumps(hub_base)}"] if hub_base else []),
        "tags:",
        *(f"- {tag}" for tag in (family, "video", *lora, model_type)),
        "# license: to be added; the language model's and the data's terms apply",
    ]
    return "\n".join(["---", *lines, "---", ""])


def _training(hub_base: str | None, stages: Sequence[Mapping[str, Any]]) -> list[str]:
    if not stages:
        return []
    made_of = [stage.get("made_of", {}) for stage in stages]
    checksum = made_of[0].get("model", {}).get("language_model")
    base = hub_base or "a language model that was given as a directory"
    rows = [["stage", *(str(stage["stage"]) for stage in stages)]]
    rows.append(["steps", *(str(stage.get("steps", "")) for stage in stages)])
    for setting in (*_RECIPE, *_SETTINGS):
        values = [_cell({**each, **each.get("recipe", {})}.get(setting)) for each in made_of]
        if any(values):
            rows.append([setting.replace("_", " "), *values])
    for file in sorted({file for stage in stages for file in stage.get("files", {})}):
        rows.append([f"SHA-256 of {file}", *(stage.get("files", {}).get(file, "")[:16] for stage in stages)])
    return [
        "## Training\n",
        f"Base: {base}" + (f", SHA-256 {checksum}" if checksum else "") + ".\n",
        _table(rows),
    ]


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {count}" for key, count in value.items())
    return "" if value is None else str(value)


def _tables(scores: Sequence[Scores]) -> list[str]:
    if not scores:
        return []
    return ["## Scores\n", *(_table([(each.title, "value"), *each.rows]) for each in scores)]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])
