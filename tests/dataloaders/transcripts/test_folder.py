"""Transcripts of --transcripts: the files of dataloaders.transcripts, text files, and folders without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from dataloaders.transcripts.files import Segment, write_transcript
from dataloaders.transcripts.folder import Transcripts
from pite.evaluate.__main__ import main


def test_json_is_preferred_and_each_file_is_read_once(tmp_path: Path) -> None:
    write_transcript(
        tmp_path / "a.json", Path(__file__), 2, "en", [Segment(0, 1, "Hello."), Segment(1, 2, "la", kept=False)]
    )
    (tmp_path / "a.txt").write_text("another text")
    (tmp_path / "b.txt").write_text(" Good day.\n")
    write_transcript(tmp_path / "silent.json", Path(__file__), 2, None, [])
    transcripts = Transcripts(tmp_path)
    assert transcripts.count(["a", "b", "silent", "c", "a"]) == (3, 4)
    texts = {video: transcripts.text(video) for video in ("a", "b", "silent", "c")}
    assert texts == {"a": "Hello.", "b": "Good day.", "silent": None, "c": None}
    (tmp_path / "a.json").unlink()
    assert transcripts.text("a") == "Hello."


def test_the_checksum_is_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello.")
    before = Transcripts(tmp_path).checksum()
    (tmp_path / ".settings.json").write_text("{}")
    (tmp_path / "failures.jsonl").write_text("{}")
    (tmp_path / "more.json").mkdir()
    assert Transcripts(tmp_path).checksum() == before
    (tmp_path / "notes.json").write_text("[no transcript")
    assert Transcripts(tmp_path).checksum() != before, "it is hashed, not read"
    (tmp_path / "notes.json").unlink()
    (tmp_path / "a.txt").write_text("Hallo.")
    assert Transcripts(tmp_path).checksum() != before


def test_a_folder_without_the_videos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Hello.")
    assert Transcripts(tmp_path).count(["b", "a"]) == (0, 2)
    with pytest.raises(ValueError, match=r"none of 2 videos has a file there, such as a\.json or \.txt"):
        Transcripts(tmp_path).check(["b", "a"])


def test_another_encoding_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
        Transcripts(tmp_path).text("a")


def test_transcripts_need_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["grounding", "--predictions", "p.jsonl", "--ground-truth", "g.json", "--transcripts", "."])
    assert "--transcripts needs --model" in capsys.readouterr().err
