"""The encoder that a model was trained with: where it is recorded, and that another one is refused."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataloaders.store.features import FeatureStore, FeatureWriter, Manifest
from engine.demo.held_out import summarize
from engine.tiny.tokenizer import build_tokenizer
from pite import checkpoint
from pite.chat.__main__ import main as chat
from pite.clip import ClipEncoder
from pite.evaluate.__main__ import main as evaluate
from pite.export.__main__ import main as export
from pite.lineage import check_encoder, encoder_of, sampling_of
from tests import clips
from tests.commands import status_of
from tests.held_out import CHANNELS, FRAMES, make_held_out
from tests.samples import tiny_model

OURS, OTHER = "a" * 64, "b" * 64


def write_stage(directory: Path, language_model: Path, made_of: dict[str, Any] | None) -> Path:
    """The output of a stage 2 without earlier stages."""
    tokenizer = build_tokenizer()
    directory.mkdir(parents=True)
    tokenizer.save_pretrained(str(directory))
    lineage = {"stage": 2, "language_model": str(language_model), "merged": []}
    record = lineage if made_of is None else {**lineage, "made_of": made_of}
    checkpoint.save_stage(tiny_model(vocab_size=len(tokenizer)), directory, record)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out videos, two CLIPs of one width, and the output of a stage that was trained on the first one's features."""
    root = make_held_out(tmp_path_factory.mktemp("made"))
    for seed in (0, 1):
        clips.save_clip(root / f"clip{seed}", seed)
    made_of = {"model": {"encoder": ClipEncoder(f"{root}/clip0").checksum}}
    write_stage(root / "run" / "stage2" / "final", root / "model", made_of)
    return root


def write_store(root: Path, features: Path, encoder: str) -> Path:
    """The store of the held-out videos with another encoder in its manifest."""
    source = FeatureStore(root / "store" / "videos")
    store = FeatureStore.create_or_open(
        features / "videos", Manifest(encoder, FRAMES, "none", "none", FRAMES, CHANNELS)
    )
    with FeatureWriter(store) as writer:
        writer.add({key: np.array(source.read(key)) for key in source.keys})
    return features


@pytest.mark.parametrize(
    ("made_of", "encoder"),
    [
        ({"model": {"encoder": OURS}}, OURS),
        ({"features": {"encoder": OURS, "channels": 16}, "dtype": "float32"}, OURS),
        ({"model": {"encoder": "VTimeLLM's"}, "features": {"encoder": OTHER}}, "VTimeLLM's"),
        ({"features": "abc", "model": None}, None),
        (None, None),
    ],
)
def test_the_record_of_every_version_is_read(
    made: Path, tmp_path: Path, made_of: dict[str, Any] | None, encoder: str | None
) -> None:
    assert encoder_of(write_stage(tmp_path / "final", made / "model", made_of)) == encoder


@pytest.mark.parametrize(
    ("features", "rule"),
    [
        ({"sampling": "linspace truncated"}, "index"),
        ({"sampling": "linspace in time"}, "time"),
        ({"sampling": "still"}, "index"),
        ("abc", "index"),
        (None, "index"),
    ],
)
def test_the_sampling_rule_of_training_is_read(made: Path, tmp_path: Path, features: object, rule: str) -> None:
    stage = write_stage(tmp_path / "final", made / "model", {"features": features})
    assert sampling_of(stage) == rule
    assert export(["--model", str(stage), "--output", f"{tmp_path}/out"]) == 0
    assert sampling_of(tmp_path / "out") == rule


def test_an_unknown_sampling_rule_is_warned_about(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = write_stage(tmp_path / "final", made / "model", {"features": {"sampling": "every second"}})
    assert sampling_of(stage) == "index"
    assert "by a rule named 'every second', which is unknown here: frames are sampled by index" in caplog.text


def test_a_whole_model_without_a_record_has_no_encoder(made: Path) -> None:
    assert encoder_of(made / "model") is None
    check_encoder(made / "model", OTHER, "the store", "remedy")


@pytest.mark.parametrize("kind", ["full", "peft"])
def test_an_export_keeps_the_encoder(made: Path, tmp_path: Path, kind: str) -> None:
    stage = made / "run" / "stage2" / "final"
    assert export(["--model", str(stage), "--output", f"{tmp_path}/out", "--format", kind]) == 0
    assert encoder_of(tmp_path / "out") == encoder_of(stage) is not None


def run_chat(made: Path, model: Path, clip: str) -> int:
    video = f"{made}/data/evaluation/videos/e000000.mp4"
    flags = ["--model", str(model), "--video", video, "--clip", f"{made}/{clip}", "--query", "What?"]
    return status_of(chat, [*flags, "--max-new-tokens", "2", "--device", "cpu"])


def test_chat_refuses_another_clip_of_the_same_width(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made / "run" / "stage2" / "final"
    assert run_chat(made, model, "clip0") == 0
    capsys.readouterr()
    assert run_chat(made, model, "clip1") == 1
    ours, other = (ClipEncoder(f"{made}/clip{i}").checksum[:12] for i in (0, 1))
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"pite.chat: --clip {made}/clip1 has the encoder {other}..., but {model} was trained on features of the encoder "
        f"{ours}...: pass --clip the encoder that made its features"
    )


@pytest.mark.parametrize("command", ["grounding", "trajectories"])
def test_evaluation_refuses_the_features_of_another_encoder(
    made: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made / "run" / "stage2" / "final"
    for encoder, status in ((OTHER, 1), (str(encoder_of(model)), 0)):
        store = write_store(made, tmp_path / encoder[:3], encoder)
        flags = ["--model", str(model), "--data", f"{made}/data", "--store", str(store), "--device", "cpu"]
        assert status_of(evaluate, [command, *flags]) == status
        refused = f"store {store}/videos has the encoder bbbbbbbbbbbb..., but {model} was trained on features of"
        assert (refused in capsys.readouterr().err) == bool(status)


def test_the_demo_is_not_measured_on_features_of_another_encoder(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "data", tmp_path / "data", symlinks=True)
    write_store(made, tmp_path / "store", OTHER)
    for stage in ("stage2", "stage3"):
        shutil.copytree(made / "run" / "stage2", tmp_path / "run" / stage)
    (tmp_path / "grounding.jsonl").touch()
    with pytest.raises(ValueError, match=r"has the encoder bbbbbbbbbbbb"):
        summarize(tmp_path)


def test_a_name_cannot_be_compared_with_a_checksum(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Imported features have the name that the user gave."""
    model = write_stage(tmp_path / "final", made / "model", {"model": {"encoder": "VTimeLLM's"}})
    with caplog.at_level(logging.WARNING, "pite"):
        check_encoder(model, "VTimeLLM's", "the store", "remedy")
        assert not caplog.records
        assert run_chat(made, model, "clip1") == 0
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f'{model} was trained on imported features of "VTimeLLM\'s": whether they equal')
