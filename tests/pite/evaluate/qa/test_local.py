"""A judge that is a model in a local directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pite.evaluate.__main__ import main
from pite.evaluate.qa.benchmarks import Item
from pite.evaluate.qa.local import LocalJudge
from pite.evaluate.qa.prompts import Prompt, prompts
from tests.pite.evaluate.qa.test_command import files
from tests.text import llama_like

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["plain", "chat"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = llama_like()
    tokenizer.chat_template = request.param
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), initializer_range=0.5)).save_pretrained(folder)
    return folder


def wanted() -> list[Prompt]:
    return [prompts(Item(0, "v", ("Is it a dog?",), "yes"), ["no " * (i % 5)])[0] for i in range(11)]


def test_replies_do_not_depend_on_the_batch(directory: Path) -> None:
    judge = LocalJudge(directory, "cpu")
    together = dict(judge.replies(wanted()))
    alone = [next(iter(judge.replies([prompt])))[1] for prompt in wanted()]
    assert [together[i] for i in range(11)] == alone
    # Prompts differ in more than their order.
    assert len(set(alone)) > 1 and judge.name == f"local:{directory.name}"


def test_a_model_that_writes_nonsense_is_one_sentence(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["qa", "--benchmark", "msvd_qa", *files(tmp_path), "--judge-model", str(directory), "--device", "cpu"]
    assert main(argv) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"pite.evaluate: the judge local:{directory.name} gave no verdict: 6 replies are malformed"


def test_a_model_that_writes_verdicts(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = '{"pred": "yes", "score": 3}'
    monkeypatch.setattr(LocalJudge, "_generate", lambda self, texts: [verdict] * len(texts))
    argv = ["qa", "--benchmark", "msvd_qa", *files(tmp_path), "--judge-model", str(directory), "--device", "cpu"]
    assert main([*argv, "--metrics", f"{tmp_path}/m.json"]) == 0
    numbers = json.loads((tmp_path / "m.json").read_text())["msvd_qa"]
    assert numbers["accuracy"] == 100.0 and numbers["score"] == 3.0 and numbers["judge"] == f"local:{directory.name}"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json: give a model's folder, or --judge-url as well"),
        ('{"model_type": "nonsense"}', "holds no causal language model of transformers: "),
    ],
)
def test_a_directory_without_a_model_is_one_sentence(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError) as error:
        LocalJudge(tmp_path, "cpu")
    assert str(error.value).startswith(f"--judge-model {tmp_path} {message}") and "\n" not in str(error.value)
