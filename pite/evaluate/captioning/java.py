"""METEOR and the PTB tokenizer: Java programs inside pycocoevalcap's wheel.

pycocoevalcap 1.2 has Python classes that start them. They are not used: its tokenizer writes into its own folder, which
may be read-only, and prints on stderr; and after METEOR's process has died, deleting its `Meteor` waits for ever. The
programs, their flags and their line protocol are the same here, so the scores are too (`tests/pite/evaluate/captioning`).
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

PUNCTUATION = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:;-", "--", "..."))
"""Tokens that pycocoevalcap removes. It compares them with lower-cased ones, so brackets stay."""

Pair = tuple[str, str]
"""A tokenized hypothesis and its tokenized reference."""


def package() -> Path:
    """pycocoevalcap's folder. Raises ValueError with the remedy if it or Java is not installed."""
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise ValueError("dense captioning is scored with pycocoevalcap: pip install 'pite-engine[evaluate]'")
    if shutil.which("java") is None:
        raise ValueError(
            "dense captioning is scored with METEOR, which needs Java: install it, such as with "
            "apt-get install default-jre-headless"
        )
    return Path(next(iter(found.submodule_search_locations)))


def tokenize(sentences: Iterable[str]) -> dict[str, str]:
    """Sentence -> its lower-cased PTB tokens without punctuation, joined by spaces, in one run of the tokenizer.

    A character outside ASCII counts as a space, as in the published evaluation.
    """
    plain = {each: " ".join("".join(c if c.isascii() else " " for c in each).split()) for each in sentences}
    lines = list(dict.fromkeys(text for text in plain.values() if text))
    jar = package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input="".join(f"{line}\n" for line in lines), capture_output=True, text=True)
    tokens = done.stdout.splitlines()
    if done.returncode or len(tokens) != len(lines):
        raise _died("the PTB tokenizer", done.stderr)
    of = {line: " ".join(w for w in found.split() if w not in PUNCTUATION) for line, found in zip(lines, tokens)}
    return {each: of.get(text, "") for each, text in plain.items()}


class Meteor:
    """METEOR 1.5 in one Java process, in a context. Statistics of a pair are computed once.

    Raises ValueError in one sentence if the process ends early.
    """

    def __init__(self) -> None:
        folder = package() / "meteor"
        command = ["java", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
        # A pipe that is not read blocks the process when it is full; a file does not.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in __exit__
        self._process = subprocess.Popen(
            command, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        self._statistics: dict[Pair, str] = {}

    def scores(self, pairs: Sequence[Pair]) -> tuple[list[float], float]:
        """METEOR (0..1) of each pair, and that of all pairs together, which is not their mean."""
        if not pairs:
            return [], 0.0
        self._write(" ||| ".join(["EVAL", *map(self._statistics_of, pairs)]))
        *each, all_pairs = (float(self._read()) for _ in range(len(pairs) + 1))
        return each, all_pairs

    def _statistics_of(self, pair: Pair) -> str:
        if pair not in self._statistics:
            hypothesis, reference = (" ".join(text.replace("|||", " ").split()) for text in pair)
            self._write(f"SCORE ||| {reference} ||| {hypothesis}")
            self._statistics[pair] = self._read()
        return self._statistics[pair]

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None, "a pipe"
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None

    def _read(self) -> str:
        assert self._process.stdout is not None, "a pipe"
        line = self._process.stdout.readline().strip()
        if not line:
            raise self._death()
        return line

    def _death(self) -> ValueError:
        self._process.kill()
        self._process.wait()
        self._errors.seek(0)
        return _died("METEOR", self._errors.read())

    def __enter__(self) -> Meteor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        # Closes the pipes too; what they still hold is not wanted.
        self._process.communicate()
        self._errors.close()


def _died(name: str, errors: str) -> ValueError:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    reason = f" ({lines[-1][:160]})" if lines else ""
    return ValueError(
        f"the Java process of {name} ended early{reason}: check that java -version works and 2 GB of memory are free"
    )
