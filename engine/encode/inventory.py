"""Lists a data folder's media before anything is decoded: which are stored, which have no file, which are to encode."""

from __future__ import annotations

import logging
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataloaders.failures import BudgetExceeded, Failure, Ledger, over_budget
from dataloaders.formats import present_splits, split_of
from dataloaders.media import CACHE, list_media
from dataloaders.ranks import ALONE, Ranks
from dataloaders.records import Media, RecordError
from dataloaders.store.features import FeatureStore
from dataloaders.store.layout import has_own_store
from engine.encode.config import EncodeConfig
from engine.encode.work import in_threads

_EXAMPLES = 3
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inventory:
    """The media in a data folder's annotations, the same on every rank.

    media      each key once
    stored     keys whose features are in a store
    absent     key -> why it has no file, for media that are not stored: their file does not exist, is empty or a folder
    """

    media: list[Media]
    stored: set[str]
    absent: dict[str, Failure]

    def counts(self) -> Iterator[str]:
        """A line for each split and kind: media to encode, stored, and absent."""
        total, stored, absent = (
            Counter((m.key.partition("/")[0], m.kind) for m in self.media if keys is None or m.key in keys)
            for keys in (None, self.stored, self.absent)
        )
        for place, count in total.items():
            parts = [f"{count - stored[place] - absent[place]:,} to encode", f"{stored[place]:,} stored"]
            yield f"{place[0]}: {count:,} {place[1]}s: " + ", ".join([*parts, f"{absent[place]:,} absent"])

    def over_budget(self, budget: float) -> str:
        """One sentence if more media are absent than the budget allows, with examples and a remedy; else empty."""
        count, total = len(self.absent), len(self.media)
        if count <= budget * total:
            return ""
        examples = ", ".join(failure.reason for failure in list(self.absent.values())[:_EXAMPLES])
        return f"{count:,} of {total:,} media are absent, such as {examples}: {over_budget(count, total, budget)}"

    def log_absent(self, ledger: Ledger, logs_them: bool) -> None:
        """Log the absent media, on one rank; all ranks count them. Raises BudgetExceeded if they are too many."""
        if logs_them:
            ledger.log(self.absent.values())
        ledger.count_elsewhere(self.absent)
        if sentence := self.over_budget(ledger.budget):
            raise BudgetExceeded(f"{sentence}; all are in {ledger.files}")


def take_inventory(config: EncodeConfig, ranks: Ranks = ALONE) -> Inventory:
    """List the media of `config.data`, and look for the file of each that `config.store` lacks. Rank 0 logs the counts.

    Raises ValueError for a folder without data, and if more records name no media than the failure budget allows.
    """
    used = {"evaluation", *map(split_of, config.choices.stages)}
    splits = [split for split in present_splits(config.data) if split in used]
    own = [split for split in splits if has_own_store(config.store, split)]
    if own and ranks.rank == 0:
        log.info(
            "not encoded, because they have stores of their own: %s", ", ".join(str(config.store / s) for s in own)
        )
    found = list_media(config.data, [split for split in splits if split not in own], config.store / CACHE)
    count, total = len(found.malformed), len(found.malformed) + len(found.media)
    if count > config.failure_budget * total:
        budget = over_budget(count, total, config.failure_budget)
        raise RecordError(f"{found.malformed[0]}; {count:,} of {total:,} records name no media, {budget}")
    # Files may be deleted once they are encoded, so only the others have to exist.
    stored = {key for kind in ("images", "videos") for key in FeatureStore.stored_keys(config.store / kind)}
    needed = [m for m in found.media if m.key not in stored]
    faults = in_threads(_fault, [m.path for m in needed], "looking for files")
    absent = {
        m.key: Failure(m.key, str(m.path), "find", f"{m.path}: {fault}") for m, fault in zip(needed, faults) if fault
    }
    inventory = Inventory(found.media, stored, absent)
    if ranks.rank == 0:
        if count:
            log.warning("%s records name no media, the first: %s", f"{count:,}", found.malformed[0])
        for line in inventory.counts():
            log.info(line)
    return inventory


def _fault(path: Path) -> str:
    """Why there is nothing to decode at `path`; empty if a file may be there."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "No such file"
    except OSError:
        return ""  # The decoder reports it: the file may be readable by then.
    if stat.S_ISDIR(status.st_mode):
        return "it is a folder"
    return "the file is empty" if stat.S_ISREG(status.st_mode) and not status.st_size else ""
