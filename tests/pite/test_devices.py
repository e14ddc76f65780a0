"""The device is checked before anything is loaded, with one-sentence errors; every GPU uses bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pite import devices, generate
from pite.chat.__main__ import main as chat
from pite.evaluate.__main__ import main as evaluate
from pite.generate import Generator
from pite.model import PiTe
from tests.commands import status_of
from tests.held_out import make_held_out


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Fakes a machine with two GPUs; nothing can be allocated on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:", "cuda:01", "cuda:-1", "cuda:x", "mps", "cpu:0"])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(ValueError, match=f"^device '{name}' is unknown: give cpu, cuda, one GPU of"):
        devices.resolve(name)


@pytest.mark.parametrize("name", ["cuda:2", "cuda:100000"])
def test_a_gpu_index_beyond_the_last_is_refused(name: str, gpus: pytest.MonkeyPatch) -> None:
    assert [devices.resolve(good).index for good in ("cuda", "cuda:0", "cuda:1")] == [None, 0, 1]
    with pytest.raises(ValueError, match=f"^device '{name}' cannot be used: the last GPU here is cuda:1$"):
        devices.resolve(name)


def test_select_sets_the_current_gpu(gpus: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    gpus.setattr(torch.cuda, "set_device", taken.append)
    gpus.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    names = ("cuda:1", "cuda", "cpu", "auto")
    assert [devices.select(name) for name in names] == ["cuda:1", "cuda", "cpu", "cuda"]
    assert taken == [torch.device("cuda:1")]


def test_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level("INFO", "pite"):
        assert devices.select("auto") == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        f"device cpu ({torch.get_num_threads()} threads), float32"
    ]


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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_held_out(tmp_path_factory.mktemp("made"))


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
    made: Path, flags: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device is checked before the model, which cannot be loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    video = f"{made}/data/evaluation/videos/e000000.mp4"
    assert status_of(chat, ["--model", str(made), "--video", video, "--query", "What?", *flags]) == (
        1 if "finds no GPU" in sentence else 2
    )
    error = capsys.readouterr().err
    assert error.startswith(f"pite.chat: {sentence}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["grounding", "--device", "gpu"], "pite.evaluate grounding: device 'gpu' is unknown"),
        (["trajectories", "--device", "cuda"], "pite.evaluate: device 'cuda' cannot be used: torch finds no GPU here"),
        (["grounding", "--batch-size", "0"], "pite.evaluate grounding: --batch-size must be at least 1, not 0"),
        (["grounding", "--num-frames", "-3"], "pite.evaluate grounding: --num-frames must be at least 1, not -3"),
    ],
)
def test_evaluate_refuses_in_one_sentence(
    made: Path, flags: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    where = ["--model", str(made), "--data", f"{made}/data", "--store", f"{made}/store"]
    assert status_of(evaluate, [*flags, *where]) == (1 if "finds no GPU" in sentence else 2)
    error = capsys.readouterr().err
    assert error.startswith(sentence) and error.count("\n") == 1
