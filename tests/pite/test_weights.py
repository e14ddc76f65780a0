"""Which files of a model's directory are read, and which remain when a model is saved over another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.build import language_model_checksum
from pite import checkpoint, hub, names
from pite.checkpoint import from_pretrained, save_pretrained
from pite.generate import language_model
from tests.samples import tiny_model

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 1\n"


def save(directory: Path, seed: int, shard: str = "5GB") -> dict[str, Tensor]:
    """A plain Llama as transformers writes it; its weights."""
    llama = language_model(tiny_model(lora=False, seed=seed))
    llama.save_pretrained(directory, max_shard_size=shard)
    return {name: tensor.clone() for name, tensor in llama.state_dict().items()}


def as_torch_files(directory: Path) -> None:
    """The same weights as transformers wrote them before safetensors."""
    for file in [*directory.glob("model*.safetensors"), *directory.glob("model*.index.json")]:
        target = directory / f"pytorch_{file.name}".replace(".safetensors", ".bin")
        if file.suffix == ".json":
            target.write_text(file.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
        else:
            torch.save(load_file(file), target)
        file.unlink()


def read(directory: Path) -> dict[str, Tensor]:
    model = from_pretrained(directory)
    return names.language_model_tensors(model)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def stale_shards(directory: Path, other: Path) -> None:
    for file in other.glob("*-of-*"):
        shutil.copy(file, directory)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shard", ["5GB", "60KB"], ids=["single", "sharded"])
def test_extra_files_are_never_read(tmp_path: Path, kind: str, shard: str) -> None:
    """EMA weights, weights with another name, and shards of another sharding next to an index."""
    expected = save(tmp_path / "model", seed=1, shard=shard)
    save(tmp_path / "other", seed=2, shard="40KB")
    if kind == "bin":
        as_torch_files(tmp_path / "model")
        as_torch_files(tmp_path / "other")
    checksum = language_model_checksum(tmp_path / "model")
    language_model_checksum.cache_clear()
    stale_shards(tmp_path / "model", tmp_path / "other")
    other = {name: -tensor for name, tensor in expected.items()}
    for name in ("model_ema.safetensors", "ema.safetensors"):
        save_file(other, tmp_path / "model" / name)
    for name in ("model.bin", "pytorch_model_ema.bin", "optimizer.bin"):
        torch.save(other, tmp_path / "model" / name)
    assert_same(read(tmp_path / "model"), expected)
    assert_same(read(tmp_path / "model"), LlamaForCausalLM.from_pretrained(tmp_path / "model").state_dict())
    assert language_model_checksum(tmp_path / "model") == checksum


def test_a_set_of_shards_without_an_index_is_read(tmp_path: Path) -> None:
    expected = save(tmp_path, seed=1, shard="60KB")
    hub.index_file(tmp_path).unlink()
    assert len(hub.weight_files(tmp_path)) > 2
    assert_same(read(tmp_path), expected)


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    """As in a cache whose files were deleted."""
    save(tmp_path, seed=1)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"model\.safetensors is missing$"):
        from_pretrained(tmp_path)


def test_safetensors_have_priority_over_torch_files(tmp_path: Path) -> None:
    save(tmp_path, seed=2)
    as_torch_files(tmp_path)
    expected = save(tmp_path, seed=1)
    assert_same(read(tmp_path), expected)


def remove_a_shard(directory: Path) -> None:
    hub.weight_files(directory)[1].unlink()


def remove_index(directory: Path) -> None:
    hub.index_file(directory).unlink()


def set_map(directory: Path, weight_map: object) -> None:
    hub.index_file(directory).write_text(json.dumps({"weight_map": weight_map}))


def repeat_a_tensor(directory: Path) -> None:
    first, second = hub.weight_files(directory)[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    remove_index(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_shard, r"model-00002-of-.* is missing, though model\.safetensors\.index\.json names it"),
        (lambda d: (remove_a_shard(d), remove_index(d)), r"model-00002-of-.* is missing, and the other shards of its set are there"),
        (lambda d: (save(d.parent / "o", 2, "40KB"), stale_shards(d, d.parent / "o"), remove_index(d)), "holds shards of"),
        (lambda d: save_file({"x": torch.zeros(1)}, d / "model.safetensors"), "holds both model.safetensors and"),
        (repeat_a_tensor, "is both in model-00001-of-"),
        (lambda d: hub.index_file(d).write_text("[]"), "index.json holds a JSON list"),
        (lambda d: hub.index_file(d).write_text("{"), "index.json is not valid JSON"),
        (lambda d: hub.index_file(d).write_text("{}"), "holds no weight_map"),
        (lambda d: set_map(d, {"x": "../model.safetensors"}), "which is not a file of its folder"),
        (lambda d: set_map(d, {"x": 1}), "which is not a file of its folder"),
        (lambda d: hub.index_file(d).write_text(LFS), "index.json is a git-lfs pointer"),
        (lambda d: hub.weight_files(d)[0].write_text(LFS), r"00001-of-.*\.safetensors is a git-lfs pointer"),
        (lambda d: hub.weight_files(d)[0].write_bytes(b"x" * 99), r"00001-of-.*\.safetensors cannot be read: "),
    ],
)  # fmt: skip
def test_incomplete_or_ambiguous_weights_are_one_sentence(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    save(tmp_path / "model", seed=1, shard="60KB")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS.encode(), "is a git-lfs pointer"),
        (b"", "is empty: fetch it again"),
        (b"PK\x03\x04" + b"junk" * 99, "cannot be read: it is cut off or damaged"),
        (None, "cannot be read: it is cut off or damaged"),
    ],
)
def test_damaged_torch_files_do_not_repeat_torchs_advice_to_trust_them(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    save(tmp_path, seed=1)
    as_torch_files(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    if content is None:
        torch.save({"model.norm.weight": print}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin {message}") as caught:
        from_pretrained(tmp_path)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_quantized_weights_of_the_right_shape_are_refused(tmp_path: Path) -> None:
    weights = save(tmp_path, seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: (weights[name] * 100).to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} has dtype torch\.int8: quantized weights are not supported"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_must_be_the_embedding(tmp_path: Path, same: bool) -> None:
    """Some models are declared tied but hold the tensor twice; if the two differ, one of them would be lost."""
    weights = save(tmp_path, seed=1)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone() if same else weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    if same:
        assert torch.equal(from_pretrained(tmp_path).output_embedding, weights["lm_head.weight"])
        return
    with pytest.raises(ValueError, match=r"tie_word_embeddings is set, but lm_head\.weight is not the embedding"):
        from_pretrained(tmp_path)


SIZES = {"one": 2**40, "few": 150_000, "many": 40_000}


@pytest.mark.parametrize("before", [*SIZES])
@pytest.mark.parametrize("after", [*SIZES])
def test_saving_over_another_model_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    for model, size in ((first, before), (second, after)):
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", SIZES[size])
        save_pretrained(model, tmp_path)
    loaded, expected = from_pretrained(tmp_path), names.merged_tensors(second) | names.head_tensors(second)
    assert_same(names.language_model_tensors(loaded) | names.head_tensors(loaded), expected)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert_same(theirs, {name: expected[name] for name in theirs})
    assert sorted(tmp_path.glob("*.safetensors")) == hub.weight_files(tmp_path)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


class Killed(BaseException):
    """Stands for a kill in the middle of a save."""


@pytest.mark.parametrize(("before", "after"), [("many", "one"), ("one", "few"), ("few", "few"), ("few", "many")])
def test_kill_while_saving_leaves_a_complete_model_or_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """A kill at each change of the directory in turn: afterwards one complete model is read, never parts of two."""
    models = [tiny_model(seed=1), tiny_model(seed=2)]
    whole = [names.merged_tensors(model) | names.head_tensors(model) for model in models]
    changes, end = 0, 0

    def counted(change: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            nonlocal changes
            changes += 1
            if changes == end:
                raise Killed
            return change(*arguments, **options)

        return wrapped

    refused = 0
    for end in range(1, 100):
        directory = tmp_path / str(end)
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", SIZES[before])
        save_pretrained(models[0], directory)
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", SIZES[after])
        changes = 0
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            patch.setattr(checkpoint, "write_tensors", counted(checkpoint.write_tensors))
            try:
                save_pretrained(models[1], directory)
            except Killed:
                killed = True
            else:
                killed = False
        try:
            loaded = from_pretrained(directory)
        except ValueError as error:
            assert killed and "holds no config.json" in str(error)
            refused += 1
            continue
        tensors = names.language_model_tensors(loaded) | names.head_tensors(loaded)
        same = [all(torch.equal(tensors[name], model[name]) for name in tensors) for model in whole]
        assert same.count(True) == 1, end
        if not killed:
            assert same[1]
            break
    assert refused >= 3 and end < 99


def test_a_whole_model_is_not_written_into_a_stage(tmp_path: Path) -> None:
    save_pretrained(tiny_model(lora=False), tmp_path / "base")
    stage = tmp_path / "stage1"
    stage.mkdir()
    checkpoint.save_stage(tiny_model(), stage, {"stage": 1, "language_model": str(tmp_path / "base"), "merged": []})
    with pytest.raises(ValueError, match="holds a training stage's output"):
        save_pretrained(tiny_model(seed=2), stage)


def test_the_checksum_of_a_file_in_the_hub_s_cache_is_its_blobs_name(tmp_path: Path):
    from engine.build import _blob_checksum

    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert _blob_checksum(tmp_path / "model.safetensors") == "ab" * 32
    assert _blob_checksum(blob) is None, "no link of the cache"
    other = blob.rename(blob.with_name("cd" * 20))  # a git blob's name is another checksum
    (tmp_path / "config.json").symlink_to(other)
    assert _blob_checksum(tmp_path / "config.json") is None
