"""Paths of a command line: each error names the flag and the path, and a trial leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dataloaders.paths import distinct_files, input_file, input_folder, model, output_file, output_folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the file `f` and the folder `d`."""
    (tmp_path / "f").write_text("content")
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("check", "path", "sentence"),
    [
        (model, "none", "--x none is neither a directory nor a Hugging Face model name (owner/name)"),
        (input_file, "none", "--x none: no such file"),
        (input_file, "d", "--x d: this is a folder, not a file"),
        (input_folder, "none", "--x none: no such folder"),
        (input_folder, "f", "--x f: this is a file, not a folder"),
        (output_file, "d", "--x d: this is a folder, not a file"),
        (output_file, "f/new/p.jsonl", "--x f/new/p.jsonl cannot be written: {here}/f is a file, not a folder"),
        (output_file, "f/p.jsonl", "--x f/p.jsonl cannot be written: f is a file, not a folder"),
        (output_file, "/proc/none/p.jsonl", "--x /proc/none/p.jsonl cannot be written: "),
        (output_folder, "f/new", "--x f/new: {here}/f is a file, not a folder"),
        (output_folder, "/proc/new", "--x /proc/new cannot be written: /proc: "),
        (output_folder, "f", "--x f: this is a file, not a folder"),
    ],
)
def test_unusable_paths(here: Path, check: Callable[[str, Path], None], path: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        check("--x", Path(path))
    assert str(caught.value).startswith(sentence.replace("{here}", str(here)))


def test_usable_paths(here: Path) -> None:
    for check in (model, input_file, input_folder, output_file):
        check("--x", None)
    model("--x", "owner/name")
    model("--x", Path("d"))
    output_file("--x", Path("/dev/null"))
    input_file("--x", Path("f"))
    input_folder("--x", Path("d"))
    output_folder("--x", Path("d/new/folder"))
    output_file("--x", Path("f"))
    output_file("--x", Path("e/new.jsonl"))
    assert Path("f").read_text() == "content"
    assert sorted(str(path.relative_to(here)) for path in here.rglob("*")) == ["d", "e", "f"]


def test_a_file_is_not_read_and_written(here: Path) -> None:
    (here / "link").symlink_to(here / "f")
    (here / "hard").hardlink_to(here / "f")
    for path in ("f", "d/../f", "link", "hard"):
        with pytest.raises(ValueError, match=f"^--out {path}: --in names the same file, which would be lost"):
            distinct_files({"--out": Path(path)}, {"--other": None, "--in": Path("f")})
    with pytest.raises(ValueError, match=r"^--second new: --first names the same file"):
        distinct_files({"--first": Path("new"), "--second": Path("new")}, {})
    distinct_files({"--out": Path("new"), "--none": None}, {"--in": Path("f"), "--folder": Path("d")})
