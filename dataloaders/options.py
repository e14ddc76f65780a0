"""The fields of a dataclass as settings: their names, their help, and the conversion of text and of a file's values."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dataloaders.settings import read_settings

MISSING = object()
"""The default of a setting that must be given."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A leaf field: its name on the command line and in files, and the conversion of a value."""

    field: dataclasses.Field[Any]
    hint: Any
    optional: bool
    doc: str

    @property
    def name(self) -> str:
        return flag_of(self.field).removeprefix("--")

    @property
    def positional(self) -> bool:
        return bool(self.field.metadata.get("positional"))

    @property
    def items(self) -> tuple[Any, int | None]:
        """The type of an item, and the number of items of a tuple: 0 for any number, None for no tuple."""
        if get_origin(self.hint) is not tuple:
            return self.hint, None
        items = get_args(self.hint)
        return items[0], 0 if items[-1] is Ellipsis else len(items)


def settings_of(cls: type) -> Iterator[tuple[str | None, type, Setting]]:
    """(Name of the group, its class, setting) for each leaf field; the group is None for a field of `cls` itself."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    # The flags of a base class, which several commands share, come after the command's own.
    depth = {name: i for i, base in reversed([*enumerate(cls.__mro__)]) for name in inspect.get_annotations(base)}
    for f in sorted(dataclasses.fields(cls), key=lambda f: depth[f.name]):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from ((f.name, hints[f.name], setting) for _, _, setting in settings_of(hints[f.name]))
        elif f.init:
            hint, optional = _strip_optional(hints[f.name])
            yield None, cls, Setting(f, hint, optional, docs.get(f.name, ""))


def from_file(path: Path, settings: Sequence[tuple[str | None, type, Setting]]) -> dict[str, Any]:
    """The values of a file of settings. Raises ValueError, naming file and setting."""
    groups = {setting.name: group for group, _, setting in settings}
    by_name = {setting.name: setting for _, _, setting in settings}
    titles = {group for group in groups.values() if group is not None}
    values: dict[str, Any] = {}
    for group, name, value in read_settings(path, titles):
        if name not in by_name:
            close = difflib.get_close_matches(name, [*by_name, *titles], n=1)
            raise ValueError(
                f"{path}: there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        if group is not None and group != groups[name]:
            place = f"under {groups[name]!r}" if groups[name] else "outside of the groups"
            raise ValueError(f"{path}: {name} is no setting of the group {group!r}: write it {place}")
        try:
            values[name] = _convert(by_name[name], value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return values


def _convert(setting: Setting, value: Any) -> Any:
    """A file's value as the command line would give it."""
    item, count = setting.items
    if value is None and setting.optional:
        return None
    if item is bool:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{value!r} is not accepted; give true or false")
        return value
    convert = partial(_from_text, *converter(item, setting.optional)[:1])
    if count is None:
        return convert(value)
    items = value if isinstance(value, list) else [value]
    if count and len(items) != count:
        raise argparse.ArgumentTypeError(f"{value!r} is not accepted; give {count} values")
    return tuple(map(convert, items))


def _from_text(convert: Callable[[str], Any], value: Any) -> Any:
    # YAML reads 1e-4 as a text and 3 as a number: both have the form that the command line accepts.
    if isinstance(value, bool | list | dict) or value is None:
        raise argparse.ArgumentTypeError(f"{value!r} is not accepted; give a text or a number")
    return convert(str(value))


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [a for a in get_args(hint) if a is not type(None)]
        assert len(kinds) == 1, f"a flag cannot be {hint}"
        return kinds[0], len(kinds) < len(get_args(hint))
    return hint, False


def converter(hint: Any, optional: bool) -> tuple[Callable[[str], Any], str]:
    """The conversion of text to a value, and the placeholder in the help. Errors name what is accepted.

    An optional value can be given as `none` too, which takes back a file's value. No message offers it, because it means
    the same as leaving the flag out.
    """
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
        accepted = ", ".join(choices)
        metavar = "{" + ",".join(choices) + "}"
        convert: Callable[[str], Any] = choices.__getitem__
    else:
        assert hint in (str, int, float, Path), f"a flag cannot be {hint}"
        metavar = {str: "TEXT", int: "INT", float: "NUMBER", Path: "PATH"}[hint]
        accepted = {str: "a text", int: "a whole number", float: "a number", Path: "a path"}[hint]
        convert = hint

    def checked(text: str) -> Any:
        if optional and text == "none":
            return None
        try:
            return convert(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give {accepted}") from None

    return checked, metavar


def field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal under the field, for a class and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:]):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = inspect.cleandoc(following.value.value)
    return docs


def flag_of(f: dataclasses.Field[Any]) -> str:
    return "--" + (f.metadata.get("flag") or f.name).replace("_", "-")


def written(setting: Setting) -> str:
    """How a setting is written on the command line: its flag, or the placeholder of a positional argument."""
    return setting.name.replace("-", "_").upper() if setting.positional else f"--{setting.name}"


def default_of(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return MISSING if f.default is dataclasses.MISSING else f.default


def text_of(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(text_of, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def first_line(doc: str | None) -> str:
    return inspect.cleandoc(doc or "").partition("\n")[0]
