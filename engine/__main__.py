"""`pite NAME ...` or `python -m engine NAME ...`: all commands under one name; each calls the `main` of its module.

For several GPUs start the module with torchrun instead: `torchrun --nproc-per-node 8 -m engine.train ...`.
"""

from __future__ import annotations

import sys
from importlib import import_module

from engine.distributed.errors import exit_process

COMMANDS = {
    "demo": ("engine.demo.__main__", "end-to-end demo: every step with tiny models"),
    "annotate": ("dataloaders.annotation.__main__", "make trajectories from videos and captions"),
    "transcripts": ("dataloaders.transcripts.__main__", "transcribe the sound of videos"),
    "encode": ("engine.encode.__main__", "decode and encode videos once, into a feature store"),
    "store": ("dataloaders.store.__main__", "inspect, verify, merge or import feature stores"),
    "budget": ("engine.budget.__main__", "estimate parameters, memory and hours of a run"),
    "train": ("engine.train", "train stages 1, 2 and 3"),
    "evaluate": ("pite.evaluate.__main__", "score a model or a file of predictions"),
    "chat": ("pite.chat.__main__", "chat with a trained model about a video"),
    "ground": ("pite.ground.__main__", "find what an answer names: boxes and masks over time"),
    "web": ("pite.web.__main__", "open a web page to try a model"),
    "export": ("pite.export.__main__", "export one folder for transformers or peft, and push it to the hub"),
    "world": ("dataloaders.synthetic.__main__", "make the synthetic world"),
    "tiny": ("engine.tiny.__main__", "train the tiny CLIP and Vicuna of the demo"),
}
"""Name -> module with `main(argv) -> int`, and what it does."""


def usage() -> str:
    lines = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: pite COMMAND ...; pite COMMAND --help describes its flags", "", *lines])


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status, 2 for an unknown one."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"pite: there is no command {name!r}\n{usage()}", file=sys.stderr)
        return 2
    status: int = import_module(COMMANDS[name][0]).main(rest)
    return status


def console() -> None:
    """The console command `pite`."""
    status = main()
    exit_process(status)


if __name__ == "__main__":
    console()
