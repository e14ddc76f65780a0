"""A command line from frozen dataclasses: fields are flags, their docstrings are the help, groups are nested dataclasses.

It uses argparse, because users know its help; each of its errors is replaced by one sentence, printed once per job.
`--config FILE` reads flags from YAML or TOML. Nothing here imports torch, so `--help` and a typo are answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from dataloaders.errors import sentence
from dataloaders.options import (
    MISSING,
    Setting,
    converter,
    default_of,
    first_line,
    flag_of,
    from_file,
    settings_of,
    text_of,
    written,
)
from dataloaders.ranks import Ranks

T = TypeVar("T")

WAIT_SECONDS = 5.0
"""Seconds that other ranks wait for rank 0 to print an error and end the job."""


INTERRUPTED = 128 + 2
"""Exit status after Ctrl-C, as of a shell: 128 and the number of the signal."""


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


def changed(config: Any, *names: str) -> list[str]:
    """For `__post_init__`: the flags, of the named fields, that have another value than their default."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    return [flag_of(fields[name]) for name in names if getattr(config, name) != fields[name].default]


def parse(cls: type[T], argv: Sequence[str] | None = None, prog: str | None = None, about: str | None = None) -> T:
    """Build `cls` from command-line arguments, `sys.argv`'s by default.

    A field `num_frames: int = 100` becomes `--num-frames 100`; a string literal under a field is its help; a field
    without default is required; a bool has `--flag` and `--no-flag`; a tuple takes several values, and one of any
    length may be repeated; an Optional takes `none` as well. A field whose type is a dataclass is a group of flags.
    Types: str, int, float, bool, Path, Literal, and Optional and tuple of those.

    `--config FILE` sets flags by name, in groups or not; the command line overrides the file. An unknown flag, a bad
    value, a missing flag or a ValueError from `__post_init__` ends the process with status 2 after one sentence.

    about  the help's first lines; by default the dataclass's docstring
    """
    prog = prog or _module_name()
    return _build(cls, _Parser(prog, about or cls.__doc__), argv)


def parse_command(
    commands: Mapping[str, type[T]], argv: Sequence[str] | None = None, prog: str | None = None, about: str = ""
) -> T:
    """Like `parse`, for a command whose first argument selects one of several dataclasses."""
    prog = prog or _module_name()
    name, *rest = (list(sys.argv[1:]) if argv is None else list(argv)) or ["--help"]
    if name in commands:
        cls = commands[name]
        return _build(cls, _Parser(f"{prog} {name}", cls.__doc__), rest)
    lines = [f"  {each:<14} {first_line(cls.__doc__)}" for each, cls in commands.items()]
    if name in ("-h", "--help"):
        print("\n".join([f"usage: {prog} COMMAND ...; COMMAND --help describes its flags", "", about, "", *lines]))
        raise SystemExit(0)
    exit_with_error(_name(prog), f"there is no command {name!r}; give {', '.join(commands)}")


def run(program: str, command: Callable[[], int | None]) -> int:
    """Call `command` and return its exit status: 1 after one sentence for an error that a user can mend, 130 after Ctrl-C."""
    try:
        return command() or 0
    except (ValueError, OSError, MemoryError) as error:
        print_once(program, sentence(error))
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED


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
        name = f.name if dataclasses.is_dataclass(value) else flag_of(f).removeprefix("--")
        values[name] = dump(value) if dataclasses.is_dataclass(value) else _plain(value)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, about: str | None) -> None:
        super().__init__(
            prog=prog,
            description=inspect.cleandoc(about or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.must_be_given: list[argparse.Action] = []

    def format_usage(self) -> str:
        with self._as_required():
            return super().format_usage()

    def format_help(self) -> str:
        with self._as_required():
            return super().format_help()

    @contextmanager
    def _as_required(self) -> Iterator[None]:
        """Required flags stand without brackets in the usage; argparse itself takes them as optional (`_add_flag`)."""
        before = [(action, action.required, action.nargs) for action in self.must_be_given]
        for action in self.must_be_given:
            action.required = True
            if not action.option_strings:
                action.nargs = "+" if action.nargs == "*" else None
        try:
            yield
        finally:
            for action, required, nargs in before:
                action.required, action.nargs = required, nargs

    def error(self, message: str) -> NoReturn:
        exit_with_error(_name(self.prog), message)


def _build(cls: type[T], parser: _Parser, argv: Sequence[str] | None) -> T:
    settings = list(settings_of(cls))
    titles: dict[str | None, Any] = {None: parser}
    for group, owner, setting in settings:
        if group not in titles:
            titles[group] = parser.add_argument_group(group, first_line(owner.__doc__))
        action = _add_flag(titles[group], setting)
        if default_of(setting.field) is MISSING:
            parser.must_be_given.append(action)
    assert len({s.name for _, _, s in settings}) == len(settings), "two groups have a flag of one name"
    about = "YAML or TOML file of flags, by name; flags of the command line override it"
    parser.add_argument("--config", type=Path, metavar="FILE", help=about)
    # Intermixed: flags may stand between positional arguments.
    known, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(_unknown(unknown, list(parser._option_string_actions)))
    values = {name: value for name, value in vars(known).items() if value is not MISSING}
    try:
        if "config" in values:
            values = {**from_file(values.pop("config"), settings), **values}
        missing = [written(s) for _, _, s in settings if s.name not in values and default_of(s.field) is MISSING]
        if missing:
            parser.error(f"{' and '.join(missing)} must be given; see --help")
        return _instance(cls, {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except (ValueError, OSError) as error:
        parser.error(sentence(error))


def _instance(cls: type[T], values: Mapping[str, Any]) -> T:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[f.name]):
            arguments[f.name] = _instance(hints[f.name], values)
        elif (name := flag_of(f).removeprefix("--")) in values:
            arguments[f.name] = values[name]
    return cls(**arguments)


def _add_flag(parser: Any, setting: Setting) -> argparse.Action:
    default = default_of(setting.field)
    shown = "required" if default is MISSING else f"default: {setting.field.metadata.get('shown') or text_of(default)}"
    # argparse expands %-formats in help texts.
    options: dict[str, Any] = {"help": f"{setting.doc} ({shown})".strip().replace("%", "%%")}
    if not setting.positional:
        options["dest"] = setting.name
    if setting.items[0] is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        _add_type(options, setting)
    names = [setting.name] if setting.positional else [written(setting)]
    action: argparse.Action = parser.add_argument(*names, **options)
    return action


def _add_type(options: dict[str, Any], setting: Setting) -> None:
    """Add to the options of an argument how its text becomes a value."""
    item, count = setting.items
    options["type"], options["metavar"] = converter(item, setting.optional)
    if count is not None:
        options["nargs"] = count or "+"
    if setting.positional:
        # Optional for argparse: what is missing is reported for all flags together.
        options |= {"metavar": written(setting), "nargs": "?" if count is None else "*", "default": MISSING}
    elif count == 0:
        options["action"] = "extend"


def _unknown(arguments: list[str], flags: list[str]) -> str:
    name = next((a.partition("=")[0] for a in arguments if a.startswith("-")), None)
    if name is None:
        return f"unexpected argument {arguments[0]!r}; see --help"
    close = difflib.get_close_matches(name, flags, n=1)
    return f"there is no flag {name}; " + (f"did you mean {close[0]}?" if close else "see --help")


def _name(prog: str) -> str:
    """The program's name in error messages: `engine.train` for `python -m engine.train`."""
    return prog.removeprefix("python -m ")


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
