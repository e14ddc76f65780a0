"""What `pite.evaluate spatial` does."""

from __future__ import annotations

from dataloaders.ranks import Ranks
from pite.evaluate.reports import Report
from pite.evaluate.spatial.answers import read_answers, read_failures
from pite.evaluate.spatial.flags import SpatialFlags
from pite.evaluate.spatial.report import counted, report
from pite.evaluate.spatial.truth import Tube, read_hc_stvg, read_vidstg


def read_tubes(flags: SpatialFlags) -> list[Tube]:
    """The ground truth of the flags. Raises ValueError, naming file and field."""
    if flags.vidor is not None:
        return read_vidstg(flags.ground_truth, flags.vidor)
    return read_hc_stvg(flags.ground_truth, flags.questions, flags.protocol)


def score_boxes(flags: SpatialFlags, ranks: Ranks) -> Report | None:
    """Scores of the file of --predictions, which the model of --model completes first; None in all processes but the first."""
    tubes = read_tubes(flags)
    if flags.model is not None:
        # Imported here, because it takes seconds.
        from pite.evaluate.spatial.answering import answer_questions

        answer_questions(flags, counted(tubes, flags.protocol), ranks)
    if ranks.rank:
        return None
    answers = read_answers(flags.predictions, tubes, flags.protocol)
    failed = read_failures(flags.predictions)
    lines = [f"{len(failed):,} of them failed, such as {failed[0]}"] if failed else []
    return report(answers, tubes, protocol=flags.protocol).adding(lines, {"questions failed": len(failed)})
