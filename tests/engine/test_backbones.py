"""Other language models than Llama 2's through the whole engine: training, FSDP2, export, answers, the dry run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataloaders.samples.layouts import layout_of
from engine.budget import __main__ as budget
from engine.layout import count_parameters
from engine.metrics import read_metrics
from engine.recipes import recipe
from engine.train import main
from pite.architectures import ARCHITECTURES
from pite.checkpoint import from_pretrained
from pite.config import PiTeConfig
from pite.export.__main__ import main as export
from pite.generate import Generator, language_model
from tests.backbones import BILLIONS, published_shape
from tests.engine.distributed.ranks import train
from tests.engine.workspace import CHANNELS, FRAMES, train_arguments
from tests.pite.test_model import hf_logits
from tests.samples import random_batch
from tests.text import CHAT_TOKENIZERS

KINDS = {"qwen2": "qwen2.5", "qwen3": "qwen3", "mistral": "mistral"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random language model as transformers saves it, with a chat template and a padded, tied vocabulary."""

    def make(kind: str) -> Path:
        directory = tmp_path_factory.getbasetemp() / f"llm-{kind}"
        if not directory.is_dir():
            tokenizer = CHAT_TOKENIZERS[KINDS[kind]]()
            torch.manual_seed(0)
            config = ARCHITECTURES[kind].config(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, vocab_size=len(tokenizer) + 11, tie_word_embeddings=kind != "mistral",
                **({} if kind == "qwen2" else {"head_dim": 24}),
            )  # fmt: skip
            llm = getattr(transformers, ARCHITECTURES[kind].model)(config)
            for name, parameter in llm.named_parameters():
                if name.endswith((".bias", "_norm.weight")):
                    parameter.data += 0.3 * torch.randn_like(parameter)
            llm.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize(("kind", "stage"), [("qwen2", "1"), ("qwen3", "all"), ("mistral", "1")])
def test_training_export_and_answers(
    workspace: Path, made: Callable[[str], Path], tmp_path: Path, kind: str, stage: str
) -> None:
    run = tmp_path / "run"
    assert main(train_arguments(workspace, run, stage, llm=made(kind), epochs=1)) == 0
    last = run / ("stage3" if stage == "all" else "stage1") / "final"
    assert layout_of(AutoTokenizer.from_pretrained(last)) == layout_of(AutoTokenizer.from_pretrained(made(kind)))
    ours = from_pretrained(last)
    batch = random_batch(3, ours.config)
    with torch.no_grad():
        expected = ours.logits(ours.hidden_states(batch, all_rows=True))
    loaders = {"full": AutoModelForCausalLM, "peft": AutoPeftModelForCausalLM}
    for form, loader in loaders.items():
        dtype = ["--dtype", "float32"] if form == "full" else []
        assert export(["--model", str(last), "--output", str(tmp_path / form), "--format", form, *dtype]) == 0
        theirs = loader.from_pretrained(tmp_path / form)
        with torch.no_grad():
            torch.testing.assert_close(hf_logits(theirs, ours, batch), expected, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "full" / "config.json").read_text())["model_type"] == kind
    assert f"- {kind}\n" in (tmp_path / "full" / "README.md").read_text()
    record = np.random.default_rng(0).standard_normal((FRAMES, CHANNELS)).astype(np.float16)
    answers = [
        Generator.from_pretrained(folder).answer(["What?"], [record], max_new_tokens=8)
        for folder in (last, tmp_path / "full", tmp_path / "peft")
    ]
    assert answers[0] == answers[1] == answers[2]
    assert type(language_model(ours)).__name__ == ARCHITECTURES[kind].model


@pytest.mark.parametrize(("kind", "fp8"), [("qwen2", True), ("qwen3", False)])
def test_sharded_weights_give_the_losses_of_copied_ones(
    workspace: Path, made: Callable[[str], Path], tmp_path: Path, kind: str, fp8: bool
) -> None:
    """FSDP2 on two ranks: biases and norms are sharded and gathered with the rest, also next to float8 weights."""
    flags = {"llm": made(kind), "max_steps": 3, **({"frozen_dtype": "fp8"} if fp8 else {})}
    assert main(train_arguments(workspace, tmp_path / "one", "1", **flags)) == 0
    ranks = train(2, tmp_path / "logs", train_arguments(workspace, tmp_path / "two", "1", parallel="fsdp", **flags))
    assert ranks.wait() == [0, 0], ranks.stderr(0)
    one, two = (read_metrics(tmp_path / name / "stage1" / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4 if fp8 else 1e-5)


def test_another_chat_template_is_another_run(
    workspace: Path, made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished stage is not continued with prompts that it was not trained on."""
    llm = tmp_path / "llm"
    llm.mkdir()
    for file in made("qwen2").iterdir():
        (llm / file.name).write_bytes(file.read_bytes())
    arguments = train_arguments(workspace, tmp_path / "run", "1", llm=llm, max_steps=2)
    assert main(arguments) == 0
    template = llm / "chat_template.jinja"
    template.write_text(template.read_text().replace("careful", "caerful"))
    assert main(arguments) == 1
    assert "data was" in capsys.readouterr().err


@pytest.mark.parametrize("name", BILLIONS)
def test_published_shapes_have_the_sizes_of_their_cards(name: str) -> None:
    config = published_shape(name)
    count = count_parameters(config, recipe("7b", 2))
    assert (count.total - _own(config)) / 1e9 == pytest.approx(BILLIONS[name], abs=0.006)


def _own(config: PiTeConfig) -> int:
    """Parameters of PiTe's adapter and heads."""
    outputs = 2 + 2 * config.num_points * config.num_frames
    return (
        config.vision_feature_size * config.llm.hidden_size
        + (config.llm.hidden_size + 1) * outputs
        + config.llm.hidden_size
    )


def test_the_dry_run_takes_any_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.json is enough. Speeds and hours that were measured with Vicuna are not shown for it."""
    row = {"model": "7b", "implementation": "pite", "mfu": 0.5}
    environment = {"environment": {"device": "NVIDIA H200"}, "rows": [row]}
    (tmp_path / "step_h200.json").write_text(json.dumps(environment))
    published_shape("Qwen3-8B").save(tmp_path)
    arguments = ["--llm", str(tmp_path), "--data", str(tmp_path), "--measured", str(tmp_path)]
    assert budget.main(arguments) == 0
    text = capsys.readouterr().out
    assert f"stage 1, Qwen3 ({tmp_path})" in text and "the paper took" not in text
    assert "45%*" in text and "50% " not in text
    published_shape("7b").save(tmp_path)
    assert budget.main(arguments) == 0
    text = capsys.readouterr().out
    assert f"stage 1, 7b ({tmp_path})" in text and "the paper took" in text and "50% " in text
