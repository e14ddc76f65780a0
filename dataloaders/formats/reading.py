"""Read all records of an annotation file: each bad one is refused alone, and a failure budget limits their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from dataloaders.failures import over_budget
from dataloaders.formats.stream import Record, Where, iter_raw, parse_json
from dataloaders.records import RecordError

_ERRORS_SHOWN = 10

T = TypeVar("T")


def read_each(path: Path, read: Callable[[Record, Where], T]) -> Iterator[tuple[Where, Record, T | RecordError]]:
    """Yield place, parsed record, and what `read` makes of it, or its RecordError, for every record of `iter_raw`.

    The record is empty where it is no JSON object. Raises RecordError for a file that ends early or is not JSON.
    """
    for offset, text in iter_raw(path):
        where = Where(path, offset)
        record: Record = {}
        try:
            record = parse_json(text, where)
            yield where, record, read(record, where)
        except RecordError as error:
            yield where, record, error


def read_all(
    path: Path, read: Callable[[Record, Where], T], failure_budget: float
) -> tuple[list[T], list[RecordError]]:
    """What `read` makes of the good records of a file, and the errors of the bad ones, both in order.

    failure_budget  share of the records that may be bad; RecordError with the first ten if there are more
    """
    found = [value for _, _, value in read_each(path, read)]
    errors = [value for value in found if isinstance(value, RecordError)]
    check_budget(errors, len(found), failure_budget)
    return [value for value in found if not isinstance(value, RecordError)], errors


def check_budget(errors: Sequence[object], total: int, budget: float) -> None:
    """Raise RecordError if more than a share `budget` of `total` records are malformed, with the first ten `errors`."""
    count = len(errors)
    if count > budget * total:
        last = f"{count:,} of {total:,} records are malformed, {over_budget(count, total, budget)}"
        raise RecordError("\n".join([*map(str, errors[:_ERRORS_SHOWN]), last]))
