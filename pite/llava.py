"""LLaVA-1.5 and the published PG-Video-LLaVA on disk, as the model reads and writes them.

    config.json         LLaVA's, whose model_type is llava or llava_llama, or the published VideoChatGPT's
    weights             a Llama's names, and model.mm_projector.{0,2}.{weight,bias}; LLaVA's own vision tower is not read
    mm_projector.bin    what the published training saves: the projector, and the whole embedding table. It may be in the
                        folder of the language model that it was trained on, and then replaces both

The published training adds three tokens at the end of the vocabulary. Their embeddings and rows of the vocabulary head start
as the mean of the others; only the embeddings of two of them are trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataloaders.files import read_json_object
from pite.families import ADDED_TOKENS, PG_VIDEO_LLAVA, family

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPES = ("llava", "llava_llama", "VideoChatGPT")
PROJECTOR_FILE = "mm_projector.bin"
EDGES, EMBEDDINGS, HEAD = "model.vid_edges", "model.embed_tokens.weight", "lm_head.weight"
_NOT_READ = ("model.vision_tower.", "model.image_newline")


def own_numbers(
    directory: Path, values: dict[str, Any], saved: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """The fields of `PiTeConfig` for a config.json that may be LLaVA's; corrects the vocabulary in `values`.

    values  the language model's, saved: our own fields in the file, given: fields to use in their place
    Raises ValueError for another projector than the family's.
    """
    extended, own = bool(values.pop("mm_use_vid_start_end", False)) or "num_places" in saved, {**saved, **given}
    if extended or (directory / PROJECTOR_FILE).exists():
        own = {"family": PG_VIDEO_LLAVA.name, **own}
    if not family(own.get("family", "pite")).marks:
        return own
    projector = values.get("mm_projector_type", PG_VIDEO_LLAVA.projector)
    if projector != PG_VIDEO_LLAVA.projector:
        raise ValueError(
            f"{directory / 'config.json'}: mm_projector_type is {projector!r}, and only {PG_VIDEO_LLAVA.projector} is "
            "supported: give LLaVA-1.5"
        )
    if not extended:
        values["vocab_size"] = values.get("vocab_size", 32000) + ADDED_TOKENS
    defaults = {"num_places": 576, "vision_feature_size": values.get("mm_hidden_size", 1024)}
    return {**defaults, **own}


def is_trained(directory: Path) -> bool:
    """Whether a folder holds a published PG-Video-LLaVA, or one that was saved whole."""
    values = read_json_object(directory / "config.json") if (directory / "config.json").exists() else {}
    return bool(values.get("mm_use_vid_start_end")) or "num_places" in values or (directory / PROJECTOR_FILE).exists()


class VideoTokenWeights(Mapping[str, "Tensor"]):
    """The weights of a language model with `rows` rows of the vocabulary, three of them for videos.

    weights  of a LLaVA, a published PG-Video-LLaVA or a plain language model, by name; their tables have all rows, or all but
             the three
    A projector file in `directory` replaces tensors of `weights`.
    """

    def __init__(self, directory: Path, weights: Mapping[str, Tensor], rows: int) -> None:
        self._weights, self._rows = weights, rows
        self._file = read_projector(directory / PROJECTOR_FILE) if (directory / PROJECTOR_FILE).exists() else {}
        names = [name for name in weights if not name.startswith(_NOT_READ)]
        self._names = list(dict.fromkeys([*names, *self._file, EDGES]))

    def __getitem__(self, name: str) -> Tensor:
        if name == EDGES:
            return self[EMBEDDINGS][-2:]
        tensor = self._file[name] if name in self._file else self._weights[name]
        if name in (EMBEDDINGS, HEAD) and tensor.ndim == 2 and len(tensor) == self._rows - ADDED_TOKENS:
            return _extended(tensor)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _extended(table: Tensor) -> Tensor:
    """The table (V, d) with three rows more, each the mean of the others."""
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    extended = table.new_empty(len(table) + ADDED_TOKENS, table.shape[1])
    extended[: len(table)], extended[len(table) :] = table, mean
    return extended


def read_projector(file: Path) -> dict[str, Tensor]:
    """The tensors of a published mm_projector.bin by their names in the model. Raises ValueError for another file."""
    from pite.hub import torch_file

    found = {name[name.rindex("model.") :]: read() for name, read in torch_file(file).items() if "model." in name}
    tensors = {name: tensor for name, tensor in found.items() if "mm_projector" in name or name == EMBEDDINGS}
    if "model.mm_projector.0.weight" not in tensors:
        raise ValueError(f"{file} holds no model.mm_projector.0.weight: it is not a published projector")
    return tensors


def write_projector(file: Path, modules: Mapping[str, Tensor], embeddings: Tensor) -> None:
    """Write the projector and the whole embedding table as the published training does.

    modules     the family's own tensors by name; embeddings: (V, d), whose last two rows are replaced by the trained ones
    """
    import torch

    table = embeddings.detach().cpu().clone()
    table[-2:] = modules[EDGES].to(table)
    projector = {name: tensor.detach().cpu() for name, tensor in modules.items() if name != EDGES}
    torch.save({**projector, EMBEDDINGS: table}, file)
