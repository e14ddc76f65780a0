"""The results folder of a session: session.json with the sections' states, and SECTION.json with the numbers of each.

Every write replaces a whole file, so a session that is killed leaves all that it had measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from dataloaders.files import read_json_object, write_atomically

SESSION = "session.json"

State = Literal["running", "done", "failed", "stopped", "not run"]
"""A section that is "running" in the file of a session that has ended was killed with it."""


class NotRun(Exception):
    """Raised by a section that cannot run here; the message is the reason."""


class Output:
    """The file of one section, written again at each change.

    about  fields of the header, such as the environment
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self._content: dict[str, Any] = dict(about)
        self.update()

    def update(self, **values: Any) -> None:
        """Set fields of the file."""
        self._content |= values
        write_atomically(self.path, json.dumps(self._content, indent=1) + "\n")

    def count_red(self, wrong: int) -> None:
        self.update(red=self._content.get("red", 0) + wrong)

    def add(self, records: Iterable[Mapping[str, Any]], key: str = "rows") -> None:
        """Append to a list of the file."""
        self.update(**{key: [*self._content.get(key, []), *records]})


class Session:
    """session.json: {"environment": {...}, "sections": {name: {"state", "seconds", "estimate", "problem", "red"}}}.

    red  number of wrong results, which do not end a section
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Continues the session in `folder`. Raises ValueError if it has another device or commit."""
        self.path = folder / SESSION
        self.sections: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            before = read_json_object(self.path)
            for key in ("device", "commit"):
                if before["environment"][key] != environment[key]:
                    raise ValueError(
                        f"{folder} has results of the {key} {before['environment'][key]}, and this is "
                        f"{environment[key]}: choose another folder with --results"
                    )
            self.sections = before["sections"]
        self.environment = dict(environment)

    def plan(self, sections: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the sections that will follow, so that those which a killed session does not reach are listed."""
        for name, about in sections.items():
            ahead = {"state": "not run", "problem": "the session ended before it", **about}
            self.sections[name] = {**ahead, **self.sections.get(name, {}), **about}
        self._write()

    def set(self, name: str, state: State, **values: Any) -> None:
        """Set the state of a planned section and what comes with it; earlier values are dropped."""
        about = {key: self.sections[name][key] for key in ("estimate", "measures")}
        self.sections[name] = {"state": state, **about, **values}
        self._write()

    def _write(self) -> None:
        content = {"environment": self.environment, "sections": self.sections}
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")
