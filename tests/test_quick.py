"""Every command answers --help, a typo and a path that does not exist before it imports torch or a decoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from dataloaders.store.features import Manifest
from tests import SOURCE_PATH

HEAVY = ("torch", "transformers", "av", "matplotlib", "cv2", "PIL", "gradio")

CHAT = "--model {d} --video {f} --query What? --clip {d}"
GROUNDING = "grounding --model {d} --data {data} --store {store}"
TRAJECTORIES = GROUNDING.replace("grounding", "trajectories")
CAPTIONING = GROUNDING.replace("grounding", "captioning")
QA = GROUNDING.replace("grounding", "qa --benchmark msvd_qa")
GROUND = "--video {f} --output {new}"
SPATIAL = "spatial --benchmark hc_stvg --predictions {new}/p.jsonl --ground-truth {f} --clip {d}"
ALL = f"{GROUNDING.replace('grounding', 'all')} --output {{new}}"
IMPORT = "import {d} {new} --split stage2"
ANNOTATION = "--captions {f} --videos {d} --output {new}/out.jsonl"
ENCODE = "--data {data} --store {new} --clip {d}"
TRAIN = "--data {data} --store {store} --llm {d} --output {new}"

COMMANDS: dict[str, tuple[str, ...]] = {
    "pite.chat": (
        f"{CHAT} --model {{none}}",
        f"{CHAT} --model {{run}}",
        f"{CHAT} --video {{none}}",
        f"{CHAT} --clip {{none}}",
        f"{CHAT} --adapter {{none}}",
        f"{CHAT} --trajectory {{f}}/new/overlay.mp4",
    ),
    "pite.ground": (
        f"{GROUND} --answer Dogs. --video {{none}}",
        f"{GROUND} --answer Dogs. --detector {{none}}",
        f"{GROUND} --answer Dogs. --stanza {{none}}",
        f"{GROUND} --answer Dogs. --output {{f}}/new",
        f"{GROUND} --query What? --model {{d}} --clip {{none}}/x/y",
    ),
    "pite.web": (
        "--model {none}",
        "--model {run}",
        "--demo {none}",
        "--model {d} --clip {none}",
        "--model {d} --clip {d} --examples {none}",
        "--model {d} --clip {d} --ground --detector {none}",
    ),
    "pite.evaluate": (
        f"{GROUNDING} --model {{none}}",
        f"{GROUNDING} --model {{run}}",
        f"{GROUNDING} --data {{none}}",
        f"{GROUNDING} --data {{d}}",
        f"{GROUNDING} --store {{none}}",
        f"{GROUNDING} --store {{d}}",
        f"{GROUNDING} --ground-truth {{none}}",
        f"{GROUNDING} --predictions {{f}}/new/p.jsonl",
        f"{GROUNDING} --predictions {{d}}",
        f"{GROUNDING} --metrics {{f}}/new/s.json",
        "grounding --predictions {none} --ground-truth {f}",
        "grounding --predictions {f} --ground-truth {none}",
        f"{GROUNDING} --histogram {{f}}/new/h.png",
        f"{GROUNDING} --timeline {{f}}/new/t.png",
        f"{CAPTIONING} --data {{none}}",
        f"{CAPTIONING} --ground-truth {{f}} {{none}}",
        "captioning --predictions {none} --ground-truth {f}",
        f"{QA} --store {{none}}",
        f"{QA} --data {{d}}",
        f"{QA} --video-names {{none}} --ground-truth {{f}}",
        f"{QA} --judge-model {{none}} --predictions {{new}}/p.jsonl --ground-truth {{f}}",
        "qa --benchmark msvd_qa --predictions {none} --ground-truth {f}",
        "spatial --benchmark hc_stvg --predictions {f} --ground-truth {none}",
        "spatial --benchmark hc_stvg --predictions {none} --ground-truth {f}",
        "spatial --benchmark hc_stvg --predictions {f} --ground-truth {f} --questions {none}",
        "spatial --benchmark vidstg --predictions {f} --ground-truth {f} --vidor {none}",
        f"{SPATIAL} --model {{none}} --videos {{d}}",
        f"{SPATIAL} --model {{d}} --videos {{none}}",
        f"{SPATIAL} --model {{d}} --videos {{d}} --detector {{none}}",
        f"{ALL} --model {{none}}",
        f"{ALL} --data {{none}}",
        f"{ALL} --data {{d}}",
        f"{ALL} --store {{none}}",
        f"{ALL} --output {{f}}",
        f"{TRAJECTORIES} --model {{none}}",
        f"{TRAJECTORIES} --data {{none}}",
        f"{TRAJECTORIES} --data {{d}}",
        f"{TRAJECTORIES} --store {{d}}",
    ),
    "pite.export": (
        "--model {none} --output {new}",
        "--output {new} --model {run}",
        "--model {d} --output {f}/new",
        "--model {d} --output {new} --scores {none}",
    ),
    "dataloaders.store": (
        "inspect {none}",
        "verify {none}",
        "merge {new} {none}",
        f"{IMPORT.replace('{d}', '{none}')} --encoder x",
        f"{IMPORT} --encoder x --data {{none}}",
        f"{IMPORT} --like {{none}}",
        "failures {none}",
    ),
    "dataloaders.annotation": (
        f"{ANNOTATION} --captions {{none}}",
        f"{ANNOTATION} --videos {{none}}",
        f"{ANNOTATION} --stanza {{none}}",
        f"{ANNOTATION} --detector {{none}}",
        f"{ANNOTATION} --detector {{d}} --segmenter {{none}}",
        f"{ANNOTATION} --output {{f}}/new.jsonl",
        f"{ANNOTATION} --work {{f}}/new",
    ),
    "dataloaders.transcripts": (
        "--videos {none} --output {new}",
        "--videos {f} --output {new} --model {none}",
        "--videos {f} --output {new} --tagger {none}",
        "--videos {f} --output {f}/new",
    ),
    "dataloaders.synthetic": ("{f}/new",),
    "engine.tiny": ("{f}/new",),
    "engine.plots": ("{none}", "{d}", "{f} --output {f}/new/losses.png"),
    "engine.demo": ("--output {f}/new",),
    "engine.demo.real": ("--output {f}/new",),
    "engine": tuple(f"chat {CHAT} {more}" for more in ("--model {none}", "--video {none}")),
    "engine.encode": (
        f"{ENCODE} --data {{none}}",
        f"{ENCODE} --store {{f}}",
        f"{ENCODE} --clip {{none}}",
    ),
    "engine.budget": ("--data {none}", "--config {none}.yaml"),
    "engine.train": (
        f"{TRAIN} --data {{none}}",
        f"{TRAIN} --store {{none}}",
        f"{TRAIN} --llm {{none}}",
        f"{TRAIN} --stage 2 --init {{none}}",
        f"{TRAIN} --stage 2",
        f"{TRAIN} --held-out {{none}}",
        f"{TRAIN} --output {{f}}/new",
    ),
}
"""Command -> argument lists with one path that does not exist or cannot be made. {none} does not exist, {new} can be
made, {f} is a file, {d} a folder, {run} a training run's folder, which is no model."""

