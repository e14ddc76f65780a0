"""The flags of dataloaders.annotation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.annotation.steps import Step
from dataloaders.cli import at_least
from dataloaders.decode import TIME_LIMIT
from dataloaders.logs import LogFlags
from dataloaders.ranks import Part, check_one_host


@dataclass(frozen=True, kw_only=True)
class AnnotationFlags(LogFlags):
    """Make PiTe-143k records from videos and their event captions, or add trajectories to records."""

    captions: Path | None = None
    """ActivityNet Captions' {id: {duration, timestamps, sentences}}, or InternVid's lines of YoutubeID, Start_timestamp,
    End_timestamp and Caption; or give --records"""
    records: Path | None = None
    """records such as VTimeLLM's stage2.json, which keep their conversations and get trajectories; or give --captions"""
    videos: Path
    """folder of {id}.mp4, or .mkv, .webm, ..., or of the sources of clips named {YouTube id}_{start}_{end}"""
    output: Path
    """such as DATA/stage2/pite_143k.jsonl; an existing file is replaced"""
    work: Path | None = None
    """folder for the files of each step; OUTPUT with .steps for .jsonl unless given"""
    until: Step = "records"
    """last step to run"""
    stanza: Path | None = None
    """folder of Stanza's models, which make the phrases; spaCy's noun chunks unless given"""
    detector: Path | None = None
    """folder of a SAM 3 or a GroundingDINO, which makes the masks; not needed if their files exist"""
    segmenter: Path | None = None
    """folder of a SAM for the boxes of a GroundingDINO; without it a mask is the box"""
    tracker: Path | None = None
    """folder of a SAM 3, SAM 2 video or EdgeTAM model, which makes the tracks; our own tracker unless given"""
    people: bool = False
    """without --detector, find people with OpenCV's HOG detector: the phrases that name a person get masks"""
    refind: bool = False
    """look for lost objects on later frames with --detector or --people, which takes up to six detections for each"""
    threshold: float = 0.35
    """minimum score of the --detector's detections"""
    device: str = "cpu"
    """cpu or cuda, where the models run"""
    num_frames: int = 100
    """N frames that PiTe will see"""
    num_points: int = 3
    """P key points of a trajectory"""
    lost: float = 0.3
    """a trajectory that is present in a smaller share of its moments is lost: counted, not written"""
    sheets: int = 16
    """videos of which a contact sheet is drawn, a PNG in the folder of the steps; 0 for none"""
    when_questions: bool = True
    """add a question for the time of one event, as in grounding, to each record that has none"""
    part: str | None = None
    """`2/3` annotates the second of three parts of the videos, one for each host; then run the command once without it"""
    workers: int | None = None
    """worker processes, each with its own models; 0 for none; one per core, or one for a GPU, unless given"""
    time_limit: float = TIME_LIMIT
    """timeout for one video, in seconds"""
    failure_budget: float = 0.01
    """share of videos that may fail"""

    def __post_init__(self) -> None:
        if (self.captions is None) == (self.records is None):
            raise ValueError("give one of --captions and --records: what to annotate")
        if self.people and self.detector:
            raise ValueError("give one of --detector and --people: what makes the masks")
        if self.segmenter and not self.detector:
            raise ValueError("--segmenter needs the boxes of a detector; give --detector, too")
        if self.refind and self.tracker:
            raise ValueError("--refind goes on from the tracks of our own tracker; leave out --tracker, or --refind")
        Part.parse(self.part)
        at_least(self, 0, "workers")
        at_least(self, 0, "sheets")
        if not 0 <= self.lost <= 1:
            raise ValueError(f"--lost is a share of the moments, from 0 to 1, not {self.lost}")
        at_least(self, 1, "num_points")
        at_least(self, 2, "num_frames")
        if not self.time_limit > 0:
            raise ValueError(f"--time-limit must be more than 0, not {self.time_limit}")

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written."""
        check_one_host("dataloaders.annotation")
        paths.input_file("--captions", self.captions)
        paths.input_file("--records", self.records)
        for name in ("videos", "stanza", "detector", "segmenter", "tracker"):
            paths.input_folder(f"--{name}", getattr(self, name))
        paths.distinct_files({"--output": self.output}, {"--captions": self.captions, "--records": self.records})
        paths.output_file("--output", self.output)
        if self.work is not None:
            paths.output_folder("--work", self.work)
