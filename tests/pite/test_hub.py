"""Downloads by name: one kind of weights, and nothing from subfolders."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from pite import checkpoint, clip, hub
from pite.tokenizers import fetch_tokenizer

SMALL = ["config.json", "preprocessor_config.json", "tokenizer.model", "tokenizer_config.json"]
REPOSITORIES = {
    "both": [*SMALL, "model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "onnx/model.safetensors"],
    "old": [*SMALL, "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "tf_model.h5"],
    "hidden": [*SMALL, "pytorch_model.bin", "int8/model.safetensors", "int8/config.json", "int8/pytorch_model.bin"],
    "extra": [*SMALL, "model_ema.safetensors", "consolidated.safetensors", "pytorch_model.bin", "model.bin"],
    "sharded": [*SMALL, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "pytorch_model.bin"],
    "indexed": [*SMALL, "model-00001-of-00001.safetensors", "model.safetensors.index.json", "model-old.safetensors"],
}
COMMIT = "0" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake hub that matches patterns with the hub's own function; this folder holds what it downloaded."""
    directory = tmp_path / COMMIT

    def download(name: str, *, revision: str = "main", **patterns: list[str]) -> str:
        assert revision in ("main", COMMIT)
        for file in filter_repo_objects(REPOSITORIES[name.partition("/")[2]], **patterns):
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).touch()
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return directory


@pytest.mark.parametrize(
    ("repository", "weights"),
    [
        ("both", ["model.safetensors"]),
        ("old", ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]),
        ("hidden", ["pytorch_model.bin"]),
        ("extra", ["pytorch_model.bin"]),
        ("indexed", ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]),
        ("sharded", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
    ],
)
def test_one_kind_of_weights_is_downloaded(hub_cache: Path, repository: str, weights: list[str]) -> None:
    def fetched() -> list[str]:
        return sorted(str(file.relative_to(hub_cache)) for file in hub_cache.rglob("*") if file.is_file())

    assert hub.resolve(f"owner/{repository}", clip._FILES) == hub_cache
    assert fetched() == sorted(["config.json", "preprocessor_config.json", *weights])
    assert checkpoint.resolve(f"owner/{repository}") == hub_cache
    assert fetched() == sorted([*SMALL, *weights])


def test_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, **_: object) -> str:
        raise OSError(f"no way to {name}\nand more")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(
        ValueError,
        match=r"^owner/a could not be downloaded from the Hugging Face hub: no way to owner/a and more, and there is no "
        r"folder owner/a here$",
    ):
        hub.resolve("owner/a", clip._FILES)


@pytest.mark.parametrize(("repository", "weight"), [("both", "model.safetensors"), ("hidden", "pytorch_model.bin")])
def test_cached_snapshot_works_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: str, weight: str
) -> None:
    """With the hub's own code: it finds the cached snapshot, and requests nothing that needs a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / f"models--owner--{repository}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "preprocessor_config.json"):
        (snapshot / name).touch()
    (snapshot / weight).touch()
    assert hub.resolve(f"owner/{repository}", clip._FILES) == snapshot


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own code, with an empty cache and an address that refuses connections."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("load", [checkpoint.resolve, fetch_tokenizer])
def test_without_a_network_there_is_one_request_and_one_sentence(
    no_hub: None, load: Callable[[str], object], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    begin = time.monotonic()
    with pytest.raises(
        ValueError, match=r"^owner/a could not be .*: it cannot be reached \(.*\), and there is no folder"
    ):
        load("owner/a")
    assert time.monotonic() - begin < 10, "it gives up at once instead of repeating each request five times"
    assert not capfd.readouterr().err and not caplog.records


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "log in with `hf auth login`"), (403, "log in with `hf auth login`"), (404, "no model of this name")],
)
def test_a_login_is_the_remedy_only_where_access_is_refused(status: int, reason: str) -> None:
    error = OSError("Client Error")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    assert reason in hub.why_not(error)
    assert "log in" not in hub.why_not(OSError("Server Error"))


def test_a_clip_that_cannot_be_downloaded_can_be_given_as_a_folder(no_hub: None) -> None:
    with pytest.raises(ValueError, match=r"there is no folder owner/a here; give a folder with --clip$"):
        clip.ClipEncoder("owner/a")


def test_the_hub_that_is_switched_off_is_named(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        checkpoint.resolve("owner/a")
