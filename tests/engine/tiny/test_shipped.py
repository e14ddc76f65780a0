"""The tiny models in the package: the committed code makes them, and they have the probes that their manifests hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dataloaders.files import sha256
from engine.tiny.config import TinyConfig
from engine.tiny.models import SETTINGS, VERSION, load_clip, load_vicuna, probe_clip, probe_vicuna, read_manifest
from engine.tiny.prefix import machine, measure_clip, measure_vicuna
from engine.tiny.shipped import PARTS
from engine.tiny.tokenizer import build_tokenizer

NAMES = ("clip", "vicuna")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The parts were made on one thread: another number sums in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_is_of_the_default_settings_and_of_its_file(name: str) -> None:
    manifest = read_manifest(PARTS / name)
    assert TinyConfig(**{field: manifest[field] for field in SETTINGS[name]}) == TinyConfig()
    assert manifest["version"] == VERSION
    assert manifest["sha256"] == sha256(PARTS / name / "model.safetensors")
    assert manifest["cpu_minutes"] > 1 and manifest["machine"].keys() == machine().keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps_of_the_training_are_made_again_bit_by_bit(name: str) -> None:
    manifest = read_manifest(PARTS / name)
    wanted = manifest["prefix"]
    again = measure_clip(TinyConfig()) if name == "clip" else measure_vicuna(TinyConfig(), build_tokenizer())
    # bfloat16 on another kind of CPU, or another version of PyTorch, rounds otherwise.
    assert again["value"] == pytest.approx(wanted["value"], rel=1e-3)
    if manifest["machine"] == machine():
        assert again == wanted


def test_the_clip_has_the_probes_of_its_manifest() -> None:
    probes = read_manifest(PARTS / "clip")["probes"]
    assert probe_clip(load_clip(PARTS / "clip")) == pytest.approx(probes, rel=0.01)
    assert probes["position R2, among three"] > 0.95


def test_the_vicuna_has_the_probes_of_its_manifest() -> None:
    probes = read_manifest(PARTS / "vicuna")["probes"]
    trainer, tokenizer = load_vicuna(PARTS / "vicuna")
    assert probe_vicuna(trainer, tokenizer, TinyConfig().frames) == pytest.approx(probes, rel=0.01)
    assert probes["trajectory_l1"] < 0.8 * probes["static_oracle_l1"]
