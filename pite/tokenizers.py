"""Loads tokenizers from disk or the hub, and checks them before use."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dataloaders.errors import reason
from dataloaders.files import read_json_object, require_file
from dataloaders.samples.layouts import layout_of
from pite import hub
from pite.config import PiTeConfig

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_SPACED = " a b  c\n"
"""A test text: any Llama tokenizer must decode it to the same words, whatever it does with outer spaces."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's directory.

    Raises ValueError (one sentence that names the file) if there is none, if one of its files is damaged or is a
    git-lfs pointer, if it has no token for the beginning or the
    end of a text and no chat template, if its chat template cannot be split, and if it loses the spaces between words.
    """
    present = tokenizer_files(directory)
    if not any(path.name in _VOCABULARIES for path in present):
        raise ValueError(
            f"{directory} holds no tokenizer: copy its language model's tokenizer there (tokenizer.json, or tokenizer.model "
            "and tokenizer_config.json)"
        )
    for path in present:
        require_file(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file makes transformers raise any exception
        raise ValueError(_why_not(directory, present, error)) from None
    _check_ends(tokenizer, directory)
    check_spaces(tokenizer, str(directory))
    return tokenizer


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a tokenizer that a directory has."""
    return [directory / name for name in (*_VOCABULARIES, *_SETTINGS) if (directory / name).exists()]


def fetch_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model name. Raises ValueError if the download fails, and as above."""
    return load_tokenizer(hub.fetch(name, ("config.json", "tokenizer*", "chat_template*", *_VOCABULARIES, *_SETTINGS)))


def _check_ends(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Raise ValueError unless the tokenizer has a chat template that can be split, or the tokens of Vicuna's prompt."""
    if tokenizer.chat_template and tokenizer.is_fast:
        try:
            layout_of(tokenizer)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}; correct the template, or remove it for Vicuna's prompt") from None
        return
    lacking = [name for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None]
    if lacking:
        file = directory / _SETTINGS[0]
        raise ValueError(
            f"{file} {f'names no {lacking[0]}' if file.exists() else 'is missing'}: copy the file of the language model "
            "that the tokenizer belongs to, which names the tokens of a text's beginning and end"
        )


def check_spaces(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise ValueError if encoding and decoding loses the spaces between words.

    Some versions of transformers treat a byte-level vocabulary that is declared LlamaTokenizer as a sentencepiece one.
    """
    ids = tokenizer(_SPACED, add_special_tokens=False)["input_ids"]
    given_back = str(tokenizer.decode(ids))
    if given_back.split() != _SPACED.split():
        raise ValueError(
            f"{where}: its tokenizer turns {_SPACED!r} into {given_back!r} under transformers {transformers.__version__}: "
            "install transformers 5.23 or later, correct tokenizer_class in tokenizer_config.json, or fetch damaged files again"
        )


def check_vocabulary(token: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Raise ValueError if a text's largest token id is not in the language model's embedding of `vocab_size` rows."""
    if token >= vocab_size:
        raise ValueError(
            f"{where} holds token {token} ({tokenizer.convert_ids_to_tokens(token)!r}): the tokenizer has {len(tokenizer):,} "
            f"tokens and the language model an embedding of {vocab_size:,}; use the tokenizer that it was trained with, or "
            "resize its embedding"
        )


def _why_not(directory: Path, present: list[Path], error: Exception) -> str:
    """One sentence about a tokenizer that transformers could not load; it names the damaged file if one is found."""
    if (directory / "config.json").exists():  # transformers reads it to choose the tokenizer's class
        try:
            PiTeConfig.load(directory)
        except ValueError as broken:
            return str(broken)
    for path in present:
        if path.suffix == ".json":
            try:
                read_json_object(path)
            except ValueError as broken:
                return str(broken)
    vocabulary = next(path for path in present if path.name in _VOCABULARIES)
    if vocabulary.suffix == ".model":
        return f"{vocabulary} cannot be read as a sentencepiece model: it is cut off or damaged, fetch it again"
    return f"{vocabulary} cannot be read as a tokenizer: {reason(error)}; fetch it again"
