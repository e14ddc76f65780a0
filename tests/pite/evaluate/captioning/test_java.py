"""METEOR and the PTB tokenizer give what pycocoevalcap's own classes give, once per pair, and end in one sentence."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from pite.evaluate.captioning import java

needs_java = pytest.mark.skipif(
    shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
    reason="Java or pycocoevalcap is not installed",
)

SENTENCES = [
    'A "dog" (brown) runs -- he can\'t stop!',
    "The café's 4.5 km; the U.S. [team] wins...",
    "A man\nruns\r\nalong\x0b the\u2028beach | and ||| back",
    "?!",
    "",
    "日本",
    "the dogs are running quickly",
]


@needs_java
def test_tokens_are_those_of_pycocoevalcap() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    plain = {s: " ".join("".join(c if ord(c) < 128 else " " for c in s).split()) for s in SENTENCES}
    expected = PTBTokenizer().tokenize({s: [{"caption": text}] for s, text in plain.items()})
    assert java.tokenize(SENTENCES) == {s: expected[s][0] for s in SENTENCES}
    assert java.tokenize([]) == {}


class Running:
    """In place of a process of pycocoevalcap: one of ours, in bytes, which it cannot end."""

    def __init__(self, process: subprocess.Popen[str], command: list[str], cwd: str, **_: object) -> None:
        assert isinstance(process.args, list) and sorted(command) == sorted(process.args)
        assert Path(cwd) == java.package() / "meteor"
        assert process.stdin is not None and process.stdout is not None
        self.write, self.flush, self.stdout = (
            process.stdin.buffer.write,
            process.stdin.buffer.flush,
            process.stdout.buffer,
        )
        self.stdin = self
        self.close = self.kill = self.wait = lambda: None


@needs_java
def test_scores_are_those_of_pycocoevalcap(
    meteor: java.Meteor, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    tokens = list(java.tokenize(SENTENCES).values())
    pairs = [(one, other) for one in tokens for other in tokens]
    meteor._statistics.clear()
    each, all_pairs = meteor.scores(pairs)
    assert meteor.scores(pairs[:3])[0] == each[:3] and meteor.scores([]) == ([], 0.0)
    assert len(meteor._statistics) == len(set(pairs))
    # Its class starts the same command, so it can use the process that runs already.
    monkeypatch.setattr("subprocess.Popen", partial(Running, meteor._process))
    hypotheses, references = ({i: [pair[k]] for i, pair in enumerate(pairs)} for k in (0, 1))
    expected, expected_each = Meteor().compute_score(references, hypotheses)
    assert (each, all_pairs) == (expected_each, expected)
    assert max(each) > 0.9 and min(each) == 0.0
    assert capfd.readouterr().out == ""


@needs_java
def test_a_process_that_dies_is_one_sentence() -> None:
    with java.Meteor() as meteor:
        meteor._process.kill()
        meteor._process.wait()
        with pytest.raises(
            ValueError, match=r"^the Java process of METEOR ended early: check that java -version works"
        ):
            meteor.scores([("a cat", "a dog")])


def fake(folder: Path, script: str) -> None:
    """A program `java` in `folder`, and an empty pycocoevalcap."""
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    (folder / "pycocoevalcap" / "meteor").mkdir(parents=True)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Could not reserve enough space' >&2; exit 1", r" \(Could not reserve enough space\)"),
        ("exit 1", ""),
        ("cat > /dev/null", ""),
    ],
)
def test_a_java_that_does_not_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    fake(tmp_path, script)
    monkeypatch.setattr(java, "package", lambda: tmp_path / "pycocoevalcap")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match=rf"^the Java process of the PTB tokenizer ended early{reason}: check that"):
        java.tokenize(["A dog."])
    if script != "cat > /dev/null":
        with (
            java.Meteor() as meteor,
            pytest.raises(ValueError, match=rf"^the Java process of METEOR ended early{reason}: check that java"),
        ):
            meteor.scores([("a dog", "a dog")])


def test_what_is_not_installed_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'pite-engine\[evaluate\]'"):
        java.package()
    monkeypatch.undo()
    (tmp_path / "pycocoevalcap").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="METEOR, which needs Java: install it"):
        java.package()
