"""Files of settings: YAML or TOML, flat or in groups."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dataloaders.errors import reason
from dataloaders.files import write_if_changed


def read_settings(path: Path, groups: Collection[str] = ()) -> Iterator[tuple[str | None, str, Any]]:
    """(Group or None, name with hyphens, value) of each setting of a file.

    A table named as one of `groups` holds the settings of this group. Without a value, as in YAML's `model:`, the group is
    empty.

    Raises ValueError, naming the file, for another suffix than .yaml, .yml or .toml and for a file that is not a
    mapping of names to values or cannot be read.
    """
    for name, value in _load(path).items():
        if name in groups and (value is None or isinstance(value, Mapping)):
            yield from ((str(name), str(key).replace("_", "-"), each) for key, each in (value or {}).items())
        else:
            yield None, str(name).replace("_", "-"), value


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings, in groups or not, as YAML, unless the file holds them already."""
    import yaml

    write_if_changed(path, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def _load(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--config {path} cannot be read: it is not a text file in UTF-8") from None
    if path.suffix == ".toml":
        import tomllib

        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: a file of settings ends in .yaml, .yml or .toml")
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: a file of settings holds names with values, not a {type(values).__name__}")
    return values
