"""A fast tokenizer for the synthetic world's language that behaves as Llama's does.

Each word of the world is one token, with and without a space before it, and so is every two-digit index. Any other text
is split into characters and then bytes, so encoding and decoding returns any text unchanged.
"""

from __future__ import annotations

import string

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from dataloaders.formats.narratives import QUESTION as STILL_QUESTION
from dataloaders.samples.prompts import SYSTEM
from dataloaders.synthetic.language import GROUNDING_QUESTION
from dataloaders.synthetic.scene import COLOURS, DIRECTIONS, SHAPES

_SPACE = "▁"
_SPECIAL = ("<unk>", "<s>", "</s>")
_PHRASES = (
    *(f"{sentence}." for sentence in SYSTEM.removesuffix(".").split(". ")),
    "Describe the video in detail, with the time of each event",
    GROUNDING_QUESTION.removesuffix(" {}?"),
    "Which direction does the",
    "What colour is the shape that moves",
    "Which shape can be seen first?",
    "How many shapes can be seen?",
    STILL_QUESTION,
)
"""Phrases that every prompt repeats are one token: they carry no information, and a token costs as much as a frame."""

_VOCABULARY = """human's user USER: ASSISTANT: Describe the video image in detail, with the time of each List
event first last. concisely briefly picture Can you describe this clip What happens can be seen During which frames can we
see From to from There is are also In this image there no one two three shape shapes at the top bottom left right
middle of moves moving Which direction does move? It It's What colour color that a The an How many first nothing log
happening when does it event events Provide Give Write short detailed caption summary brief description Please video's I
shown visible appear appears time times start end starts ends between frame frames not yes no and or then before after"""


def _words() -> list[str]:
    text = " ".join((_VOCABULARY, *COLOURS, *SHAPES, *DIRECTIONS))
    return sorted({word.strip(string.punctuation) for word in text.replace("'s", " ").split()} - {""})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; its ids depend only on this code."""
    # A split into fewer pieces always wins: all pieces cost about the same, and words a little less than characters.
    pieces = [(piece, 0.0) for piece in _SPECIAL] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    whole = [
        *(phrase.replace(" ", _SPACE) for phrase in _PHRASES),
        *_words(),
        *(f"{index:02d}" for index in range(100)),
    ]
    pieces += [(_SPACE + word, -10.0) for word in whole if len(word) > 1]
    pieces += [(word, -10.5) for word in whole if len(word) > 1]
    characters = [c for c in string.digits + string.ascii_letters + string.punctuation]
    pieces += [(_SPACE, -11.0)] + [(_SPACE + c, -11.0) for c in characters] + [(c, -11.5) for c in characters]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=True))
    # As Llama: a space is added before the text, even if it starts with one.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
