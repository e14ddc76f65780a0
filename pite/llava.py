"""LLaVA-1.5 and the published PG-Video-LLaVA on disk, as the model reads and writes them.

    config.json         LLaVA's (model_type llava or llava_llama), transformers' LLaVA (llava, with a text_config), or the
                        published VideoChatGPT's
    weights             a Llama's names, and model.mm_projector.{0,2}.{weight,bias}; or transformers' names, with language_model
                        and multi_modal_projector. A vision tower is not read
    mm_projector.bin    what the published training saves: the projector, and the whole embedding table. It may be in the
                        folder of the language model that it was trained on, and then replaces both. LLaVA-1.5's folder has a
                        file of this name with the projector alone, which repeats its weights and is not read

The published training adds three tokens at the end of the vocabulary. Their embeddings and rows of the vocabulary head start
as the mean of the others; only the embeddings of two of them are trained.
"""

from __future__ import annotations

import re
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
_NOT_READ = ("model.vision_tower.", "vision_tower.", "model.image_newline")
_IMAGE_TOKEN = 32000
"""The default of `image_token_index` in transformers' LlavaConfig."""

_REQUIRED: dict[str, Any] = {
    "mm_projector_type": PG_VIDEO_LLAVA.projector,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
}
"""What the family computes, by its names in LLaVA's config.json."""


def own_numbers(
    directory: Path, values: dict[str, Any], saved: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """The fields of `PiTeConfig` for a config.json that may be LLaVA's; corrects the vocabulary in `values`.

    values  the language model's; transformers' LLaVA becomes LLaVA's own
    saved   our own fields in the file, given: fields to use in their place
    Raises ValueError for a projector or features other than the family's.
    """
    if "text_config" in values:
        _flatten(directory / "config.json", values)
    extended, own = bool(values.pop("mm_use_vid_start_end", False)) or "num_places" in saved, {**saved, **given}
    if extended or trained_projector(directory) is not None:
        own = {"family": PG_VIDEO_LLAVA.name, **own}
    if not family(own.get("family", "pite")).marks:
        return own
    for name, required in _REQUIRED.items():
        if (value := values.get(name, required)) != required:
            raise ValueError(
                f"{directory / 'config.json'}: {name} is {value!r}, and only {required} is supported: give LLaVA-1.5"
            )
    if not extended:
        values["vocab_size"] = values.get("vocab_size", 32000) + ADDED_TOKENS
    defaults = {"num_places": 576, "vision_feature_size": values.get("mm_hidden_size", 1024)}
    return {**defaults, **own}


def _flatten(path: Path, values: dict[str, Any]) -> None:
    """Turn the settings of transformers' LLaVA into LLaVA's own, in place.

    Its vocabulary ends with a token for pictures, one for padding and rows without a token; those before them are the
    language model's.
    """
    text, vision = (
        {**values[name]} if isinstance(values.get(name), dict) else {} for name in ("text_config", "vision_config")
    )
    if (kind := text.pop("model_type", "llama")) != "llama":
        raise ValueError(f"{path}: the language model is {kind!r}, and only Llama is supported: give LLaVA-1.5")
    activation = {"gelu": PG_VIDEO_LLAVA.projector}
    text |= {
        "mm_projector_type": activation.get(act := values.get("projector_hidden_act", "gelu"), f"mlp2x_{act}"),
        "mm_vision_select_layer": values.get("vision_feature_layer", -2),
        "mm_hidden_size": vision.get("hidden_size", 1024),
        "vocab_size": min(text.get("vocab_size", _IMAGE_TOKEN), values.get("image_token_index", _IMAGE_TOKEN)),
        "pad_token_id": None,
    }
    values.clear()
    values.update(text)


def published_settings(settings: Mapping[str, Any], feature_size: int) -> dict[str, Any]:
    """The fields of config.json with which the published code builds the projector and finds its CLIP.

    settings  those of the language model, which may name the CLIP
    """
    clip = settings.get("mm_vision_tower") or PG_VIDEO_LLAVA.clip
    return {**_REQUIRED, "mm_hidden_size": feature_size, "mm_vision_tower": clip, "use_mm_proj": True}


def is_trained(directory: Path) -> bool:
    """Whether a folder holds a published PG-Video-LLaVA, or one that was saved whole."""
    values = read_json_object(directory / "config.json") if (directory / "config.json").exists() else {}
    extended = bool(values.get("mm_use_vid_start_end")) or "num_places" in values
    return extended or trained_projector(directory) is not None


def trained_projector(directory: Path) -> Path | None:
    """The projector file of a published PG-Video-LLaVA in a folder; None without one, and for LLaVA-1.5's own.

    Raises ValueError for a file that cannot be read.
    """
    from pite.hub import torch_file

    file = directory / PROJECTOR_FILE
    return file if file.exists() and any(name.endswith(EMBEDDINGS) for name in torch_file(file)) else None


def weight_files(directory: Path) -> list[Path]:
    """As `pite.hub.weight_files`, and a trained projector file at the end."""
    from pite import hub

    projector = trained_projector(directory)
    return [*hub.weight_files(directory), *([] if projector is None else [projector])]


class VideoTokenWeights(Mapping[str, "Tensor"]):
    """The weights of a language model with `rows` rows of the vocabulary, three of them for videos, under LLaVA's names.

    weights  of a LLaVA, a published PG-Video-LLaVA or a plain language model, by name; their tables have all rows, or all but
             the three, or for transformers' LLaVA more of its own, which are left out
    A trained projector file in `directory` replaces tensors of `weights`.
    """

    def __init__(self, directory: Path, weights: Mapping[str, Tensor], rows: int) -> None:
        self._weights, self._rows = weights, rows
        file = trained_projector(directory)
        self._file = {} if file is None else read_projector(file)
        self._sources = {_name(name): name for name in weights}
        self._is_hub = any(name != source for name, source in self._sources.items())
        names = [name for name in self._sources if not name.startswith(_NOT_READ)]
        self._names = list(dict.fromkeys([*names, *self._file, EDGES]))

    def __getitem__(self, name: str) -> Tensor:
        if name == EDGES:
            return self[EMBEDDINGS][-2:]
        if name in self._file:
            return self._file[name]
        tensor, words = self._weights[self._sources[name]], self._rows - ADDED_TOKENS
        if name in (EMBEDDINGS, HEAD) and tensor.ndim == 2 and (self._is_hub or len(tensor) == words):
            return _extended(tensor[:words])
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _name(name: str) -> str:
    """LLaVA's name of a tensor that may have transformers' name, as saved or as in its model."""
    name = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    found = re.fullmatch(r"(?:model\.)?multi_modal_projector\.linear_([12])\.(weight|bias)", name)
    return f"model.mm_projector.{2 * (int(found[1]) - 1)}.{found[2]}" if found else name


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


def with_edges(table: Tensor, modules: Mapping[str, Tensor]) -> Tensor:
    """The embedding table (V, d), in a copy whose last two rows are the trained ones of `modules`; as it is without them."""
    if EDGES not in modules:
        return table
    table = table.detach().clone()
    table[-2:] = modules[EDGES].to(table)
    return table


def write_projector(file: Path, modules: Mapping[str, Tensor], embeddings: Tensor) -> None:
    """Write the projector and the whole embedding table as the published training does.

    modules     the family's own tensors by name; embeddings: (V, d), whose last two rows are replaced by the trained ones
    """
    import torch

    tensors = {name: tensor for name, tensor in modules.items() if name != EDGES}
    tensors[EMBEDDINGS] = with_edges(embeddings, modules)
    torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, file)
