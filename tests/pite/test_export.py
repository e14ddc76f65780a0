"""Exported folders: their contents, and that transformers, peft and this engine compute the same from them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.tiny.tokenizer import build_tokenizer
from engine.train import main as train
from pite import checkpoint, lineage, names
from pite.chat.__main__ import main as chat
from pite.checkpoint import from_pretrained, save_pretrained
from pite.config import PiTeConfig
from pite.evaluate.trajectories import trajectory_head_warning
from pite.export import __main__ as export
from pite.generate import Generator
from tests.clips import save_clip
from tests.commands import full_disk, status_of
from tests.engine.workspace import make_workspace, train_arguments
from tests.media import write_video
from tests.peak_memory import PeakMemory
from tests.pite.test_model import hf_logits
from tests.samples import random_batch, tiny_model

STAGES = ("stage1", "stage2", "stage3")
LAYERS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and the outputs of three stages with large updates, ranks 4, 4 and 6."""
    root = tmp_path_factory.mktemp("run")
    tokenizer = build_tokenizer()
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": LAYERS}
    save_pretrained(tiny_model(2, lora=False, **shape), root / "llm")
    tokenizer.save_pretrained(str(root / "llm"))
    (root / "llm" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    earlier: list[str] = []
    for i, stage in enumerate(STAGES):
        model = tiny_model(2, lora=stage != "stage3", seed=i + 1, **shape)
        if stage == "stage3":
            model.add_lora(6, 9, seed=5)
            for tensor in names.lora_tensors(model).values():
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
        final = root / stage / "final"
        final.mkdir(parents=True)
        tokenizer.save_pretrained(str(final))
        lineage = {"stage": i + 1, "language_model": str(root / "llm"), "merged": list(earlier), "steps": 10 * (i + 1)}
        checkpoint.save_stage(model, final, lineage)
        earlier.append(str(final))
    return root


def exported(run: Path, output: Path, *more: str) -> Path:
    assert export.main(["--model", f"{run}/stage3/final", "--output", str(output), *more]) == 0
    return output


@pytest.fixture(scope="module")
def full(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(run, tmp_path_factory.mktemp("exports") / "full", "--dtype", "float32")


@pytest.fixture(scope="module")
def peft(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(run, tmp_path_factory.mktemp("exports") / "peft", "--format", "peft")


@torch.no_grad()
def assert_computes_the_same(language_model: torch.nn.Module, run: Path) -> None:
    ours = from_pretrained(run / "stage3" / "final")
    batch = random_batch(4, ours.config)
    expected = ours.logits(ours.hidden_states(batch, all_rows=True))
    torch.testing.assert_close(hf_logits(language_model, ours, batch), expected, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(run / "llm")
    assert (hf_logits(plain, ours, batch) - expected).abs().max() > 0.1, "the stages show in the numbers"


def test_merged_weights_load_in_transformers_alone(run: Path, full: Path) -> None:
    llama, info = AutoModelForCausalLM.from_pretrained(full, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_computes_the_same(llama, run)
    assert AutoTokenizer.from_pretrained(full)("a red circle").input_ids
    assert llama.generation_config.max_new_tokens == 7


def test_the_adapter_loads_in_peft_alone(run: Path, peft: Path) -> None:
    assert_computes_the_same(AutoPeftModelForCausalLM.from_pretrained(peft), run)
    base = AutoModelForCausalLM.from_pretrained(run / "llm")
    assert_computes_the_same(PeftModel.from_pretrained(base, str(peft)), run)
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (14, 14)
    assert config["base_model_name_or_path"] == str(run / "llm")


@pytest.mark.parametrize("kind", ["full", "peft"])
@torch.no_grad()
def test_every_export_loads_here(kind: str, run: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    ours, loaded = from_pretrained(run / "stage3" / "final"), from_pretrained(folder)
    batch = random_batch(4, ours.config)
    hidden, expected = loaded.hidden_states(batch, all_rows=True), ours.hidden_states(batch, all_rows=True)
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    for name, tensor in names.head_tensors(ours).items():
        assert torch.equal(names.head_tensors(loaded)[name], tensor), name
    assert lineage.stages(folder) == (1, 2, 3)
    assert "is of stage 3, which changed the hidden states" in trajectory_head_warning(folder)
    generators = Generator.from_pretrained(run / "stage3" / "final"), Generator.from_pretrained(folder)
    record = batch.features[: ours.config.num_frames].numpy()
    answers = [generator.answer(["What happens?"], [record], max_new_tokens=12) for generator in generators]
    assert answers[0] == answers[1]


def test_merged_weights_are_rounded_once(run: Path, full: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 60_000)
    folder = exported(run, tmp_path / "bf16")
    exact = load_file(full / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {file.name: load_file(file) for file in folder.glob("model-*.safetensors")}
    assert len(shards) > 2
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert index["weight_map"].keys() == exact.keys()
    for shard in shards.values():
        for name, tensor in shard.items():
            assert torch.equal(tensor, exact[name].bfloat16()), name
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_an_index_is_written_for_a_single_file(full: Path) -> None:
    index = json.loads((full / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert set(load_file(full / "pite.safetensors")).isdisjoint(index["weight_map"])


def test_memory_is_that_of_a_shard(run: Path, tmp_path: Path, monkeypatch) -> None:
    whole = sum(file.stat().st_size for file in (run / "llm").glob("*.safetensors"))
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", whole // 8)
    with PeakMemory() as live:
        exported(run, tmp_path / "full", "--dtype", "float32")
    assert live.peak < whole / 2


def test_an_exported_adapter_can_be_exported_merged(run: Path, peft: Path, tmp_path: Path) -> None:
    assert export.main(["--model", str(peft), "--output", f"{tmp_path}/again", "--dtype", "float32"]) == 0
    assert_computes_the_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), run)
    assert lineage.stages(tmp_path / "again") == (1, 2, 3)
    assert export.main(["--model", f"{tmp_path}/again", "--output", f"{tmp_path}/peft", "--format", "peft"]) == 1


def test_a_whole_model_saved_over_an_export_leaves_none_of_it(full: Path, tmp_path: Path) -> None:
    shutil.copytree(full, tmp_path / "folder")
    model = tiny_model(2, lora=False, seed=9)
    save_pretrained(model, tmp_path / "folder")
    loaded = from_pretrained(tmp_path / "folder")
    assert torch.equal(loaded.vision_adapter.weight, model.vision_adapter.weight)
    assert lineage.stages(tmp_path / "folder") == ()


# -- the card ---------------------------------------------------------------------------------------------------------


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("kind", ["full", "peft"])
def test_the_cards_code_runs(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = request.getfixturevalue(kind)
    monkeypatch.chdir(folder.parent)
    language_model, videos = code_blocks((folder / "README.md").read_text())
    found: dict[str, object] = {}
    exec(language_model, found)
    ids = found["tokenizer"]("a red circle", return_tensors="pt").input_ids  # type: ignore[operator]
    assert torch.isfinite(found["model"](input_ids=ids).logits).all()  # type: ignore[operator]
    exec(videos, found)
    assert isinstance(found["generator"], Generator)


def test_a_trained_runs_card_gives_its_lineage_data_and_scores(tmp_path: Path) -> None:
    make_workspace(tmp_path)
    assert train(train_arguments(tmp_path, tmp_path / "run", epochs=1)) == 0
    (tmp_path / "grounding.json").write_text('{"mIoU": 36.125, "task": "ActivityNet", "R@1": {"0.5": 30, "0.7": 12.5}}')
    arguments = ["--model", f"{tmp_path}/run/stage3/final", "--output", f"{tmp_path}/folder"]
    assert export.main([*arguments, "--scores", f"{tmp_path}/grounding.json"]) == 0
    card = (tmp_path / "folder" / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: transformers" in front and "pipeline_tag: video-text-to-text" in front
    assert "base_model" not in front, "a path is no model of the hub"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    table = {row[0]: row[1:] for row in rows}
    assert table["stage"] == ["1", "2", "3"]
    assert table["global batch"] == ["8"] * 3
    for number, stage in enumerate(STAGES):
        lineage = json.loads((tmp_path / "run" / stage / "final" / "lineage.json").read_text())
        assert table["steps"][number] == str(lineage["steps"])
        assert table["data"][number] == lineage["made_of"]["data"]
        assert re.match(r"\d+ samples", table["data"][number])
        for file, checksum in lineage["files"].items():
            assert table[f"SHA-256 of {file}"][number] == checksum[:16]
    assert table["grounding"] == ["value"]
    assert table["mIoU"] == ["36.125"] and table["R@1, 0.5"] == ["30"] and table["task"] == ["ActivityNet"]
    texts = [file.read_text() for file in (tmp_path / "folder").iterdir() if file.suffix in (".json", ".md")]
    assert len(texts) > 4 and not any(str(tmp_path) in text for text in texts)


# -- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """A fake HfApi that records its calls."""

    calls: ClassVar[list[tuple[str, dict[str, object]]]] = []

    def create_repo(self, name: str, **options: object) -> None:
        self.calls.append((name, options))

    def upload_folder(self, repo_id: str, folder_path: str, **options: object) -> None:
        files = sorted(file.name for file in Path(folder_path).iterdir())
        self.calls.append((repo_id, {"files": files, **options}))


def test_a_push_makes_the_repository_and_uploads_the_folder(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    folder = exported(run, tmp_path / "folder", "--push", "owner/pite", "--private")
    (created, options), (uploaded, upload) = Hub.calls
    assert created == uploaded == "owner/pite"
    assert options == {"private": True, "exist_ok": True}
    assert upload["files"] == sorted(file.name for file in folder.iterdir())
    assert 'from_pretrained("owner/pite")' in (folder / "README.md").read_text()


def test_a_push_that_fails_is_one_sentence_and_leaves_the_folder(
    run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nand more")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    arguments = ["--model", f"{run}/stage3/final", "--output", f"{tmp_path}/folder"]
    assert export.main([*arguments, "--push", "owner/pite"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pite.export")]
    assert (
        "is complete, but was not pushed to owner/pite on the Hugging Face hub: it needs a token: log in with" in line
    )
    assert from_pretrained(tmp_path / "folder").config.num_frames == 8


@pytest.mark.parametrize("kind", ["full", "peft"])
def test_a_pushed_export_is_loaded_by_name(kind: str, request: pytest.FixtureRequest, monkeypatch) -> None:
    """With the hub's own pattern matching: files that the loader does not name are not downloaded."""
    from huggingface_hub.utils import filter_repo_objects

    folder, fetched = request.getfixturevalue(kind), []

    def download(name: str, **patterns: list[str]) -> str:
        patterns.pop("revision", None)
        fetched.extend(filter_repo_objects([file.name for file in folder.iterdir()], **patterns))
        return str(folder)

    monkeypatch.setattr("pite.hub.snapshot_download", download)
    assert from_pretrained("owner/pite").config.num_frames == 8
    assert {file.name for file in folder.iterdir()} - set(fetched) == {"README.md"}
    assert isinstance(Generator.from_pretrained("owner/pite"), Generator)
    assert trajectory_head_warning(Path("owner/pite")).startswith("owner/pite is of stage 3")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--private"], "give --push OWNER/NAME too"),
        (["--push", "name"], "--push takes OWNER/NAME"),
        (["--push", "owner/pite", "--format", "peft"], "use --format full"),
        (["--format", "peft", "--dtype", "float16"], "--dtype applies to --format full"),
        (["--scores", "none.json"], "--scores none.json: no such file"),
        (["--scores", "list.json"], "list.json: mIoU is"),
        (["--output", "taken"], "is not empty and is not an earlier export"),
        (["--output", "taken/file"], "is a file"),
        (["--model", "taken"], "holds no config.json"),
        (["--model", "llm"], "holds a language model without PiTe's adapter and heads"),
        (["--model", "nothing"], "neither a directory nor"),
    ],
)
def test_wrong_exports_are_refused_in_one_sentence(
    run: Path, tmp_path: Path, monkeypatch, capsys, flags, message
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("taken/file").touch()
    Path("list.json").write_text('{"mIoU": [1]}')
    shutil.copytree(run / "llm", "llm")
    headless = {name: t for name, t in load_file("llm/model.safetensors").items() if "projector" not in name}
    save_file(
        {n: t for n, t in headless.items() if "vision_adapter" not in n}, "llm/model.safetensors", {"format": "pt"}
    )
    status = 1 if "use --format" in message or flags[0] not in ("--private", "--push", "--format") else 2
    assert status_of(export.main, ["--model", f"{run}/stage3/final", "--output", "folder", *flags]) == status
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pite.export")]
    assert message in line
    assert not Path("folder").exists() and list(Path("taken").iterdir()) == [Path("taken/file")]


def test_numbers_that_a_dtype_cannot_hold_are_named(run: Path, tmp_path: Path, capsys) -> None:
    whole = from_pretrained(run / "stage3" / "final")
    whole.decoder.layers[0].o.weight.data[0, 0] = 1e6
    save_pretrained(whole, tmp_path / "whole")
    build_tokenizer().save_pretrained(str(tmp_path / "whole"))
    arguments = ["--model", f"{tmp_path}/whole", "--output", f"{tmp_path}/folder"]
    assert export.main([*arguments, "--dtype", "float16"]) == 1
    assert "model.layers.0.self_attn.o_proj.weight holds numbers that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
    assert export.main(arguments) == 0


def test_an_earlier_export_is_replaced_whole(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "folder")
    exported(run, folder, "--format", "peft")
    assert not list(folder.glob("model*")) and (folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("copied", [(), ("stage2",)])
def test_a_stage_copied_alone_names_what_it_lacks(run: Path, tmp_path: Path, capsys, copied: tuple[str, ...]) -> None:
    for stage in (*copied, "stage3"):
        shutil.copytree(run / stage, tmp_path / stage)
    final = tmp_path / "stage3" / "final"
    with pytest.raises(ValueError, match=r"missing; copy the whole run folder") as raised:
        from_pretrained(final)
    assert "stage1/final" in str(raised.value) and ("stage2/final" in str(raised.value)) is not bool(copied)
    assert export.main(["--model", str(final), "--output", f"{tmp_path}/folder"]) == 1
    save_clip(tmp_path / "clip")
    video = write_video(tmp_path / "v.mp4", 8)
    flags = ["--video", str(video), "--clip", f"{tmp_path}/clip", "--query", "What?", "--device", "cpu"]
    assert chat(["--model", str(final), *flags]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pite.")]
    assert [line.partition(": ")[2] for line in lines] == [str(raised.value)] * 2


def test_a_missing_language_model_is_named(run: Path, tmp_path: Path, capsys) -> None:
    for stage in STAGES:
        shutil.copytree(run / stage, tmp_path / "a" / "b" / stage)
    arguments = ["--model", f"{tmp_path}/a/b/stage3/final", "--output", f"{tmp_path}/folder"]
    for kind in ("full", "peft"):
        assert export.main([*arguments, "--format", kind]) == 1
        assert f"builds on the language model {tmp_path}/a/b/llm, which is missing" in capsys.readouterr().err


def test_a_padding_token_without_an_embedding_is_left_out(run: Path, tmp_path: Path) -> None:
    """transformers would refuse the folder."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = copy / "stage3" / "final" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"pad_token_id": values["vocab_size"]}))
    folder = exported(copy, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(folder).config.pad_token_id is None


def test_a_clone_and_a_mount_point_are_not_replaced(run: Path, full: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(full, clone)
    (clone / ".git").mkdir()
    model = f"{run}/stage3/final"
    assert export.main(["--model", model, "--output", str(clone)]) == 1
    assert "is a clone, whose history would be lost" in capsys.readouterr().err
    monkeypatch.setattr(Path, "is_mount", lambda self: True)
    assert export.main(["--model", model, "--output", str(tmp_path / "mounted")]) == 1
    assert "is a mount point" in capsys.readouterr().err


def test_reading_a_weight_twice_gives_the_same(run: Path) -> None:
    """The sum of the updates does not change the mapped file's memory."""
    adapters = [run / stage / "final" for stage in STAGES]
    loader = checkpoint.WeightLoader(PiTeConfig.load(adapters[-1]), run / "llm", adapters, dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    first = loader.weight(name).clone()
    assert torch.equal(loader.weight(name), first)


@pytest.mark.parametrize("kind", ["full", "peft"])
@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_names_the_output(run: Path, tmp_path: Path, kind: str, size: int, capsys) -> None:
    arguments = ["--model", f"{run}/stage3/final", "--output", f"{tmp_path}/folder", "--format", kind]
    with full_disk(size):
        assert export.main(arguments) == 1
    assert f"pite.export: --output {tmp_path}/folder cannot be written: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing remains"
