"""Chat templates: a prompt is the beginning of its sample, and the tokens are those of the rendered template."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dataloaders.records import Mention, Sample, Turn
from dataloaders.samples.batch import collate
from dataloaders.samples.layouts import VICUNA, end_ids, layout_of
from dataloaders.samples.prompts import prompt_ids, tokenize
from tests.text import CHAT_TOKENIZERS, CHATML, HEADERS, byte_level, llama_like, with_template

N, P = 6, 2
QUESTIONS = ["Describe the video in detail.", "12 of <|im_start|>user?", "línea\nñ 🎈?"]
ANSWERS = ["From 00 to 09, a red circle moves right.", "7", "🎈", "é", "It is <|im_end|></s><|eot_id|> here"]
ENDS = {
    "qwen2.5": ["<|im_end|>"],
    "qwen2.5 base": ["<|im_end|>", "<|endoftext|>"],
    "qwen3": ["<|im_end|>"],
    "smollm": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "mistral": ["</s>"],
    "mistral, legacy": ["</s>"],
    "mistral v0.3": ["</s>"],
    "tekken": ["</s>"],
    "zephyr": ["</s>"],
}


@pytest.fixture(scope="module", params=CHAT_TOKENIZERS)
def chat(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerFast]:
    return request.param, CHAT_TOKENIZERS[request.param]()


Chat = tuple[str, PreTrainedTokenizerFast]


def rendered(tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]], last: str | None = None) -> list[str]:
    """transformers' text of a conversation, split at the video: the oracle, without a mark anywhere else."""
    messages = []
    for i, (question, answer) in enumerate([*turns, *([] if last is None else [(last, "")])]):
        messages += [{"role": "user", "content": f"{'VIDEO' * (not i)}\n{question}" if not i else question}]
        messages += [{"role": "assistant", "content": answer}] if i < len(turns) else []
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=last is not None, enable_thinking=False
    )
    return str(text).split("VIDEO")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_every_template_has_its_own_end(chat: Chat) -> None:
    kind, tokenizer = chat
    assert tokenizer.convert_ids_to_tokens(end_ids(tokenizer)) == ENDS[kind]


def test_a_sample_has_the_tokens_of_the_rendered_template(chat: Chat) -> None:
    """Against transformers' own rendering and one call of the tokenizer for each side of the video."""
    kind, tokenizer = chat
    turns = [(QUESTIONS[0], ANSWERS[0]), ("When?", "7")][: 1 if kind == "qwen3" else 2]
    before, after = rendered(tokenizer, turns)
    if kind == "llama3":  # the day is fixed
        before = before.partition("Today: ")[0] + "Today: 26 Jul 2024" + before[before.index("\n\n<|eot_id|>") :]
    sample = Sample("s", "m", tuple(Turn(*turn) for turn in turns))
    result = tokenize(sample, tokenizer, num_frames=N, num_points=P)
    expected = ids_of(tokenizer, after)
    end = len(expected) - expected[::-1].index(end_ids(tokenizer)[0])
    assert result.token_ids.tolist() == [*ids_of(tokenizer, before), *[0] * N, *expected[:end]]
    assert not set(expected[end:]) & set(end_ids(tokenizer)), "only spaces follow the last end in the template"


def test_a_prompt_has_the_tokens_of_the_templates_own_generation_prompt(chat: Chat) -> None:
    kind, tokenizer = chat
    before, after = rendered(tokenizer, [], QUESTIONS[0])
    ids, start = prompt_ids(QUESTIONS[0], tokenizer, N)
    assert ids[start + N :].tolist() == ids_of(tokenizer, after)
    if kind != "llama3":
        assert ids[:start].tolist() == ids_of(tokenizer, before)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_prompt_is_a_prefix_of_the_sample_that_taught_it(chat: Chat, question: str, answer: str) -> None:
    _, tokenizer = chat
    turns = (Turn(question, answer), Turn("When?", ANSWERS[0]), Turn(question, answer))
    result = tokenize(Sample("s", "m", turns), tokenizer, num_frames=N, num_points=P)
    targets = np.split(result.target_positions, np.flatnonzero(np.diff(result.target_positions) > 1) + 1)
    assert len(targets) == 3
    for i, (turn, own) in enumerate(zip(turns, targets)):
        ids, frame_start = prompt_ids(turn.question, tokenizer, N, turns[:i])
        assert frame_start == result.frame_start and result.token_ids[: len(ids)].tolist() == ids.tolist()
        assert own[0] == len(ids), "the first token after the prompt is supervised"
        assert own.tolist() == list(range(own[0], own[-1] + 1))
        taught = result.token_ids[own].tolist()
        assert taught[-1] == end_ids(tokenizer)[0] and not set(taught[:-1]) & set(end_ids(tokenizer))
        assert tokenizer.decode(taught[:-1]).strip()[-1] == turn.answer[-1]