SUBCOMMANDS = {"pite.evaluate": "trajectories", "dataloaders.store": "merge", "engine": "chat"}

RUN = """
import contextlib, importlib, io, json, sys
name, heavy, lines = sys.argv[1:]
main, answers = importlib.import_module(name).main, []
for argv in json.loads(lines):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as end:
            status = end.code or 0
    imported = [module for module in heavy.split() if module in sys.modules]
    answers.append((status, out.getvalue(), err.getvalue(), imported))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quick")
    places = {name: root / name for name in ("none", "new", "f", "d", "run", "data", "store")}
    places["f"].touch()
    places["d"].mkdir()
    (places["run"] / "stage1" / "final").mkdir(parents=True)
    (places["run"] / "stage1" / "final" / "lineage.json").touch()
    files = ("stage1/localized_narratives.jsonl", "stage2/pite_143k.jsonl", "stage3/valley.json")
    for name in (*files, "evaluation/pite_143k.jsonl", "evaluation/activitynet_captions.json"):
        (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "data" / name).touch()
    for kind in ("images", "videos"):
        (root / "store" / kind).mkdir(parents=True)
        (root / "store" / kind / "manifest.json").write_text(json.dumps(asdict(Manifest("e", 8, "s", "p", 8, 16))))
    return places


def answers(command: str, *lines: list[str]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of a command for each list of arguments, in one new process.

    None may have imported anything heavy.
    """
    module = command if (Path(*command.split(".")).with_suffix(".py")).exists() else f"{command}.__main__"
    done = subprocess.run(
        [sys.executable, "-c", RUN, module, " ".join(HEAVY), json.dumps(lines)],
        env={**os.environ, "PYTHONPATH": SOURCE_PATH},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    found = json.loads(done.stdout)
    for argv, (*_, imported) in zip(lines, found, strict=True):
        assert not imported, f"{command} {' '.join(argv)} imported {imported}"
    return [tuple(each[:3]) for each in found]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str) -> None:
    found = answers(command, ["--help"], *([[SUBCOMMANDS[command], "--help"]] if command in SUBCOMMANDS else []))
    assert all((status, err) == (0, "") for status, _, err in found)
    assert found[0][1].startswith("usage: ") and "--log-level" in found[-1][1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_typo(command: str) -> None:
    subcommand = [SUBCOMMANDS[command]] if command in SUBCOMMANDS else []
    ((status, out, err),) = answers(command, [*subcommand, "--log-levl", "info"])
    assert (status, out) == (2, "")
    assert err.endswith(": there is no flag --log-levl; did you mean --log-level?\n") and err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_does_not_exist(command: str, places: dict[str, Path]) -> None:
    lines = [[word.format_map(places) for word in line.split()] for line in COMMANDS[command]]
    for argv, (status, out, err) in zip(lines, answers(command, *lines), strict=True):
        assert status == (2 if "--config" in argv else 1) and not out, argv
        program = "pite.chat" if command == "engine" else command
        assert err.startswith(program) and err.count("\n") == 1, err
        given = [word for word in argv if word.startswith(str(places["none"].parent))]
        wrong = next((word for word in given if word.startswith(str(places["none"]))), given[-1])
        assert wrong in err, "the message names the path"
    assert not places["new"].exists() or not any(places["new"].iterdir()), "nothing was written"


def test_a_typo_is_printed_once_under_torchrun() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "dataloaders.annotation", "--captoins", "x"],
        env={**os.environ, "PYTHONPATH": SOURCE_PATH},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if "there is no flag" in line]
    assert lines == ["dataloaders.annotation: there is no flag --captoins; did you mean --captions?"]


def test_every_command_of_pite_is_in_the_table() -> None:
    from engine.__main__ import COMMANDS as modules

    assert {module.removesuffix(".__main__") for module, _ in modules.values()} <= COMMANDS.keys()
