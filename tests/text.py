"""A small tokenizer like Llama's, trained when it is needed."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataloaders.samples.prompts import SYSTEM

CORPUS = [
    f"{SYSTEM} USER: Describe the video in detail. ASSISTANT:",
    "From 00 to 09, a red circle moves right. From 12 to 30, a blue square moves up. It moves left.",
    "In this image there is a yellow circle at the right. During which frames can we see a green triangle?",
]


def llama_like(prepend_scheme: str = "first") -> PreTrainedTokenizerFast:
    """Byte-pair encoding with Metaspace and byte fallback, as in Llama 2. Its versions use `first` or `always`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        CORPUS * 5, trainers.BpeTrainer(vocab_size=520, show_progress=False, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


CHATML = """{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are a careful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""In the manner of Qwen2.5 and SmolLM2. Newlines after block tags are removed, as transformers sets Jinja."""

THINKING = """{% for message in messages %}{% if message.role == 'user' %}<|im_start|>user
{{ message.content }}<|im_end|>
{% else %}<|im_start|>assistant
{% if loop.last %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""In the manner of Qwen3: the last answer alone has a block of thoughts."""

HEADERS = """{{ bos_token }}<|start_header_id|>system<|end_header_id|>

Today: {{ strftime_now('%d %b %Y') }}

<|eot_id|>{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
"""In the manner of Llama 3.1, with today's date."""

INSTRUCTIONS = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]\
{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"""
"""In the manner of Mistral 7B."""

CONTROLS = """{{ bos_token }}{% for message in messages %}\
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message.role == 'user' %}[INST] {{ message.content }}[/INST]{% else %} {{ message.content | trim }}{{ eos_token }}\
{% endif %}{% endfor %}"""
"""In the manner of Mistral 7B v0.3, whose vocabulary has [INST] and [/INST] as tokens."""

TAGS = """{% for message in messages %}<|{{ message.role }}|>
{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
"""In the manner of Zephyr and TinyLlama: tags that are plain text."""


def byte_level(*special: str, bos: str | None, eos: str, template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding, as in Qwen, Llama 3 and SmolLM, with the tokens of its template."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,2}|\s*[\r\n]+|\s?[^\s\p{N}]+|\s+"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {} if bos is None else {"bos_token": bos}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, chat_template=template, **names)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str, *special: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_HEADER_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

CHAT_TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "qwen2.5": lambda: byte_level(*_CHATML_TOKENS, bos=None, eos="<|im_end|>", template=CHATML),
    "qwen2.5 base": lambda: byte_level(*_CHATML_TOKENS, bos=None, eos="<|endoftext|>", template=CHATML),
    "qwen3": lambda: byte_level(*_CHATML_TOKENS, bos=None, eos="<|im_end|>", template=THINKING),
    "smollm": lambda: byte_level(*_CHATML_TOKENS, bos="<|im_start|>", eos="<|im_end|>", template=CHATML),
    "llama3": lambda: byte_level(*_HEADER_TOKENS, bos="<|begin_of_text|>", eos="<|eot_id|>", template=HEADERS),
    "mistral": lambda: with_template(llama_like(), INSTRUCTIONS),
    "mistral, legacy": lambda: with_template(llama_like("always"), INSTRUCTIONS),
    "mistral v0.3": lambda: with_template(llama_like(), CONTROLS, "[INST]", "[/INST]"),
    "tekken": lambda: byte_level(
        "<s>", "</s>", "[INST]", "[/INST]", bos="<s>", eos="</s>", template=CONTROLS.replace("] {{", "]{{")
    ),
    "zephyr": lambda: with_template(llama_like(), TAGS),
}
"""Tiny tokenizers with chat templates in the manner of each language model."""
