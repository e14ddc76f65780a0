"""Tokenizers on disk: complete ones of every kind load, broken ones are named, lost spaces are detected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataloaders.samples.layouts import VICUNA, layout_of
from engine.build import RANDOM, load_tokenizer
from engine.tiny.tokenizer import build_tokenizer
from pite import tokenizers
from tests.text import CHAT_TOKENIZERS, CORPUS, llama_like

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 1\n"


def byte_level(broken: bool = False) -> PreTrainedTokenizerFast:
    """Like DeepSeek LLM's. `broken`: as transformers 5.17 reads it if it is declared LlamaTokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    if broken:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_vicuna(directory: Path, legacy: bool = False) -> None:
    """Like Vicuna v1.5: only tokenizer.model."""
    with (directory / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 5), model_writer=model, model_type="bpe", vocab_size=400,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": legacy}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


COMPLETE: dict[str, Callable[[Path], object]] = {
    "tiny": lambda directory: build_tokenizer().save_pretrained(str(directory)),
    "llama first": lambda directory: llama_like("first").save_pretrained(str(directory)),
    "llama always": lambda directory: llama_like("always").save_pretrained(str(directory)),
    "byte level": lambda directory: byte_level().save_pretrained(str(directory)),
    "vicuna": save_vicuna,
    "vicuna legacy": lambda directory: save_vicuna(directory, legacy=True),
}


@pytest.mark.parametrize("kind", COMPLETE)
def test_complete_tokenizers_load(tmp_path: Path, kind: str) -> None:
    COMPLETE[kind](tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = load_tokenizer(tmp_path)
    text = "From 00 to 09, a red circle moves right."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids).strip() == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_random_weights_use_the_tiny_tokenizer() -> None:
    assert load_tokenizer(RANDOM).get_vocab() == build_tokenizer().get_vocab()


def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path: Path) -> None:
    byte_level(broken=True).save_pretrained(str(tmp_path))
    with pytest.raises(
        ValueError, match=r"turns ' a b  c\\n' into 'abc' under .*: install transformers 5\.23 or later"
    ):
        load_tokenizer(tmp_path)


def without_vocabulary(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (directory / name).unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["byte level", "vicuna"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_vocabulary, r" holds no tokenizer: copy its language model's tokenizer there"),
        (lambda path: path.write_text(LFS), r"{file} is a git-lfs pointer, not the file itself: run git lfs pull"),
        (lambda path: path.write_bytes(path.read_bytes()[:999]), r"{file} (is not valid JSON|cannot be read as a)"),
        (lambda path: path.write_text(""), r"{file} is empty: fetch it again"),
        (lambda path: path.write_text("{}"), r"{file} cannot be read as a"),
        (lambda path: path.write_text("[]"), r"{file} (holds a JSON list|cannot be read as a)"),
        (lambda path: (path.unlink(), path.mkdir()), r"{file} is no regular file"),
        (
            lambda path: (path.parent / "tokenizer_config.json").write_text(LFS),
            r"tokenizer_config\.json is a git-lfs pointer",
        ),
        (lambda path: (path.parent / "tokenizer_config.json").write_text("{"), r"tokenizer_config\.json is not valid"),
        (lambda path: (path.parent / "tokenizer_config.json").write_text("[]"), r"tokenizer_config\.json holds a JSON"),
    ],
)
def test_a_broken_tokenizer_is_one_sentence(
    tmp_path: Path, kind: str, damage: Callable[[Path], object], message: str
) -> None:
    COMPLETE[kind](tmp_path)
    file = "tokenizer.model" if kind == "vicuna" else "tokenizer.json"
    damage(tmp_path if damage is without_vocabulary else tmp_path / file)
    with pytest.raises(ValueError, match=message.replace("{file}", file)) as caught:
        load_tokenizer(tmp_path)
    sentence = str(caught.value)
    assert sentence.startswith(str(tmp_path)) and "\n" not in sentence and "pip install tiktoken" not in sentence


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 32, "num_attention_heads": 3},
            r"The hidden size \(32\) is not a multiple of the number .*\(3\)$",
        ),
        ({"hidden_size": "32"}, r"Field 'hidden_size' expected int, got str \(value: '32'\)$"),
        (None, r"is not valid JSON: "),
    ],
)
def test_a_broken_configuration_is_not_blamed_on_the_vocabulary(
    tmp_path: Path, fields: dict[str, object] | None, message: str
) -> None:
    COMPLETE["tiny"](tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", **fields}) if fields else '{"hidden_size": '
    )
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config\.json .*{message}"):
        load_tokenizer(tmp_path)


def test_the_file_that_names_the_ends_of_a_text_is_needed(tmp_path: Path) -> None:
    COMPLETE["tiny"](tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/tokenizer_config\.json is missing: copy the file of"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names no bos_token: copy the file of"):
        load_tokenizer(tmp_path)


def test_a_token_beyond_the_embedding_is_one_sentence() -> None:
    tokenizer = llama_like()
    tokenizer.add_tokens(["<point>"])
    size = len(tokenizer)
    tokenizers.check_vocabulary(size - 1, tokenizer, size, "text")
    with pytest.raises(
        ValueError, match=rf"text holds token {size - 1} \('<point>'\): the tokenizer has {size} tokens"
    ):
        tokenizers.check_vocabulary(size - 1, tokenizer, size - 1, "text")


@pytest.mark.parametrize("kind", ["qwen2.5", "qwen3", "llama3", "mistral"])
def test_a_tokenizer_with_a_chat_template_needs_no_beginning(tmp_path: Path, kind: str) -> None:
    CHAT_TOKENIZERS[kind]().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert layout_of(loaded) == layout_of(CHAT_TOKENIZERS[kind]()) != VICUNA
    assert (loaded.bos_token is None) == kind.startswith("qwen")


def test_a_chat_template_that_cannot_be_split_is_named(tmp_path: Path) -> None:
    CHAT_TOKENIZERS["qwen2.5"]().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ValueError, match=rf"^{tmp_path}: its chat template does not hold .*; correct the template, or"):
        load_tokenizer(tmp_path)
