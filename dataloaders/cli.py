"""A command line from frozen dataclasses: fields are flags, their docstrings are the help, groups are nested dataclasses.

It uses argparse, because users know its help; each of its errors is replaced by one sentence, printed once per job.
`--config FILE` reads flags from YAML or TOML. Nothing here imports torch, so `--help` and a typo are answered at once.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import socket
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from dataloaders.ranks import Ranks
from dataloaders.settings import read_settings

T = TypeVar("T")

_MISSING = object()

WAIT_SECONDS = 5.0
"""Seconds that other ranks wait for rank 0 to print an error and end the job."""


def flag(
    default: Any = dataclasses.MISSING, *, name: str | None = None, positional: bool = False, shown: str | None = None
) -> Any:
    """A field with another flag than its own name, or with none because it is positional.

    shown  the default in the help, where the value itself explains nothing
    """
    return dataclasses.field(default=default, metadata={"flag": name, "positional": positional, "shown": shown})


def at_least(config: object, least: int, *names: str) -> None:
    """For `__post_init__`: raise ValueError, naming the flag, if one of the named fields is less than `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            bound = f"at least {least}" if least else "0 or more"
            raise ValueError(f"--{name.replace('_', '-')} must be {bound}, not {value}")


def parse(cls: type[T], argv: Sequence[str] | None = None, prog: str | None = None) -> T:
    """Build `cls` from command-line arguments, `sys.argv`'s by default.

    A field `num_frames: int = 100` becomes `--num-frames 100`; a string literal under a field is its help; a field
    without default is required; a bool has `--flag` and `--no-flag`; a tuple takes several values, and one of any
    length may be repeated; an Optional takes `none` as well. A field whose type is a dataclass is a group of flags.
    Types: str, int, float, bool, Path, Literal, and Optional and tuple of those.

    `--config FILE` sets flags by name, in groups or not; the command line overrides the file. An unknown flag, a bad
    value, a missing flag or a ValueError from `__post_init__` ends the process with status 2 after one sentence.
    """
    prog = prog or _module_name()
    return _build(cls, _Parser(prog, cls.__doc__), argv)


def parse_command(
    commands: Mapping[str, type[T]], argv: Sequence[str] | None = None, prog: str | None = None, about: str = ""
) -> T:
    """Like `parse`, for a command whose first argument selects one of several dataclasses."""
    prog = prog or _module_name()
    name, *rest = (list(sys.argv[1:]) if argv is None else list(argv)) or ["--help"]
    if name in commands:
        cls = commands[name]
        return _build(cls, _Parser(f"{prog} {name}", cls.__doc__), rest)
    lines = [f"  {each:<14} {_first_line(cls.__doc__)}" for each, cls in commands.items()]
    if name in ("-h", "--help"):
        print("\n".join([f"usage: {prog} COMMAND ...; COMMAND --help describes its flags", "", about, "", *lines]))
        raise SystemExit(0)
    exit_with_error(_name(prog), f"there is no command {name!r}; give {', '.join(commands)}")


def run(program: str, command: Callable[[], int | None], status: int = 2) -> int:
    """Call `command` and return its exit status, or `status` after one sentence for an error that a user can mend."""
    try:
        return command() or 0
    except (ValueError, OSError, MemoryError) as error:
        print_once(program, str(error) or type(error).__name__)
        return status


def print_on_rank0(program: str, error: str) -> bool:
    """Print an error on stderr if this is rank 0, once per job, before the ranks can talk to each other.

    When rank 0 ends, torchrun ends the others, so they wait for that. Returns False where this process has waited in
    vain: then rank 0 does not have the error.
    """
    ranks = Ranks.read()
    if ranks.rank:
        time.sleep(WAIT_SECONDS)
        return False
    print(f"{program}: {error}", file=sys.stderr, flush=True)
    return True


def print_once(program: str, error: str) -> None:
    """Print an error on stderr once per job; with the rank's name if rank 0 does not have the error."""
    if not print_on_rank0(program, error):
        print(f"{program}: rank {Ranks.read().rank} ({socket.gethostname()}): {error}", file=sys.stderr, flush=True)


def exit_with_error(program: str, error: str, status: int = 2) -> NoReturn:
    """End the process after one sentence, printed once per job."""
    print_once(program, error)
    raise SystemExit(status)


def dump(config: Any) -> dict[str, Any]:
    """The values of a parsed dataclass by flag, in its groups: what `--config` reads."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        name = f.name if dataclasses.is_dataclass(value) else _flag(f).removeprefix("--")
        values[name] = dump(value) if dataclasses.is_dataclass(value) else _plain(value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


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


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, about: str | None) -> None:
        super().__init__(
            prog=prog,
            description=inspect.cleandoc(about or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )

    def error(self, message: str) -> NoReturn:
        exit_with_error(_name(self.prog), message)


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A leaf field: its name on the command line and in files, and the conversion of a value."""

    field: dataclasses.Field[Any]
    hint: Any
    optional: bool
    doc: str

    @property
    def name(self) -> str:
        return _flag(self.field).removeprefix("--")

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


def _settings(cls: type) -> Iterator[tuple[str | None, type, _Setting]]:
    """(Name of the group, its class, setting) for each leaf field; the group is None for a field of `cls` itself."""
    hints, docs = get_type_hints(cls), field_docs(cls)
    # The flags of a base class, which several commands share, come after the command's own.
    depth = {name: i for i, base in reversed([*enumerate(cls.__mro__)]) for name in inspect.get_annotations(base)}
    for f in sorted(dataclasses.fields(cls), key=lambda f: depth[f.name]):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from ((f.name, hints[f.name], setting) for _, _, setting in _settings(hints[f.name]))
        elif f.init:
            hint, optional = _strip_optional(hints[f.name])
            yield None, cls, _Setting(f, hint, optional, docs.get(f.name, ""))


def _build(cls: type[T], parser: _Parser, argv: Sequence[str] | None) -> T:
    settings = list(_settings(cls))
    titles: dict[str | None, Any] = {None: parser}
    for group, owner, setting in settings:
        if group not in titles:
            titles[group] = parser.add_argument_group(group, _first_line(owner.__doc__))
        _add_flag(titles[group], setting)
    assert len({s.name for _, _, s in settings}) == len(settings), "two groups have a flag of one name"
    about = "YAML or TOML file of flags, by name; flags of the command line override it"
    parser.add_argument("--config", type=Path, metavar="FILE", help=about)
    # Intermixed: flags may stand between positional arguments.
    known, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(_unknown(unknown, list(parser._option_string_actions)))
    values = {name: value for name, value in vars(known).items() if value is not _MISSING}
    try:
        if "config" in values:
            values = {**_from_file(values.pop("config"), settings), **values}
        missing = [_shown(s) for _, _, s in settings if s.name not in values and _default(s.field) is _MISSING]
        if missing:
            parser.error(f"{' and '.join(missing)} must be given; see --help")
        return _instance(cls, {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _instance(cls: type[T], values: Mapping[str, Any]) -> T:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[f.name]):
            arguments[f.name] = _instance(hints[f.name], values)
        elif (name := _flag(f).removeprefix("--")) in values:
            arguments[f.name] = values[name]
    return cls(**arguments)


def _add_flag(parser: Any, setting: _Setting) -> None:
    default = _default(setting.field)
    shown = "required" if default is _MISSING else f"default: {setting.field.metadata.get('shown') or _text(default)}"
    # argparse expands %-formats in help texts.
    options: dict[str, Any] = {"help": f"{setting.doc} ({shown})".strip().replace("%", "%%")}
    item, count = setting.items
    if item is bool:
        parser.add_argument(_shown(setting), dest=setting.name, action=argparse.BooleanOptionalAction, **options)
        return
    options["type"], options["metavar"] = _converter(item, setting.optional)
    if count is not None:
        options["nargs"] = count or "+"
    if setting.positional:
        # Optional for argparse: what is missing is reported for all flags together.
        options |= {"metavar": _shown(setting), "nargs": "?" if count is None else "*", "default": _MISSING}
        parser.add_argument(setting.name, **options)
        return
    if count == 0:
        options["action"] = "extend"
    parser.add_argument(_shown(setting), dest=setting.name, **options)


def _from_file(path: Path, settings: Sequence[tuple[str | None, type, _Setting]]) -> dict[str, Any]:
    """The values of a file of settings. Raises ValueError, naming file and setting."""
    groups = {group for group, _, _ in settings if group is not None}
    by_name = {setting.name: setting for _, _, setting in settings}
    values: dict[str, Any] = {}
    for name, value in read_settings(path, groups):
        if name not in by_name:
            close = difflib.get_close_matches(name, by_name, n=1)
            raise ValueError(
                f"{path}: there is no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        try:
            values[name] = _convert(by_name[name], value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return values


def _convert(setting: _Setting, value: Any) -> Any:
    """A file's value as the command line would give it."""
    item, count = setting.items
    if value is None and setting.optional:
        return None
    if item is bool:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"{value!r} is not accepted; give true or false")
        return value
    convert = partial(_from_text, *_converter(item, setting.optional)[:1])
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
    name = next((a.partition("=")[0] for a in arguments if a.startswith("-")), None)
    if name is None:
        return f"unexpected argument {arguments[0]!r}; see --help"
    close = difflib.get_close_matches(name, flags, n=1)
    return f"there is no flag {name}; " + (f"did you mean {close[0]}?" if close else "see --help")


def _flag(f: dataclasses.Field[Any]) -> str:
    return "--" + (f.metadata.get("flag") or f.name).replace("_", "-")


def _shown(setting: _Setting) -> str:
    """How a setting is written on the command line: its flag, or the placeholder of a positional argument."""
    return setting.name.replace("-", "_").upper() if setting.positional else f"--{setting.name}"


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


def _first_line(doc: str | None) -> str:
    return inspect.cleandoc(doc or "").partition("\n")[0]


def _name(prog: str) -> str:
    """The program's name in error messages: `engine.train` for `python -m engine.train`."""
    return prog.removeprefix("python -m ")


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
