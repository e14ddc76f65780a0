"""Files of settings: YAML and TOML, flat or in groups; each error names the file and the setting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from dataloaders.cli import dump, flag, parse, parse_command
from dataloaders.settings import write_settings


@dataclass(frozen=True)
class Inner:
    """numbers of the model"""

    size: Literal["7b", "13b"] = flag("7b", name="model")
    """size"""
    shape: tuple[int, int] = (2, 3)
    init: bool = True
    name: str | None = None


@dataclass(frozen=True)
class Another:
    """another group"""

    another: int = 0


@dataclass(frozen=True)
class Outer:
    """Do something."""

    model: Inner = Inner()
    other: Another = Another()
    learning_rate: float = 1e-4
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Other:
    """Do something else with FILE."""

    file: Path = flag(positional=True)
    """a file"""
    more: tuple[Path, ...] = flag((), positional=True)


GROUPED = "model:\n  model: 13b\n  shape: [4, 5]\n  init: false\n  name: null\nlearning_rate: 1e-3\nfiles: [a, b]\n"
FLAT = 'model = "13b"\nshape = [4, 5]\ninit = false\nlearning-rate = 1e-3\nfiles = ["a", "b"]\n'
EXPECTED = Outer(Inner("13b", (4, 5), False), learning_rate=1e-3, files=(Path("a"), Path("b")))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(Outer, argv, prog="train")
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("train: ") and text.count("\n") == 1
    return text


@pytest.mark.parametrize("file, text", [("c.yaml", GROUPED), ("c.toml", FLAT)])
def test_flat_and_grouped_files_give_the_flags_values(tmp_path: Path, file: str, text: str):
    assert parse(Outer, ["--config", write(tmp_path / file, text)]) == EXPECTED


@pytest.mark.parametrize(
    "file, text",
    [("c.yaml", "model:\nother: {}\nlearning_rate: 1e-3\n"), ("c.toml", "learning_rate = 1e-3\n[model]\n")],
)
def test_an_empty_group_changes_nothing(tmp_path: Path, file: str, text: str):
    assert parse(Outer, ["--config", write(tmp_path / file, text)]) == Outer(learning_rate=1e-3)


def test_the_command_line_overrides_the_file(tmp_path: Path):
    path = write(tmp_path / "c.yaml", GROUPED)
    config = parse(Outer, ["--model", "7b", "--config", path, "--files", "c", "--init"])
    assert config == Outer(Inner("7b", (4, 5), True), learning_rate=1e-3, files=(Path("c"),))


def test_what_is_written_is_read_again(tmp_path: Path):
    write_settings(tmp_path / "c.yaml", dump(EXPECTED))
    assert parse(Outer, ["--config", str(tmp_path / "c.yaml")]) == EXPECTED


@pytest.mark.parametrize(
    "file, text, words",
    [
        ("c.yaml", "learning_rte: 1", ["there is no setting 'learning-rte'; did you mean 'learning-rate'?"]),
        ("c.yaml", "modl: {shape: [4, 5]}", ["there is no setting 'modl'; did you mean 'model'?"]),
        ("c.yaml", "model: {learning_rate: 1}", ["learning-rate is no setting of the group 'model': write it outside"]),
        ("c.yaml", "other: {shape: [4, 5]}", ["shape is no setting of the group 'other': write it under 'model'"]),
        ("c.yaml", "learning_rate: fast", ["learning-rate: 'fast' is not accepted; give a number"]),
        ("c.yaml", "init: 1", ["init: 1 is not accepted; give true or false"]),
        ("c.yaml", "shape: [1]", ["shape: [1] is not accepted; give 2 values"]),
        ("c.yaml", "learning_rate: true", ["learning-rate: True is not accepted"]),
        ("c.yaml", "model: 8b", ["model: '8b' is not accepted; give 7b, 13b\n"]),
        ("c.yaml", "a: [", ["is not YAML"]),
        ("c.yaml", "- a", ["not a list"]),
        ("c.toml", "a = ", ["is not TOML"]),
        ("c.json", "{}", ["ends in .yaml, .yml or .toml"]),
    ],
)
def test_each_error_names_file_and_setting(tmp_path: Path, capsys, file: str, text: str, words: list[str]):
    message = refusal(capsys, "--config", write(tmp_path / file, text))
    assert all(word in message for word in [file, *words]), message


def test_a_missing_file_is_named(tmp_path: Path, capsys):
    for path, why in ((tmp_path / "nowhere.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        assert refusal(capsys, "--config", str(path)) == f"train: --config {path} cannot be read: {why}\n"
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    assert "it is not a text file in UTF-8" in refusal(capsys, "--config", f"{tmp_path}/c.yaml")


def test_groups_are_titles_of_the_help(capsys):
    with pytest.raises(SystemExit):
        parse(Outer, ["--help"], prog="train")
    text = capsys.readouterr().out
    assert "model:\n  numbers of the model\n" in text
    assert "--model {7b,13b}" in text and "--config FILE" in text


def test_commands_have_flags_of_their_own_and_positional_arguments(capsys):
    commands = {"one": Outer, "two": Other}
    assert parse_command(commands, ["two", "a", "b", "c"]) == Other(Path("a"), (Path("b"), Path("c")))
    assert parse_command(commands, ["two", "a"]) == Other(Path("a"))
    assert parse_command(commands, ["one", "--files", "a", "--files", "b", "c"]).files == tuple(map(Path, "abc"))
    for argv, words in (
        (["two"], "tool two: FILE must be given"),
        (["three"], "tool: there is no command 'three'; give one, two"),
        (["one", "--modl", "7b"], "tool one: there is no flag --modl; did you mean --model?"),
    ):
        with pytest.raises(SystemExit) as ended:
            parse_command(commands, argv, prog="tool")
        assert ended.value.code == 2
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        parse_command(commands, ["--help"], prog="tool")
    assert ended.value.code == 0
    assert "two            Do something else with FILE." in capsys.readouterr().out
