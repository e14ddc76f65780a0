"""Words that plain technical English does without: things do not speak, ask or know (CONTRIBUTING.md)."""

from __future__ import annotations

import re
import subprocess

from tests.test_arrows import ROOT

WORDS = re.compile(
    r"\b(beside|tells?|told|says?|said|asks?|asked|whoever|nobody|knows? of|speaks?|spoken|at hand|deaf|serves?|served)\b",
    re.IGNORECASE,
)
ALLOWED = {
    "dataloaders/annotation/record.py": {"tell", "told"},  # question templates, which are training data
}
"""File -> words that may stand in it."""
THIS = "tests/test_language.py"
SUFFIXES = (".py", ".md", ".cpp", ".h", ".toml", ".yml")


def test_odd_words_are_gone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [file for file in listed.splitlines() if file.endswith(SUFFIXES) and file != THIS]
    assert files
    found = {
        f"{file}: {match.group()}"
        for file in files
        for match in WORDS.finditer((ROOT / file).read_text())
        if match.group().lower() not in ALLOWED.get(file, ())
    }
    assert not found
