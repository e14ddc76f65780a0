"""The score of spatial grounding as text and numbers, with bounds to compare it with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from pite.evaluate.protocols import Protocol
from pite.evaluate.reports import Report
from pite.evaluate.spatial.answers import Boxes, overlap
from pite.evaluate.spatial.truth import Tube

log = logging.getLogger(__name__)


def counted(tubes: Sequence[Tube], protocol: Protocol) -> list[Tube]:
    """The questions that count: with `published` those that were made. Raises ValueError if there is none."""
    found = [tube for tube in tubes if tube.answered or protocol == "strict"]
    if not found:
        raise ValueError("there is no question to score: the folder of --questions holds none of the numbered files")
    return found


def report(
    answers: Mapping[int, tuple[tuple[int, int], Boxes]], tubes: Sequence[Tube], *, protocol: Protocol = "strict"
) -> Report:
    """m_sIoU in percent over all questions; one without an answer, or without a box, counts 0.

    answers   frame size and boxes by the number of the question
    protocol  published: videos for which no question was made are left out
    Raises ValueError where no question is left.
    """
    chosen = counted(tubes, protocol)
    found = {tube.query_id: answers.get(tube.query_id, (tube.size, {})) for tube in chosen}
    score = 100 * float(np.mean([overlap(tube, *found[tube.query_id], protocol) for tube in chosen]))
    whole = 100 * float(np.mean([overlap(tube, tube.size, _whole(tube), protocol) for tube in chosen]))
    still = 100 * float(np.mean([overlap(tube, tube.size, _still(tube), protocol) for tube in chosen]))
    failed = sum(not any(len(each) for each in boxes.values()) for _, boxes in found.values())
    shown = [len(each) for _, boxes in found.values() for each in boxes.values() if len(each)]
    several = float(np.mean(shown)) if shown else 0.0
    lines = [
        f"m_sIoU   {score:6.2f}",
        f"m_sIoU of the whole frame {whole:.2f}",
        f"m_sIoU of the true box of the first frame, kept still {still:.2f}",
        f"over {len(chosen):,} questions; {failed:,} without a box, which count 0",
    ]
    if protocol == "published":
        lines.append(f"{several:.2f} boxes in each frame that has one; the best of them counts")
    if len(chosen) < len(tubes):
        lines.append(f"{len(tubes) - len(chosen):,} videos without a question are left out")
    if failed == len(chosen):
        log.warning("no question has a box: the score is 0")
    numbers = {
        "m_sIoU": score,
        "m_sIoU of the whole frame": whole,
        "m_sIoU of the first box kept still": still,
        "questions": len(chosen),
        "questions without a box": failed,
        "boxes per frame": several,
        "protocol": protocol,
    }
    return Report("spatial_grounding", "\n".join(lines), numbers)


def _whole(tube: Tube) -> Boxes:
    return dict.fromkeys(range(*tube.span), np.array([[0, 0, *tube.size]], np.float64))


def _still(tube: Tube) -> Boxes:
    return dict.fromkeys(range(*tube.span), tube.boxes[min(tube.boxes)][None])
