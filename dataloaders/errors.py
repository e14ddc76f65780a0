"""Messages of other libraries' exceptions as one sentence for a user's error."""

from __future__ import annotations

import re

_NOISE = re.compile(r"^(class )?validation error for (field|validator) '\w+': ", re.IGNORECASE)
_CLASS = re.compile(r"^[A-Z]\w*(Error|Exception): ")
"""What pydantic-like validators and tracebacks put before a reason: it names no thing that a user has."""

_END = re.compile(r"(?<=[^\W\d][.!?]) ")
"""The space after a sentence; the number of an item in a list, as in "1. FFmpeg", is no sentence."""

LONGEST = 160


def reason(error: BaseException) -> str:
    """The first sentences of an exception's message, on one line and without a full stop at the end.

    Lines are joined until one ends a sentence: a message that is wrapped, or that introduces its reason with a colon,
    is not cut in the middle. After the first sentence there are only whole ones, up to LONGEST characters in all.
    Without a message it is the exception's class.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text, *rest = [line for line in lines if line] or [type(error).__name__]
    for line in rest:
        if not _continues(text, line):
            break
        text += f" {line}"
    first, *others = _END.split(_CLASS.sub("", _NOISE.sub("", text)))
    text = first
    for other in others:
        if len(text) + len(other) > LONGEST:
            break
        text += f" {other}"
    return text.rstrip(".:, ") or type(error).__name__


def sentence(error: BaseException) -> str:
    """The error as a command prints it: of an OSError the path and the reason, without the number of the error."""
    if isinstance(error, OSError) and error.strerror:
        where = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([" -> ".join(where), error.strerror] if where else [error.strerror])
    return str(error) or type(error).__name__


def _continues(text: str, line: str) -> bool:
    """Whether a sentence goes on in the next line."""
    return text[-1] in ":,(" or (text[-1] not in ".!?" and (line[0].islower() or line[0] in "\"'"))
