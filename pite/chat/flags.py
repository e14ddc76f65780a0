"""The flags of pite.chat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.cli import at_least
from dataloaders.formats.fields import VIDEO_SUFFIXES
from pite.families import Name
from pite.flags import DeviceFlags
from pite.lineage import check_model_flag

CLIP = "openai/clip-vit-large-patch14"
"""The paper's encoder."""


@dataclass(frozen=True, kw_only=True)
class AnswerFlags(DeviceFlags):
    """Flags of a command that answers questions about videos."""

    adapter: tuple[Path, ...] = ()
    """folders of the authors' published adapters, stage 1 to 3 in order; then --model is the Vicuna below them"""
    family: Name | None = None
    """model family, pite or pg-video-llava; a model of the other one is refused. Any unless given"""
    clip: str = CLIP
    """path or Hugging Face name of the image tower that made the model's features"""
    history: bool = True
    """a later question's prompt holds the earlier questions about its video and their answers, as in PiTe-143k; off for a
    model that was trained on single questions"""
    temperature: float = 0.0
    """0 is greedy"""
    max_new_tokens: int = 1024
    """most tokens of an answer; fewer where the language model's context ends"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_new_tokens")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be 0 or more, not {self.temperature}")

    def check_adapters(self) -> None:
        """Raise ValueError for a folder that does not exist."""
        for folder in self.adapter:
            paths.input_folder("--adapter", folder)


@dataclass(frozen=True, kw_only=True)
class ChatFlags(AnswerFlags):
    """Answer questions about a video, or about each video of a folder.

    Without --query it reads one question a line, from the terminal or from another program. The questions about a video
    are the turns of one conversation. The answer to each is printed as it is made, then the seconds of its intervals.

    --trajectory draws the predicted trajectory of each object that the answer names: during the interval that the
    object's sentence gives, or in every frame if it gives none. The objects are found by rule (pite/mentions.py), or
    named by --phrase. Each answer replaces the drawing of the one before.
    """

    model: Path
    """a stage's output, an export, or OWNER/NAME on the hub; with --adapter a language model"""
    video: Path
    """any file that FFmpeg decodes, or a folder of them: then one JSON line per video and question is printed"""
    query: tuple[str, ...] = ()
    """a question; can be repeated, for several turns"""
    json: bool = False
    """print each answer as a JSON line, with its intervals, trajectories and token ids"""
    trajectory: Path | None = None
    """draw the answer's objects into this MP4, or into this PNG of six frames"""
    transcript: Path | None = None
    """the transcript of the video's sound, which the prompts of PG-Video-LLaVA quote: a text file, or the NAME.json of
    dataloaders.transcripts"""
    phrase: tuple[str, ...] = ()
    """draw these phrases of the answer instead of the phrases found by rule; can be repeated"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(question.strip() for question in self.query):
            raise ValueError("--query is empty: give a question about the video")
        if self.phrase and self.trajectory is None and not self.json:
            raise ValueError("--phrase chooses what is drawn: give --trajectory FILE.mp4 or --json too")
        if not all(phrase.strip() for phrase in self.phrase):
            raise ValueError("--phrase is empty: give words of the answer")
        if self.trajectory is not None and self.trajectory.suffix.lower() not in (".mp4", ".png"):
            raise ValueError(
                f"--trajectory {self.trajectory}: an MP4 or a PNG is written, so give a name that ends in .mp4 or .png"
            )

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist or cannot be written."""
        check_model_flag("--model", self.model)
        self.check_adapters()
        if not self.video.is_dir():
            paths.input_file("--video", self.video)
        elif not self.query:
            raise ValueError(f"--video {self.video}: this is a folder: give --query, the question about each video")
        elif self.trajectory is not None:
            raise ValueError(f"--video {self.video}: this is a folder, and --trajectory draws one video: give a file")
        elif not self.videos:
            raise ValueError(f"--video {self.video}: this folder holds no video ({', '.join(VIDEO_SUFFIXES)})")
        paths.model("--clip", self.clip)
        if self.transcript is not None:
            paths.input_file("--transcript", self.transcript)
        paths.distinct_files({"--trajectory": self.trajectory}, {"--video": self.video})
        paths.output_file("--trajectory", self.trajectory)

    @property
    def videos(self) -> list[Path]:
        """The video, or those of the folder by name."""
        if not self.video.is_dir():
            return [self.video]
        return sorted(file for file in self.video.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
