"""The device is checked before anything is loaded, with one-sentence errors; every GPU uses bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pite import chat, devices, generate
from pite.evaluate import __main__ as evaluate
from pite.generate import Generator
from pite.model import PiTe


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Fakes a machine with two GPUs; nothing can be allocated on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:", "cuda:01", "cuda:-1", "cuda:x", "mps", "cpu:0"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(ValueError, match=f"^device '{name}' is unknown: give cpu, cuda, or"):
        devices.resolve(name)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:100000"])
def test_a_gpu_index_beyond_the_last_is_refused(name: str, gpus: pytest.MonkeyPatch) -> None:
    assert [devices.resolve(good).index for good in ("cuda", "cuda:0", "cuda:1")] == [None, 0, 1]
    with pytest.raises(ValueError, match=f"^device '{name}' cannot be used: the last GPU here is cuda:1$"):
        devices.resolve(name)


def test_select_sets_the_current_gpu(gpus: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    gpus.setattr(torch.cuda, "set_device", taken.append)
    for name in ("cuda:1", "cuda", "cpu"):
        devices.select(name)
    assert taken == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", torch.bfloat16), ("cuda:1", torch.bfloat16), ("cpu", torch.float32)]
)
def test_every_gpu_gets_bfloat16(gpus: pytest.MonkeyPatch, device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    class Called(Exception):
        pass

    def load(*arguments: object) -> PiTe:
        raise Called(*arguments)

    gpus.setattr(generate, "from_pretrained", load)
    with pytest.raises(Called) as caught:
        Generator.from_pretrained(tmp_path, device)
    assert caught.value.args == (tmp_path, dtype, device)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["--device", "cuda"], "device 'cuda' cannot be used: torch finds no GPU here"),
        (["--device", "cuda:1"], "device 'cuda:1' cannot be used: torch finds no GPU here"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, not 0"),
        (["--temperature", "-1"], "--temperature must be 0 or more, not -1.0"),
        (["--temperature", "nan"], "--temperature must be 0 or more, not nan"),
    ],
)
def test_chat_refuses_in_one_sentence(
    flags: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device is checked before the model, which does not exist."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chat.main(["--model", "none", "--video", "none", "--query", "What?", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pite.chat: {sentence}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["grounding", "--device", "gpu"], "device 'gpu' is unknown"),
        (["trajectories", "--device", "cuda"], "device 'cuda' cannot be used: torch finds no GPU here"),
        (["grounding", "--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["grounding", "--num-frames", "-3"], "--num-frames must be at least 1, not -3"),
    ],
)
def test_evaluate_refuses_in_one_sentence(
    flags: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evaluate.main([*flags, "--model", "none", "--data", "none", "--store", "none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pite.evaluate: {sentence}") and error.count("\n") == 1