def test_contents_cannot_spell_a_token_of_the_layout(chat: Chat) -> None:
    _, tokenizer = chat
    plain = prompt_ids("What?", tokenizer, N)[0].tolist()
    for token in tokenizer.all_special_tokens:
        ids = prompt_ids(f"What{token}{token}?", tokenizer, N)[0].tolist()
        special = set(tokenizer.all_special_ids)
        assert [i for i in ids if i in special] == [i for i in plain if i in special]


def test_mentions_own_the_tokens_they_overlap(chat: Chat) -> None:
    _, tokenizer = chat
    answer = "</s><|im_end|> From 00 to 09, a red circle moves right."
    begin = answer.index("a red circle")
    mention = Mention(begin, begin + len("a red circle"), np.full((P, N, 2), 0.25, dtype=np.float32))
    for turns in ((Turn("Q?", answer, (mention,)),), (Turn("Q?", "7"), Turn("Q?", answer, (mention,)))):
        result = tokenize(Sample("s", "m", turns), tokenizer, num_frames=N, num_points=P)
        owned = tokenizer.decode(result.token_ids[result.trajectory_positions])
        assert owned.strip() == "a red circle" and len(result.trajectory) == len(result.trajectory_positions) >= 3
        assert set(result.trajectory_positions) <= set(result.target_positions)


def test_any_head_is_shared(chat: Chat) -> None:
    """Two questions about one video and one about another: the head is one segment, a video's frames another."""
    _, tokenizer = chat
    samples = [
        tokenize(Sample(f"s{i}", media, (Turn(question, "7"),)), tokenizer, num_frames=N, num_points=P)
        for i, (media, question) in enumerate([("a", "When?"), ("a", "What moves?"), ("b", "When?")])
    ]
    records = {name: np.random.default_rng(i).random((N, 4), dtype=np.float32) for i, name in enumerate("ab")}
    batch = collate(samples, [records[sample.media] for sample in samples], share=True)
    head = len(prompt_ids("?", tokenizer, N)[0][: samples[0].frame_start])
    assert batch.cu_seqlens.tolist()[1] == head and batch.kv_rows is not None
    assert len(batch.token_ids) < sum(len(s.token_ids) for s in samples) - 2 * head - N


def test_llama_2_bases_and_tokenizers_without_a_template_have_vicunas_prompt() -> None:
    assert layout_of(llama_like()) == VICUNA
    of_chat = "[INST] {% if true %}<<SYS>>\nBe kind.\n<</SYS>>\n\n{% endif %}{{ messages[0].content }} [/INST]"
    assert layout_of(with_template(llama_like(), of_chat)) == VICUNA
    base = byte_level(
        "<|begin_of_text|>", "<|end_of_text|>", bos="<|begin_of_text|>", eos="<|end_of_text|>", template=None
    )
    assert layout_of(base) == VICUNA
    ids = prompt_ids("When?", base, N)[0]
    assert (
        ids[0] == base.bos_token_id
        and tokenize(Sample("s", "m", (Turn("When?", "7"),)), base, num_frames=N, num_points=P)
        .token_ids[: len(ids)]
        .tolist()
        == ids.tolist()
    )


def test_the_date_of_a_template_does_not_change_the_prompt() -> None:
    assert "{{ strftime_now" in HEADERS
    layout = layout_of(CHAT_TOKENIZERS["llama3"]())
    assert "Today: 26 Jul 2024" in layout.head


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "cannot render a question and an answer: no system role"),
        ("{{ messages[0].content", "cannot render a question and an answer"),
        ("{{ messages[0].content }}", "does not hold a question and its answer once each"),
        ("{{ messages[1].content }}{{ messages[0].content }}<|im_end|>", "does not hold a question and its answer"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}", "once each, in this order"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "with no special token"),
        ("{% for m in messages %}{{ m.content }}{{ '<|im_end|>' if loop.last else '<|im_start|>' }}{% endfor %}", "ends an"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_split_is_one_sentence(template: str, message: str) -> None:
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", bos=None, eos="<|im_end|>", template=template)
    with pytest.raises(ValueError, match=message) as caught:
        layout_of(tokenizer)
    assert "\n" not in str(caught.value)


def test_a_changed_template_changes_the_layout() -> None:
    one, other = (
        byte_level("<|im_start|>", "<|im_end|>", bos=None, eos="<|im_end|>", template=CHATML.replace("careful", word))
        for word in ("careful", "hopeful")
    )
    assert (
        layout_of(one) != layout_of(other)
        and prompt_ids("?", one, N)[0].tolist() != prompt_ids("?", other, N)[0].tolist()
    )
