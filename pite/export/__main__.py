"""Exports a trained model as one folder: `python -m pite.export --model runs/pite-7b/stage3/final --output FOLDER`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dataloaders import logs, paths
from dataloaders.cli import parse, run
from dataloaders.errors import reason
from dataloaders.files import directory_written_atomically
from dataloaders.logs import LogFlags
from pite.export import RECORD
from pite.export.card import Scores, model_card, read_scores
from pite.lineage import check_model_flag

if TYPE_CHECKING:
    from pite.export.formats import TrainedModel

_WRITTEN = (
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "generation_config.json"),
    *("adapter_model.safetensors", "adapter_config.json", "lineage.json", "mm_projector.bin"),
)
"""Files that not every format has: a push deletes those of an earlier export from the repository."""


@dataclass(frozen=True, kw_only=True)
class ExportFlags(LogFlags):
    """Export a trained model, with all its stages, as one folder that other programs load.

    full  a Hugging Face model for transformers and vLLM: the updates of all stages are added to the language model in
          float32 and rounded once; PiTe's adapter and heads are in pite.safetensors, and PG-Video-LLaVA's projector in
          mm_projector.bin too, as its published code reads it
    peft  one float32 LoRA adapter for the original language model, which is not rounded
    Both load with `python -m pite.chat --model FOLDER`, and contain a model card, README.md.
    """

    model: str
    """a stage's output, or a whole model"""
    output: Path
    """folder to write; an earlier export is replaced"""
    format: Literal["full", "peft"] = "full"
    """what to write, see above"""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """dtype of the merged weights; bfloat16 unless given"""
    scores: tuple[Path, ...] = ()
    """JSON files of scores for the model card"""
    push: str | None = None
    """upload the folder to this repository on the Hugging Face hub, OWNER/NAME"""
    private: bool = False
    """make the repository private, if --push creates it"""

    def __post_init__(self) -> None:
        if self.push is None and self.private:
            raise ValueError("--private applies to a repository: give --push OWNER/NAME too")
        if self.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push, re.ASCII):
            raise ValueError(f"--push takes OWNER/NAME, a repository on the Hugging Face hub, not {self.push!r}")
        if self.format == "peft" and self.dtype is not None:
            raise ValueError("--dtype applies to --format full: an adapter stays in float32")

    def check_paths(self) -> None:
        """Raise ValueError for a model or scores that do not exist, and an output that must not be replaced."""
        output = self.output
        paths.output_folder("--output", output)
        if output.is_dir() and any(output.iterdir()) and not (output / RECORD).exists():
            raise ValueError(
                f"--output {output} is not empty and is not an earlier export: give another folder, or empty it"
            )
        if output.is_mount():
            raise ValueError(f"--output {output} is a mount point, which cannot be replaced: give a folder inside it")
        if (output / ".git").exists():
            raise ValueError(f"--output {output} is a clone, whose history would be lost: give another folder")
        if output.resolve() == Path(self.model).resolve():
            raise ValueError(f"--output {output} is the same folder as --model: give another folder")
        check_model_flag("--model", self.model)
        for path in self.scores:
            paths.input_file("--scores", path)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a one-sentence error, 2 for a wrong flag."""
    flags = parse(ExportFlags, argv, prog="python -m pite.export")
    logs.configure(flags.log_level)
    return run("pite.export", lambda: _export(flags))


def _export(flags: ExportFlags) -> None:
    flags.check_paths()
    scores = [read_scores(path) for path in flags.scores]
    # Imported after the flags and paths are checked: it takes seconds.
    from pite.export.formats import TrainedModel

    trained = TrainedModel.open(flags.model)
    if flags.push is not None and flags.format == "peft" and trained.hub_base is None:
        raise ValueError(
            f"--push of an adapter needs a language model that others can download, but the lineage names the local "
            f"{trained.language_model}: use --format full"
        )
    output = flags.output.resolve()
    dtype = "float32" if flags.format == "peft" else flags.dtype or "bfloat16"
    try:
        with directory_written_atomically(output) as unfinished:
            _write(flags, trained, unfinished, dtype, scores)
    except OSError as error:  # a full disk, for which each library that writes a file has a message of its own
        raise ValueError(f"--output {flags.output} cannot be written: {reason(error)}") from None
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: {flags.format}, {size / 1e9:.2f} GB")
    if flags.push is not None:
        push(output, flags.push, flags.private)
        print(f"https://huggingface.co/{flags.push}")


def _write(flags: ExportFlags, trained: TrainedModel, directory: Path, dtype: str, scores: Sequence[Scores]) -> None:
    """Write all files of an export into an empty directory."""
    import torch

    from pite.export import formats

    if flags.format == "full":
        formats.write_full(trained, directory, getattr(torch, dtype))
    else:
        formats.write_peft(trained, directory)
    formats.write_record(trained, directory, flags.format, dtype)
    name = flags.push or flags.output.resolve().name
    tag, family = trained.config.llm.model_type, trained.config.family
    published = flags.format == "full" and formats.published_code_loads(directory)
    card = model_card(name, flags.format, dtype, trained.hub_base, trained.stages, scores, tag, family, published)
    (directory / "README.md").write_text(card, encoding="utf-8")


def push(folder: Path, name: str, private: bool) -> None:
    """Upload an export to a repository on the hub, which is created if necessary. Raises ValueError."""
    from huggingface_hub import HfApi

    from pite.hub import why_not

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="pite.export", delete_patterns=list(_WRITTEN)
        )
    except Exception as error:  # errors of the hub, and of the HTTP library that it uses
        raise ValueError(
            f"{folder} is complete, but was not pushed to {name} on the Hugging Face hub: {why_not(error)}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
