"""Exports a trained model, with all its stages, as one folder that other programs load:

python -m pite.export --model runs/pite-7b/stage3/final --output FOLDER [--format full|peft]

full  a Hugging Face Llama for transformers and vLLM: the updates of all stages are added to the language model in
      float32 and rounded once; PiTe's adapter and heads are in pite.safetensors
peft  one float32 LoRA adapter for the original language model, which is not rounded
Both load with `python -m pite.chat --model FOLDER`, and contain a model card, README.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pite.export import RECORD
from pite.export.card import Scores, model_card, read_scores

if TYPE_CHECKING:
    from pite.export.formats import TrainedModel

DTYPES = ("bfloat16", "float16", "float32")
_WRITTEN = (
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "generation_config.json"),
    *("adapter_model.safetensors", "adapter_config.json", "lineage.json"),
)
"""Files that not every format has: a push deletes those of an earlier export from the repository."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 2 after a one-sentence error."""
    arguments = _parser().parse_args(argv)
    try:
        scores = _check(arguments)
        _export(arguments, scores)
    except (ValueError, OSError) as error:
        print(f"pite.export: {error}", file=sys.stderr)
        return 2
    return 0


def _check(arguments: argparse.Namespace) -> list[Scores]:
    """Check the flags before a model is read, and return the scores. Raises ValueError."""
    if arguments.push is None and arguments.private:
        raise ValueError("--private applies to a repository: give --push OWNER/NAME too")
    if arguments.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.push, re.ASCII):
        raise ValueError(f"--push takes OWNER/NAME, a repository on the Hugging Face hub, not {arguments.push!r}")
    if arguments.format == "peft" and arguments.dtype is not None:
        raise ValueError("--dtype applies to --format full: an adapter stays in float32")
    output = arguments.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file: give a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).exists():
        raise ValueError(
            f"--output {output} is not empty and is not an earlier export: give another folder, or empty it"
        )
    if output.is_mount():
        raise ValueError(f"--output {output} is a mount point, which cannot be replaced: give a folder inside it")
    if (output / ".git").exists():
        raise ValueError(f"--output {output} is a clone, whose history would be lost: give another folder")
    if output.resolve() == Path(arguments.model).resolve():
        raise ValueError(f"--output {output} is the same folder as --model: give another folder")
    return [read_scores(path) for path in arguments.scores]


def _export(arguments: argparse.Namespace, scores: list[Scores]) -> None:
    # Imported here, because torch and transformers take seconds and checking the flags does not need them.
    import torch

    from dataloaders.files import directory_written_atomically
    from pite.export import formats

    trained = formats.TrainedModel.open(arguments.model)
    _check_push(arguments, trained)
    output, dtype = arguments.output.resolve(), arguments.dtype or "bfloat16"
    with directory_written_atomically(output) as unfinished:
        if arguments.format == "full":
            formats.write_full(trained, unfinished, getattr(torch, dtype))
        else:
            dtype = "float32"
            formats.write_peft(trained, unfinished)
        formats.write_record(trained, unfinished, arguments.format, dtype)
        card = model_card(
            arguments.push or output.name, arguments.format, dtype, trained.hub_base, trained.stages, scores
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{output}: {arguments.format}, {size / 1e9:.2f} GB")
    if arguments.push is not None:
        push(output, arguments.push, arguments.private)
        print(f"https://huggingface.co/{arguments.push}")


def _check_push(arguments: argparse.Namespace, trained: TrainedModel) -> None:
    if arguments.push is not None and arguments.format == "peft" and trained.hub_base is None:
        raise ValueError(
            f"--push of an adapter needs a language model that others can download, but the lineage names the local "
            f"{trained.language_model}: use --format full"
        )


def push(folder: Path, name: str, private: bool) -> None:
    """Upload an export to a repository on the hub, which is created if necessary. Raises ValueError."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="pite.export", delete_patterns=list(_WRITTEN)
        )
    except Exception as error:  # errors of the hub, and of the HTTP library that it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{folder} is complete, but was not pushed to {name}: {reason}; log in with `hf auth login`"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pite.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a stage's output, or a whole model")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="an earlier export is replaced")
    parser.add_argument("--format", choices=("full", "peft"), default="full", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the merged weights (default: bfloat16)")
    parser.add_argument(
        "--scores", type=Path, nargs="+", default=[], metavar="S.json", help="JSON files of scores for the model card"
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the folder to this repository on the Hugging Face hub"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private, if --push creates it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
