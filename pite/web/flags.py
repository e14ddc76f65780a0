"""The flags of pite.web."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from pathlib import Path

from dataloaders import paths
from dataloaders.cli import at_least
from pite.chat.flags import CLIP, AnswerFlags
from pite.ground.flags import MaskFlags, given
from pite.lineage import check_model_flag


@dataclass(frozen=True, kw_only=True)
class WebFlags(AnswerFlags, MaskFlags):
    """Open a web page to try a model: upload a video or pick an example, type a question, watch the answer.

    The answer's intervals stand on a time line, and its objects' predicted trajectories are drawn on the playing video.
    Without --model the page shows the demo's model and videos. With --ground a button finds what an answer names: a video
    with boxes and masks over time, as pite.ground makes it.
    """

    model: Path | None = None
    """a stage's output, an export, or OWNER/NAME on the hub; unless given, stage 2 of --demo with its encoder"""
    demo: Path = Path("runs/demo")
    """output folder of `make demo`"""
    examples: Path | None = None
    """folder of example videos; unless given, held-out videos of the demo, or none with --model"""
    ground: bool = False
    """offer to find in the video what an answer names, with the models below"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 opens the page to the network, where anyone can use the model"""
    port: int = 7860
    """port to listen on"""
    max_upload_mb: int = 200
    """largest upload, in MB"""
    max_seconds: int = 600
    """longest video, in seconds"""
    queue: int = 16
    """most questions that wait for the model"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_upload_mb", "max_seconds", "queue")
        if not self.ground and (unused := given(self)):
            raise ValueError(f"{' and '.join(unused)}: give --ground, too: without it nothing is found in the video")
        if not 0 < self.port < 65536:
            raise ValueError(f"--port must be 1 to 65535, not {self.port}")
        if not self.host.strip():
            raise ValueError("--host is empty: give an address, such as 127.0.0.1")

    def check_paths(self) -> None:
        """Raise ValueError for a path that does not exist."""
        check_model_flag("--model", self.model)
        self.check_adapters()
        if self.model is None and not self.chosen_model.is_dir():
            raise ValueError(
                f"--demo {self.demo}: there is no finished demo: run `make demo`, or give --model and --clip"
            )
        paths.model("--clip", self.chosen_clip)
        paths.input_folder("--examples", self.examples)
        self.check_grounder()
        self.check_address()

    def check_address(self) -> None:
        """Raise ValueError for an address that is not this machine's, and for a port that is in use."""
        try:
            family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ValueError(f"--port {self.port} is in use: give another one") from None
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise ValueError(
                    f"--host {self.host} is no address of this machine: give 127.0.0.1, or 0.0.0.0 for all of them"
                ) from None
            raise ValueError(f"--host {self.host} --port {self.port}: {error.strerror}") from None

    @property
    def chosen_model(self) -> Path:
        """The model of --model or of the demo: trajectories are predicted best by stage 2."""
        return self.model or self.demo / "run" / "stage2" / "final"

    @property
    def chosen_clip(self) -> str:
        """The encoder of --clip or of the demo."""
        return str(self.demo / "models" / "clip") if self.model is None and self.clip == CLIP else self.clip

    @property
    def chosen_history(self) -> bool:
        """The demo's training samples have one question each."""
        return self.history and self.model is not None
