"""The command line from a dataclass: every type, every error in one sentence, help from docstrings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from dataloaders.cli import flag, parse, run
from dataloaders.options import field_docs


@dataclass(frozen=True)
class Base:
    """Settings that two commands share."""

    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class Config(Base):
    """Train a small thing."""

    data: Path = field(kw_only=True)
    """Data folder,
    as documented."""
    stage: Literal[1, 2, "all"] = "all"
    """Stage, or all of them at 100% each."""
    learning_rate: float = 1e-4
    resume: bool = True
    """Continue where a run stopped."""
    name: str | None = None
    device: Literal["cpu", "cuda"] | None = None
    limits: tuple[int, ...] = ()
    size: tuple[int, int] = (224, 224)
    files: tuple[Path, ...] | None = None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"--learning-rate must be positive, not {self.learning_rate}")


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(Config, argv, prog="train")
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("train: ") and message.count("\n") == 1, "one sentence, no usage dump"
    return message


def test_defaults_and_required() -> None:
    config = parse(Config, ["--data", "d"])
    assert config == Config(data=Path("d"))


def test_every_type() -> None:
    argv = [
        "--data",
        "d",
        "--stage",
        "2",
        "--learning-rate",
        "3e-4",
        "--no-resume",
        "--name",
        "x",
        "--device",
        "cuda",
        "--limits",
        "1",
        "2",
        "3",
    ]
    config = parse(Config, [*argv, "--size", "336", "448", "--files", "a", "b", "--seed=-7"])
    assert config == Config(
        seed=-7,
        data=Path("d"),
        stage=2,
        learning_rate=3e-4,
        resume=False,
        name="x",
        device="cuda",
        limits=(1, 2, 3),
        size=(336, 448),
        files=(Path("a"), Path("b")),
    )
    assert type(config.stage) is int


def test_none_for_optional() -> None:
    config = parse(Config, ["--data", "d", "--name", "none", "--device", "none"])
    assert config.name is None and config.device is None


def test_unknown_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    # The typo is reported, not the required flag that is missing because of it.
    assert refusal(capsys, "--dta", "d") == "train: there is no flag --dta; did you mean --data?\n"
    assert "did you mean --no-resume?" in refusal(capsys, "--data", "d", "--no-resum")
    assert "--zzz; see --help" in refusal(capsys, "--data", "d", "--zzz=3")
    assert "unexpected argument 'stray'" in refusal(capsys, "--data", "d", "stray")


def test_abbreviations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no flag --learning; " in refusal(capsys, "--data", "d", "--learning", "1")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seed", "1.5"], ["--seed", "'1.5'", "a whole number"]),
        (["--learning-rate", "fast"], ["--learning-rate", "'fast'", "a number"]),
        (["--stage", "4"], ["--stage", "'4'", "1, 2, all"]),
        (["--device", "tpu"], ["--device", "'tpu'", "give cpu, cuda\n"]),
        (["--size", "1"], ["--size", "2"]),
        (["--seed"], ["--seed"]),
        (["--learning-rate", "0"], ["--learning-rate must be positive, not 0.0"]),
    ],
)
def test_bad_values(capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    message = refusal(capsys, "--data", "d", *argv)
    assert all(word in message for word in words), message


def test_missing_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys) == "train: --data must be given; see --help\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Config, ["--help"], prog="train")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Train a small thing.",
        "--data PATH Data folder, as documented. (required)",
        "--stage {1,2,all} Stage, or all of them at 100% each. (default: all)",
        "--resume, --no-resume Continue where a run stopped. (default: yes)",
        "--size INT INT (default: 224 224)",
        "--seed INT Seed of everything random. (default: 0)",
    ):
        assert words in text, text


def test_the_usage_shows_what_must_be_given_without_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    for cls, usage in (
        (Config, "[-h] --data PATH [--stage"),
        (Merge, "[-h] [--shards INT] [--config FILE] OUTPUT STORES [STORES ...]"),
    ):
        with pytest.raises(SystemExit):
            parse(cls, ["--help"], prog="train")
        assert usage in " ".join(capsys.readouterr().out.split())
    # Several missing flags are still reported together.
    with pytest.raises(SystemExit):
        parse(Merge, [], prog="merge")
    assert capsys.readouterr().err == "merge: OUTPUT and STORES must be given; see --help\n"


def test_an_error_names_the_module_and_the_help_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], prog="python -m engine.train")
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m engine.train ")
    assert text.index("--files") < text.index("--seed"), "flags of a base class come last"
    with pytest.raises(SystemExit):
        parse(Config, [], prog="python -m engine.train")
    assert capsys.readouterr().err == "engine.train: --data must be given; see --help\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("a is missing"), "a is missing"),
        (MemoryError(), "MemoryError"),
        (OSError(28, "No space"), "No space"),
    ],
)
def test_run_prints_errors_of_users(error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise error

    assert run("pite.chat", fail) == 1
    assert capsys.readouterr().err == f"pite.chat: {sentence}\n"


def test_run_returns_the_status_and_raises_faults_of_ours() -> None:
    assert (run("p", lambda: 1), run("p", lambda: None)) == (1, 0)
    with pytest.raises(KeyError):
        run("p", lambda: {}["x"])


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Merge stores."""

    output: Path = flag(positional=True)
    stores: tuple[Path, ...] = flag(positional=True)
    shards: int = 1


@pytest.mark.parametrize("at", range(4))
def test_flags_stand_anywhere_between_positional_arguments(at: int) -> None:
    argv = ["o", "a", "b"]
    argv[at:at] = ["--shards", "2"]
    assert parse(Merge, argv, prog="merge") == Merge(output=Path("o"), stores=(Path("a"), Path("b")), shards=2)


def test_missing_positional_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Merge, ["o", "--shards", "2"], prog="merge")
    assert capsys.readouterr().err == "merge: STORES must be given; see --help\n"


def test_field_docs() -> None:
    assert field_docs(Config)["seed"] == "Seed of everything random."
    assert "name" not in field_docs(Config)
