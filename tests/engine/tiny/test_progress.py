"""A killed training of a tiny model continues to the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.tiny import clip, models, progress, vicuna
from engine.tiny.config import TinyConfig
from engine.tiny.prefix import weights_sha256
from engine.tiny.progress import Progress
from engine.tiny.tokenizer import build_tokenizer

CONFIG = TinyConfig(clip_steps=4, vicuna_steps=4, width=32, frames=4)


def train(name: str, own: Progress, stop: int | None = None) -> torch.nn.Module:
    if name == "clip":
        return clip.train(CONFIG.clip_steps, CONFIG.seed, own, stop)
    return vicuna.train(build_tokenizer(), CONFIG, own, stop)


@pytest.mark.parametrize("name", ["clip", "vicuna"])
def test_a_killed_training_continues_to_the_same_weights(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 2)
    identity: dict[str, Any] = {"width": 32}
    whole = weights_sha256(train(name, Progress()))
    file = tmp_path / "model.unfinished.pt"
    # The third step is lost: it was not kept.
    train(name, Progress(file, identity), stop=3)
    again = Progress(file, identity)
    assert weights_sha256(train(name, again)) == whole
    assert again.seconds > torch.load(file)["seconds"] > 0
    with pytest.raises(ValueError, match=r"is an unfinished training of \{'width': 32\}, not of \{'width': 64\}"):
        train(name, Progress(file, {"width": 64}))
    again.remove()
    assert not any(tmp_path.iterdir())


def test_the_command_keeps_a_state_until_the_model_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 2)
    monkeypatch.setattr(models, "measure_clip", lambda config: {})
    state, kept = tmp_path / "clip.unfinished.pt", []

    def killed(model: object) -> dict[str, float]:
        kept.append(torch.load(state)["steps"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "probe_clip", killed)
        with pytest.raises(KeyboardInterrupt):
            models.make_clip(tmp_path / "clip", CONFIG)
    assert kept == [4]
    monkeypatch.setattr(models, "probe_clip", lambda model: {"position": 1.0})
    models.make_clip(tmp_path / "clip", CONFIG)
    assert [each.name for each in tmp_path.iterdir()] == ["clip"]
