"""Vicuna with the authors' published adapters gives the model that the same stages give in our layout."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.tiny.tokenizer import build_tokenizer
from pite import names
from pite.chat.__main__ import main as chat
from pite.checkpoint import ADAPTER_FILE, HEADS_FILE, from_pretrained, save_pretrained, save_stage
from pite.published import load_published
from tests.commands import status_of
from tests.held_out import make_held_out
from tests.samples import random_batch, tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/vicuna, ROOT/ours/{1,2} in our layout, ROOT/theirs/{1,2} in the published one."""
    root = make_held_out(tmp_path_factory.mktemp("made"))
    tokenizer = build_tokenizer()
    base = tiny_model(lora=False, vocab_size=len(tokenizer))
    save_pretrained(base, root / "vicuna")
    tokenizer.save_pretrained(str(root / "vicuna"))
    merged: list[str] = []
    for number in (1, 2):
        ours, theirs = root / "ours" / str(number), root / "theirs" / str(number)
        ours.mkdir(parents=True)
        theirs.mkdir(parents=True)
        model = tiny_model(seed=number, vocab_size=len(tokenizer))
        save_stage(model, ours, {"stage": number, "language_model": str(root / "vicuna"), "merged": merged})
        tokenizer.save_pretrained(str(ours))
        merged = [*merged, str(ours)]
        (theirs / "adapter_config.json").write_text((ours / "adapter_config.json").read_text())
        torch.save(load_file(ours / ADAPTER_FILE), theirs / "adapter_model.bin")
        publish_heads(load_file(ours / HEADS_FILE), theirs, number)
    return root


def publish_heads(heads: dict[str, torch.Tensor], folder: Path, number: int) -> None:
    """Stage 1 has an adapter file alone; stage 2 has the rest under the names that DeepSpeed saves."""
    if number == 1:
        adapter = {f"model.{name}": tensor + 1 for name, tensor in heads.items() if "vision_adapter" in name}
        torch.save(adapter, folder / "vision_adapter.bin")
    else:
        torch.save(
            {f"base_model.model.{name}": tensor for name, tensor in heads.items()}
            | {"base_model.model.model.embed_tokens.weight": torch.zeros(1)},
            folder / "non_lora_trainables.bin",
        )


def test_the_published_layout_is_the_same_model(made: Path) -> None:
    expected = from_pretrained(made / "ours/2")
    found = load_published(made / "vicuna", [made / "theirs/1", made / "theirs/2"], torch.float32, "cpu")
    for name, tensor in names.head_tensors(expected).items():
        assert torch.equal(names.head_tensors(found)[name], tensor), name
    batch = random_batch(3, expected.config)
    with torch.no_grad():
        torch.testing.assert_close(found.hidden_states(batch), expected.hidden_states(batch), rtol=1e-4, atol=1e-4)


def test_chat_answers_with_published_adapters(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = f"{made}/data/evaluation/videos/e000000.mp4"
    flags = ["--video", video, "--clip", f"{made}/clip", "--query", "What?", "--device", "cpu", "--max-new-tokens", "8"]
    adapters = ["--adapter", f"{made}/theirs/1", f"{made}/theirs/2"]
    printed = []
    for model in ([f"{made}/ours/2"], [f"{made}/vicuna", *adapters]):
        assert status_of(chat, ["--model", *model, *flags]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].strip()


def test_missing_tensors_are_named(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_published(made / "vicuna", [made / "theirs/1"], torch.float32, "cpu")
    assert "the published adapters hold no localization_projector and no trajectory_projector" in caplog.text
    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / name).write_bytes((made / "theirs/1" / name).read_bytes())
    with pytest.raises(ValueError, match=r"no folder holds vision_adapter\.bin or non_lora_trainables\.bin"):
        load_published(made / "vicuna", [tmp_path], torch.float32, "cpu")


def test_a_malicious_pickle_is_not_executed(made: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / name).write_bytes((made / "theirs/1" / name).read_bytes())
    (tmp_path / "vision_adapter.bin").write_bytes(pickle.dumps({"vision_adapter.weight": Evil()}))
    with pytest.raises(ValueError, match=r"vision_adapter\.bin cannot be read"):
        load_published(made / "vicuna", [tmp_path], torch.float32, "cpu")
    assert not (tmp_path / "executed").exists()
