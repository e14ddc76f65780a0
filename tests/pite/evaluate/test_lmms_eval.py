"""The adapter against a small stand-in for lmms-eval: its base class, registry and requests have the real signatures."""

from __future__ import annotations

import abc
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pite.evaluate import lmms_eval as adapter
from pite.generate import Generator
from tests.held_out import make_held_out


class FakeLmms(abc.ABC):
    """As `lmms_eval.api.model.lmms`."""

    is_simple: bool = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> FakeLmms:
        given = dict(pair.split("=", 1) for pair in arg_string.split(",") if pair)
        return cls(**given, **{k: v for k, v in (additional_config or {}).items() if v is not None})

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


@dataclass(frozen=True)
class FakeManifest:
    """As `lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class FakeRegistry:
    """As `lmms_eval.models.registry_v2.ModelRegistryV2`: a class is imported by its path, and must be simple."""

    manifests: dict[str, FakeManifest] = field(default_factory=dict)

    def register_manifest(self, manifest: FakeManifest, *, overwrite: bool = False) -> None:
        self.manifests[manifest.model_id] = manifest

    def get_model_class(self, model_name: str, force_simple: bool = False) -> Any:
        path = self.manifests[model_name].simple_class_path
        assert path is not None
        module, name = path.rsplit(".", 1)
        cls = getattr(importlib.import_module(module), name)
        assert issubclass(cls, FakeLmms) and cls.is_simple
        return cls


@dataclass
class FakeInstance:
    """As `lmms_eval.api.instance.Instance` of a task with output_type generate_until."""

    arguments: tuple[Any, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistry]:
    """lmms-eval as modules of this process; its command keeps the registry's class."""
    registry = FakeRegistry()
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": FakeLmms},
        "lmms_eval.models": {"MODEL_REGISTRY_V2": registry},
        "lmms_eval.models.registry_v2": {"ModelManifest": FakeManifest},
        "lmms_eval.__main__": {"cli_evaluate": lambda: None},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    yield registry
    vars(adapter).pop("PiTeModel", None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_held_out(tmp_path_factory.mktemp("made"))


def load(registry: FakeRegistry, made: Path, **more: Any) -> Any:
    adapter.main()
    config = {"batch_size": 2, "max_batch_size": None, "device": "cpu", **more}
    cls = registry.get_model_class("pite")
    return cls.create_from_arg_string(f"pretrained={made}/model,clip={made}/clip", config)


QUESTIONS = [("What?", 0), ("What moves up?", 1), ("Is it red?", 0), ("When can we see a red circle?", 1), ("Why?", 2)]


def requests_for(model: Any, made: Path, **settings: Any) -> list[FakeInstance]:
    videos = [{"video": f"{made}/data/evaluation/videos/e00000{i}.mp4"} for i in range(3)]
    model.task_dict["t"] = {"test": videos}
    given = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 1.0, "num_beams": 1, "do_sample": False, **settings}
    return [FakeInstance((text, given, lambda doc: [doc["video"]], v, "t", "test")) for text, v in QUESTIONS]


def test_answers_are_those_of_the_generator(registry: FakeRegistry, made: Path) -> None:
    model = load(registry, made)
    assert (model.rank, model.world_size, model.batch_size) == (0, 1, 2)
    wanted = requests_for(model, made)
    found = model.generate_until(wanted)
    generator = Generator.from_pretrained(made / "model")
    features = [model._encode(f"{made}/data/evaluation/videos/e00000{i}.mp4") for i in range(3)]
    alone = [generator.answer([text], [features[v]], max_new_tokens=12)[0].text for text, v in QUESTIONS]
    assert found == alone
    frames = model._prefixes.rows.frames
    assert frames == 3 * model._config.num_frames, "each video's frames are computed once"
    stop = alone[0][3:5]
    (first, *_) = model.generate_until(requests_for(model, made, until=["never", stop])[:1])
    assert first == alone[0][: alone[0].find(stop)].strip()
    mixed = [*wanted[:2], *requests_for(model, made, max_new_tokens=3)[2:]]
    short = [generator.answer([text], [features[v]], max_new_tokens=3)[0].text for text, v in QUESTIONS]
    assert model.generate_until(mixed) == [*alone[:2], *short[2:]]


def test_what_pite_cannot_do_is_one_sentence(
    registry: FakeRegistry, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(registry, made)
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="choose a task whose output_type is generate_until"):
            method([])
    for visuals in ([], ["a.mp4", "b.mp4"], [object()], None):
        request = FakeInstance(("What?", {}, lambda _, found=visuals: found, 0, "t", "test"))
        model.task_dict["t"] = {"test": [{}]}
        with pytest.raises(ValueError, match="t, test 0: PiTe takes one video file for each question"):
            model.generate_until([request])
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, not 'auto'"):
        load(registry, made, batch_size="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="PiTe runs in one process in lmms-eval"):
        load(registry, made)


def test_the_module_needs_neither_lmms_eval_nor_torch() -> None:
    code = "import sys, pite.evaluate.lmms_eval as m; print('torch' in sys.modules, m.NAME)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "pite"]


def test_without_lmms_eval_the_command_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(SystemExit, match=r"lmms-eval cannot be imported .*: pip install lmms-eval"):
        adapter.main()


def test_a_model_of_another_family_is_refused(registry: FakeRegistry, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "family": "pg-video-llava", "num_places": 4}))
    with pytest.raises(ValueError, match=r"family pg-video-llava, which this adapter does not run: use pite\.evaluate"):
        load(registry, tmp_path)
