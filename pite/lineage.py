"""The record of how a model was made: `lineage.json` of a stage's output, and the stages in an export's `export.json`.

Nothing here imports torch: a command reads the record before it loads a model.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from dataloaders import paths
from dataloaders.decode.sampling import IN_MANIFEST, Sampling
from dataloaders.files import read_json_object, require_file, sha256
from pite.export import RECORD

log = logging.getLogger(__name__)

LINEAGE, HEADS_FILE, ADAPTER_FILE = "lineage.json", "pite.safetensors", "adapter_model.safetensors"


def check_model_flag(flag: str, path_or_name: Path | str | None) -> None:
    """Raise ValueError unless it is a folder or can be a name on Hugging Face's hub; None is accepted.

    For a run's folder or a stage's, which hold no model themselves, the message names the last finished stage in it.
    """
    paths.model(flag, path_or_name)
    if path_or_name is None:
        return
    folder = Path(path_or_name).expanduser()
    if (folder / "config.json").exists():
        return
    found = [each for pattern in ("final", "stage*/final") for each in sorted(folder.glob(pattern))]
    if finished := [each for each in found if (each / LINEAGE).exists()]:
        raise ValueError(
            f"{flag} {folder} is the folder of a training run: give its last finished stage, {finished[-1]}"
        )
    if any(folder.glob("stage[123]")) or (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{flag} {folder} is the folder of a training run without a finished stage: train it to its end"
        )


def read_lineage(directory: Path) -> dict[str, Any]:
    """The lineage of a stage directory, with absolute paths. Checks every file against its checksum."""
    directory = directory.resolve()
    lineage = _parse_lineage(directory)
    _check_whole(directory, lineage)
    for file, checksum in lineage["files"].items():
        check(directory / file, checksum)
    local = (directory.parent / lineage["language_model"]).resolve()
    if local.is_dir():
        lineage["language_model"] = str(local)
    for entry in lineage["merged"]:
        entry["path"] = str((directory.parent / entry["path"]).resolve())
        check(Path(entry["path"]) / ADAPTER_FILE, entry["sha256"])
    return lineage


def history(directory: Path) -> list[dict[str, Any]]:
    """The record of each training stage that a directory contains, in order; empty for the published layout.

    Each record has at least its number, "stage", and the checksums of its "files". Raises ValueError if an earlier
    stage is missing.
    """
    if (directory / RECORD).exists():
        return list(read_json_object(directory / RECORD).get("stages", ()))
    if not (directory / LINEAGE).exists():
        return []
    directory = directory.resolve()
    lineage = _parse_lineage(directory)
    _check_whole(directory, lineage)
    return [*(_parse_lineage(directory.parent / entry["path"]) for entry in lineage["merged"]), lineage]


def stages(directory: Path) -> tuple[int, ...]:
    """Numbers of the training stages that a directory contains, in order; empty for the published layout."""
    return tuple(lineage["stage"] for lineage in history(directory))


def encoder_of(directory: Path) -> str | None:
    """The encoder of the features that a model was trained on, from its last stage; None if there is no record.

    A SHA-256 checksum, or for imported features the name that `dataloaders.store import --encoder` was given.
    """
    for record in reversed(history(directory)):
        made_of = record.get("made_of") or {}
        for part in ("model", "features"):  # earlier versions recorded the manifest of the features
            found = made_of.get(part)
            if isinstance(found, dict) and isinstance(encoder := found.get("encoder"), str):
                return encoder
    return None


def sampling_of(directory: Path) -> Sampling:
    """The rule by which the frames of a model's training videos were chosen, from its last stage; index without a record.

    An imported store may name a rule that is not one of ours: then the published one is used, with a warning.
    """
    for record in reversed(history(directory)):
        features = (record.get("made_of") or {}).get("features")
        name = features.get("sampling") if isinstance(features, dict) else None
        if name in (None, "still"):  # no record, or stage 1's images
            continue
        rule = next((rule for rule, known in IN_MANIFEST.items() if known == name), None)
        if rule is None:
            log.warning(
                "%s was trained on frames sampled by a rule named %r, which is unknown here: frames are sampled by index",
                *(directory, name),
            )
        return rule or "index"
    return "index"


def check_encoder(model: Path, encoder: str, source: str, remedy: str) -> None:
    """Raise ValueError if `encoder` is another one than the model was trained with.

    encoder  checksum, or a name for imported features
    source   what has it, the subject of the message: a CLIP or a feature store
    remedy   the end of the message
    A recorded name cannot be compared with a checksum, so a difference is logged as a warning.
    """
    recorded = encoder_of(model)
    if recorded is None or recorded == encoder:
        return
    if not re.fullmatch(r"[0-9a-f]{64}", recorded):
        log.warning(
            "%s was trained on imported features of %r: whether they equal those of %s cannot be verified",
            *(model, recorded, source),
        )
        return
    raise ValueError(
        f"{source} has the encoder {_short(encoder)}, but {model} was trained on features of the encoder "
        f"{_short(recorded)}: {remedy}"
    )


def _short(encoder: str) -> str:
    return f"{encoder[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", encoder) else repr(encoder)


def _check_whole(directory: Path, lineage: dict[str, Any]) -> None:
    """Raise ValueError if a stage's directory was copied without the earlier stages that it builds on."""
    earlier = [os.path.normpath(directory.parent / entry["path"]) for entry in lineage["merged"]]
    missing = [path for path in earlier if not (Path(path) / ADAPTER_FILE).exists()]
    if missing:
        raise ValueError(
            f"{directory} is one stage of a model and builds on earlier ones: {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; copy the whole run folder, or in the original one run "
            f"`python -m pite.export --model RUN/stage{lineage['stage']}/final --output FOLDER` and copy FOLDER"
        )


def check_language_model(directory: Path, name: str) -> None:
    """Raise ValueError if a stage's language model, as `read_lineage` returns it, is a path that does not exist."""
    is_path = name.startswith(".") or name.count("/") != 1
    if is_path and not (Path(name).is_absolute() and Path(name).is_dir()):
        raise ValueError(
            f"{directory} builds on the language model {os.path.normpath(directory.parent / name)}, which is missing: "
            "copy it there, or in the original run folder run `python -m pite.export` with --format full"
        )


def _parse_lineage(directory: Path) -> dict[str, Any]:
    lineage = read_json_object(directory / LINEAGE)
    kinds = {"stage": int, "language_model": str, "merged": list, "files": dict}
    entries = lineage.get("merged")
    if not all(isinstance(lineage.get(name), kind) for name, kind in kinds.items()) or not all(
        isinstance(entry, dict) and isinstance(entry.get("path"), str) and "sha256" in entry for entry in entries or ()
    ):
        raise ValueError(
            f"{directory / LINEAGE} is damaged: it must give a stage, a language_model, the merged adapters with "
            "their path and sha256, and files"
        )
    return lineage


def check(file: Path, checksum: str) -> None:
    if not file.exists():
        raise ValueError(f"{file} is missing, though the lineage names it")
    require_file(file)
    if sha256(file) != checksum:
        raise ValueError(
            f"{file} was altered since the lineage was written: its SHA-256 is no longer {str(checksum)[:12]}..."
        )
