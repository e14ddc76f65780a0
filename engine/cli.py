"""A command line from a frozen dataclass: fields are flags, and their docstrings are the help.

It uses argparse, because users know its help; each of its errors is replaced by one sentence.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from engine.distributed.errors import print_error

T = TypeVar("T")

_MISSING = object()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print_error(self.prog, message)
        self.exit(2)


def parse(cls: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> T:
    """Build `cls` from command-line arguments, `sys.argv`'s by default.

    A field `num_frames: int = 100` becomes `--num-frames 100`; a string literal under a field is its help; a field
    without default is required; a bool has `--flag` and `--no-flag`; a tuple takes several values; an Optional takes
    `none` as well. Types: str, int, float, bool, Path, Literal, and Optional and tuple of those. An unknown flag, a bad
    value, a missing flag or a ValueError from `__post_init__` ends the process with status 2 after one sentence.
    """
    parser = _Parser(
        prog=prog or _module_name(),
        description=inspect.cleandoc(cls.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    hints, docs = get_type_hints(cls), field_docs(cls)
    fields = [f for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for f in fields:
        _add_flag(parser, f, hints[f.name], docs.get(f.name, ""))
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(unknown, list(parser._option_string_actions)))
    missing = [_flag(f.name) for f in fields if _default(f) is _MISSING and f.name not in known]
    if missing:
        parser.error(f"{' and '.join(missing)} must be given; see --help")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(known).items()}
    try:
        return cls(**values)
    except ValueError as error:
        parser.error(str(error))


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


def _add_flag(parser: argparse.ArgumentParser, f: dataclasses.Field[Any], hint: Any, doc: str) -> None:
    default = _default(f)
    shown = "required" if default is _MISSING else f"default: {_text(default)}"
    # argparse expands %-formats in help texts.
    options: dict[str, Any] = {"dest": f.name, "help": f"{doc} ({shown})".strip().replace("%", "%%")}
    hint, optional = _strip_optional(hint)
    if hint is bool:
        parser.add_argument(_flag(f.name), action=argparse.BooleanOptionalAction, **options)
        return
    if get_origin(hint) is tuple:
        items = get_args(hint)
        options["nargs"] = "+" if items[-1] is Ellipsis else len(items)
        hint = items[0]
    convert, metavar = _converter(hint, optional)
    parser.add_argument(_flag(f.name), type=convert, metavar=metavar, **options)


def _strip_optional(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [a for a in get_args(hint) if a is not type(None)]
        assert len(kinds) == 1, f"a flag cannot be {hint}"
        return kinds[0], len(kinds) < len(get_args(hint))
    return hint, False


def _converter(hint: Any, optional: bool) -> tuple[Callable[[str], Any], str]:
    """The conversion of text to a value, and the placeholder in the help. Errors name what is accepted."""
    if get_origin(hint) is Literal:
        choices = {str(choice): choice for choice in get_args(hint)}
        accepted = ", ".join([*choices, *["none"] * optional])
        metavar = "{" + ",".join(choices) + "}"
        convert: Callable[[str], Any] = choices.__getitem__
    else:
        assert hint in (str, int, float, Path), f"a flag cannot be {hint}"
        metavar = {str: "TEXT", int: "INT", float: "NUMBER", Path: "PATH"}[hint]
        accepted = {str: "a text", int: "a whole number", float: "a number", Path: "a path"}[hint]
        accepted += " or none" * optional
        convert = hint

    def checked(text: str) -> Any:
        if optional and text == "none":
            return None
        try:
            return convert(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted; give {accepted}") from None

    return checked, metavar


def _unknown(arguments: list[str], flags: list[str]) -> str:
    flag = next((a.partition("=")[0] for a in arguments if a.startswith("-")), None)
    if flag is None:
        return f"unexpected argument {arguments[0]!r}; see --help"
    close = difflib.get_close_matches(flag, flags, n=1)
    return f"there is no flag {flag}; " + (f"did you mean {close[0]}?" if close else "see --help")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return _MISSING if f.default is dataclasses.MISSING else f.default


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
