"""What chat and evaluation refuse, before the weights are read or in the middle of their output: one sentence each."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pite.chat.__main__ import main as chat_main
from pite.families import PITE
from tests.commands import full_disk, status_of
from tests.held_out import CHANNELS, make_held_out
from tests.pite.test_chat import evaluated, run_chat, set_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_held_out(tmp_path_factory.mktemp("made"))


def test_a_full_disk_is_named_by_its_path(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, size in (("--predictions", 1000), ("--metrics", 100)):
        path = tmp_path / flag
        with full_disk(size):
            assert evaluated(made, "grounding", flag, str(path)) == 1
        assert capsys.readouterr().err.splitlines()[-1] == f"pite.evaluate: {path}: File too large"
        assert path.exists() == (flag == "--predictions"), "the answers until then are kept"


def test_another_number_of_frames_than_the_models_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(made, "grounding", "--num-frames", "100") == 1
    assert f"--num-frames 100: {made}/model has 8 frames; leave" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [CHANNELS, 768])
def test_a_bare_language_model_is_refused_before_its_weights_are_read(
    made: Path, tmp_path: Path, channels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same message for features of any shape, because the model has no shape of its own for them."""
    bare = set_config(made, tmp_path, vision_feature_size=channels)
    weights = load_file(bare / "model/model.safetensors")
    llama = {name: t for name, t in weights.items() if not any(f".{head}." in name for head in PITE.modules)}
    assert len(llama) == len(weights) - 2 * len(PITE.modules)
    save_file(llama, bare / "model/model.safetensors", {"format": "pt"})
    for command in (
        run_chat,
        lambda folder: evaluated(folder, "grounding"),
        lambda folder: evaluated(folder, "trajectories"),
    ):
        assert command(bare) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.endswith(f": {bare}/model holds a language model without PiTe's adapter and heads: train it first")


@pytest.mark.parametrize("name", ["stage1", "."])
def test_the_folder_of_a_run_names_its_last_finished_stage(
    made: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("1", "2"):
        (tmp_path / f"stage{stage}" / "final").mkdir(parents=True)
        (tmp_path / f"stage{stage}" / "final" / "lineage.json").touch()
    (tmp_path / "stage3" / "checkpoints").mkdir(parents=True)
    given, last = tmp_path / name, tmp_path / ("stage2" if name == "." else name) / "final"
    where = ["--model", str(given), "--video", f"{made}/model/config.json", "--query", "What?"]
    assert status_of(chat_main, where) == 1
    assert capsys.readouterr().err == (
        f"pite.chat: --model {given} is the folder of a training run: give its last finished stage, {last}\n"
    )
    where[1] = f"{tmp_path}/stage3"
    assert status_of(chat_main, where) == 1
    assert "is the folder of a training run without a finished stage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--query", " "], "--query is empty: give a question about the video"),
        (["--phrase", "a dog"], "--phrase chooses what is drawn: give --trajectory FILE.mp4 or --json too"),
        (["--phrase", "", "--trajectory", "out.mp4"], "--phrase is empty: give words of the answer"),
        (
            ["--trajectory", "out.avi"],
            "--trajectory out.avi: an MP4 or a PNG is written, so give a name that ends in .mp4 or .png",
        ),
    ],
)
def test_flags_without_an_effect_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(chat_main, ["--model", "m", "--video", "v.mp4", "--query", "What?", *flags]) == 2
    assert capsys.readouterr().err == f"pite.chat: {message}\n"


def test_a_video_without_points_is_explained(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_chat(made, "--max-new-tokens", "1", "--trajectory", f"{tmp_path}/o.mp4") == 0
    assert f"{tmp_path}/o.mp4: written without points, because no object was found" in capsys.readouterr().err
    assert (tmp_path / "o.mp4").exists()
