"""What `pite.evaluate spatial` does."""

from __future__ import annotations

from dataloaders.ranks import Ranks
from pite.evaluate.reports import Report
from pite.evaluate.spatial.answers import read_answers
from pite.evaluate.spatial.flags import SpatialFlags
from pite.evaluate.spatial.report import report
from pite.evaluate.spatial.truth import Tube, read_hc_stvg, read_vidstg


def read_tubes(flags: SpatialFlags) -> list[Tube]:
    """The ground truth of the flags. Raises ValueError, naming file and field."""
    if flags.vidor is not None:
        return read_vidstg(flags.ground_truth, flags.vidor)
    return read_hc_stvg(flags.ground_truth, flags.questions, flags.protocol)


def score_boxes(flags: SpatialFlags, ranks: Ranks) -> Report | None:
    """Scores of the file of --predictions; None in all processes but the first."""
    if ranks.rank:
        return None
    tubes = read_tubes(flags)
    return report(read_answers(flags.predictions, tubes, flags.protocol), tubes, protocol=flags.protocol)
