"""Annotation of the synthetic world, whose trajectories are known: accuracy, resuming, failures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from bench.annotation.synthetic import FRAMES, SIZE, agreement, exact_mask
from dataloaders.annotation import steps
from dataloaders.annotation.__main__ import main
from dataloaders.annotation.sheets import COLUMNS, TITLE, WIDTH
from dataloaders.annotation.tracking import LucasKanade, Moments, track_events
from dataloaders.decode.video import decode_video, iter_frames
from dataloaders.failures import read_failures
from dataloaders.formats import read_pite
from dataloaders.formats.activitynet import Event
from dataloaders.formats.tracks import place_tracks
from dataloaders.records import ABSENT
from dataloaders.samples.dataset import StageDataset
from dataloaders.synthetic.language import activitynet_record
from dataloaders.synthetic.render import draw, write_mp4
from dataloaders.synthetic.scene import Scene, sample_video
from tests.commands import status_of
from tests.media import truncate
from tests.text import llama_like

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-contrib-python-headless")

SEEDS = range(8)


@dataclass(frozen=True)
class World:
    """A data folder, and the true scene of each of its videos."""

    data: Path
    scenes: dict[str, Scene]

    @property
    def output(self) -> Path:
        return self.data / "stage2/pite_143k.jsonl"

    @property
    def work(self) -> Path:
        return self.output.with_suffix(".steps")

    def command(self, *flags: object) -> list[str]:
        paths = {"captions": self.data / "captions.json", "videos": self.data / "stage2/videos", "output": self.output}
        given = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
        return [*given, "--num-frames", str(FRAMES), *map(str, flags)]

    def run(self, *flags: object) -> int:
        return status_of(main, self.command("--workers", 0, *flags))

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture(autouse=True)
def without_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phrases are those of the files, also where spaCy is installed."""
    monkeypatch.setattr("dataloaders.annotation.run.has_spacy", lambda: False)


def make_world(data: Path) -> World:
    """Write videos, captions, phrases and exact masks."""
    scenes = {f"v{seed}": sample_video(np.random.default_rng(seed)) for seed in SEEDS}
    world = World(data, scenes)
    (data / "stage2/videos").mkdir(parents=True)
    for name, scene in scenes.items():
        write_mp4(data / f"stage2/videos/{name}.mp4", draw(scene, SIZE))
        events = [
            {
                "sentence": f"A{t.phrase[1:]} moves {t.direction}.",
                "phrases": [{"phrase": f"A{t.phrase[1:]}", "start": 0}],
            }
            for t in scene.things
        ]
        steps.write_json(steps.step_path(world.work, "phrases", name), {"events": events})
        masks: steps.Masks = [[exact_mask(scene, i)] for i in range(len(scene.things))]
        steps.write_masks(steps.step_path(world.work, "masks", name), masks)
    captions = {name: activitynet_record(scene) for name, scene in scenes.items()}
    (data / "captions.json").write_text(json.dumps(captions))
    return world


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("annotated"))
    assert world.run() == 0
    return world


@pytest.fixture
def fresh(annotated: World, tmp_path: Path) -> World:
    """A copy without records but with tracks. A test that changes an earlier step removes the tracks of its video."""
    ignored = shutil.ignore_patterns("records", "sheets", "pite_143k.jsonl")
    shutil.copytree(annotated.data, tmp_path, ignore=ignored, dirs_exist_ok=True)
    return World(tmp_path, annotated.scenes)


def test_points_move_with_their_things(annotated):
    """Bounds are about twice the measured values. Most errors are points that moved to a thing drawn over them."""
    found = []
    for name, scene in annotated.scenes.items():
        tracks = load_file(steps.step_path(annotated.work, "tracks", name))
        assert set(tracks) == {f"{i}.0" for i in range(len(scene.things))}
        found += [(scene, i, tracks[f"{i}.0"]) for i in range(len(scene.things))]
    seen = agreement(found)
    assert seen.errors.mean() < 0.004  # of the frame, half a pixel of 128
    assert np.median(seen.errors) < 0.0006
    assert seen.kept > 0.7
    assert seen.wrong < 0.03


def test_the_forward_backward_check_removes_wrong_points(annotated):
    means = []
    for settings in (LucasKanade(), LucasKanade(backward=1e9)):
        found = []
        for name in ("v0", "v1", "v2"):
            scene = annotated.scenes[name]
            events = [Event(scene.seconds(t.first), scene.seconds(t.last), "") for t in scene.things]
            moments = [Moments.of(event, scene.duration, scene.num_frames, FRAMES) for event in events]
            masks: steps.Masks = [[exact_mask(scene, i)] for i in range(len(scene.things))]
            tracks = track_events(annotated.data / f"stage2/videos/{name}.mp4", moments, masks, settings)
            found += [(scene, i, track) for (i, _), track in tracks.items()]
        means.append(agreement(found).errors.mean())
    assert means[1] > 1.2 * means[0]


def test_key_points_are_tracks_and_longer_than_most(annotated):
    found = []
    for record in annotated.records():
        scene = annotated.scenes[record["id"]]
        tracks = load_file(steps.step_path(annotated.work, "tracks", record["id"]))
        assert len(record["trajectories"]) == len(scene.things)
        for i, trajectory in enumerate(record["trajectories"]):
            points = np.array(trajectory["points"], dtype=float)
            assert len(points) == 3
            for point in points:
                assert (np.abs(tracks[f"{i}.0"] - point).max((1, 2)) < 1e-4).any()
            assert (np.diff(points[:, 0, 0]) >= 0).all()
            found.append((scene, i, points))
    seen = agreement(found)
    assert np.median(seen.errors) < 0.0008
    assert seen.kept > 0.9
    assert seen.wrong < 0.07


def test_records_can_be_trained_on(annotated):
    tokenizer = llama_like()
    dataset = StageDataset(
        annotated.data,
        2,
        tokenizer,
        num_frames=FRAMES,
        num_points=3,
        max_length=2048,
        available=None,
        failure_budget=0,
    )
    assert dataset.ids == list(annotated.scenes)
    for i, scene in enumerate(annotated.scenes.values()):
        sample, record = dataset[i], annotated.records()[i]
        assert sample.trajectory.shape[1:] == (3, FRAMES, 2)
        # Every token of a phrase has its thing's trajectory: present at the event's first frames, absent outside it.
        turns = read_pite(record, "", annotated.data / "stage2", num_frames=FRAMES, num_points=3).turns
        (turn,) = (turn for turn in turns if turn.mentions)
        assert len(turn.mentions) == len(scene.things)
        for thing, mention in zip(scene.things, turn.mentions):
            assert turn.answer[mention.start : mention.end].lower() == thing.phrase
            clock = np.arange(FRAMES) / (FRAMES - 1) * scene.duration
            during = (clock >= scene.seconds(thing.first) - 1e-6) & (clock <= scene.seconds(thing.last) + 1e-6)
            assert (mention.trajectory[:, ~during] == ABSENT).all()
            assert (mention.trajectory[:, during][:, 0] != ABSENT).all()
            centre = place_tracks(
                thing.path[None], (scene.seconds(thing.first), scene.seconds(thing.last)), scene.duration, FRAMES
            )
            begin = np.flatnonzero(during)[0]
            assert np.abs(mention.trajectory[:, begin] - centre[:, begin]).max() < 0.16
            assert (sample.trajectory == mention.trajectory).all((1, 2, 3)).any()


def test_a_killed_run_is_resumed_and_no_step_is_repeated(annotated):
    before, output = {p: p.stat().st_mtime_ns for p in annotated.work.rglob("*.*")}, annotated.output.read_bytes()
    for step in ("tracks", "records"):
        steps.step_path(annotated.work, step, "v2").unlink()
    steps.step_path(annotated.work, "records", "v3").unlink()
    # As a user starts it: worker processes must find the pickled functions by name in a module.
    command = [sys.executable, "-m", "dataloaders.annotation", *annotated.command("--workers", 2)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3])
    assert annotated.output.read_bytes() == output
    made = {p.relative_to(annotated.work) for p in before if p.stat().st_mtime_ns != before[p]}
    again = {"tracks/v2.safetensors", "records/v2.json", "records/v3.json", "settings.json"}
    assert {str(path) for path in made} == again


def test_a_bad_video_fails_alone_and_is_logged(fresh, capsys):
    truncate(fresh.data / "stage2/videos/v1.mp4", fresh.data / "stage2/videos/v1.mp4", 0.7)
    (fresh.data / "stage2/videos/v2.mp4").unlink()
    steps.step_path(fresh.work, "masks", "v3").unlink()
    for name in ("v1", "v2", "v3", "v4"):
        steps.step_path(fresh.work, "tracks", name).unlink()
    captions = json.loads((fresh.data / "captions.json").read_text())
    captions["v4"]["duration"] *= 3
    captions["v5"]["timestamps"].pop()
    (fresh.data / "captions.json").write_text(json.dumps(captions))
    assert fresh.run("--failure-budget", 0.2) == 1
    assert "more than the failure budget" in capsys.readouterr().err
    assert not fresh.output.exists()
    assert fresh.run("--failure-budget", 1) == 0
    assert [record["id"] for record in fresh.records()] == ["v0", "v6", "v7"]
    failures = {failure.id: failure for failure in read_failures(fresh.work / "failures.jsonl")}
    assert {name: failure.stage for name, failure in failures.items()} == {
        "v1": "decode",
        "v2": "decode",
        "v3": "annotate",
        "v4": "decode",
        "v5": "read",
    }
    assert "cut off" in failures["v1"].reason
    assert "masks/v3.json: no such file; write it, or make it with --detector" in failures["v3"].reason
    assert "is it another video?" in failures["v4"].reason
    assert "4 failed" in capsys.readouterr().out  # The fifth failed while its captions were read.


def test_phrases_that_are_not_found_have_no_trajectory(fresh, capsys):
    path = steps.step_path(fresh.work, "masks", "v0")
    masks = json.loads(path.read_text())
    masks["events"][0] = [None]
    path.write_text(json.dumps(masks))
    dot = np.zeros((SIZE, SIZE), bool)
    background = steps.step_path(fresh.work, "masks", "v1")
    dot[1:3, 1:3] = True  # Two by two pixels of plain background: nothing to track.
    events = len(fresh.scenes["v1"].things)
    steps.write_masks(background, [[dot] for _ in range(events)])
    for name in ("v0", "v1"):
        steps.step_path(fresh.work, "tracks", name).unlink()
    assert fresh.run() == 0
    first, second = fresh.records()[:2]
    assert len(first["trajectories"]) == len(fresh.scenes["v0"].things) - 1
    assert second["trajectories"] == []
    things = len(fresh.scenes["v0"].things)
    assert max(message["value"].count("<s") for message in first["conversations"]) == things
    total = sum(len(scene.things) for scene in fresh.scenes.values())
    summary = f"{total} phrases; {total - 1} of them found in their event's first frame, {total - 1 - events} tracked"
    assert summary in capsys.readouterr().out


def test_lost_trajectories_are_counted_and_not_written(fresh, capsys):
    """A track that is present in a fifth of its moments, and one that stands still."""
    steps.step_path(fresh.work, "masks", "v0").unlink()
    still = np.full((4, 10, 2), 0.5, np.float32) + np.arange(4, dtype=np.float32)[:, None, None] / 50
    gone = still.copy()
    gone[:, 2:] = ABSENT
    assert len(fresh.scenes["v0"].things) >= 2
    save_file({"0.0": gone, "1.0": still}, steps.step_path(fresh.work, "tracks", "v0"))
    assert fresh.run("--sheets", 2) == 0
    (trajectory,) = fresh.records()[0]["trajectories"]
    phrase = fresh.scenes["v0"].things[1].phrase
    assert trajectory["phrase"].lower() == phrase
    found = json.loads(steps.step_path(fresh.work, "records", "v0").read_text())["trajectories"]
    assert [(each["present"], each["moved"], each["lost"]) for each in found] == [(0.2, 0.0, True), (1.0, 0.0, False)]
    output = capsys.readouterr().out
    assert "1 lost (present in less than 30% of the moments)" in output
    assert "all phrases" in output and phrase in output
    sheets = sorted((fresh.work / "sheets").glob("*.png"))
    assert [sheet.stem for sheet in sheets] == ["v0", "v4"]
    with Image.open(sheets[0]) as sheet:
        picture = np.asarray(sheet)
    assert picture.shape == (WIDTH + TITLE, COLUMNS * WIDTH, 3)  # One row of square frames.
    red = (picture == (255, 0, 0)).all(-1)
    assert all(red[:, k * WIDTH : (k + 1) * WIDTH].any() for k in range(COLUMNS))
    shutil.rmtree(fresh.work / "records")
    assert fresh.run("--lost", 0, "--sheets", 0) == 0
    assert len(fresh.records()[0]["trajectories"]) == 2


def test_tracks_of_another_tool_are_used(fresh):
    line = np.stack((np.linspace(0.2, 0.6, 5), np.full(5, 0.5)), -1)
    tracks = np.stack([line + np.array([0, 0.1 * i]) for i in range(4)]).astype(np.float32)
    save_file({"0.0": tracks}, steps.step_path(fresh.work, "tracks", "v0"))
    assert fresh.run() == 0
    (trajectory,) = fresh.records()[0]["trajectories"]
    points = np.array(trajectory["points"])
    assert points.shape == (3, 5, 2)
    assert points[:, :, 0] == pytest.approx(np.tile(line[:, 0], (3, 1)))


@pytest.mark.parametrize(
    ("step", "content", "sentence"),
    [
        ("phrases", {"events": []}, "field 'events' holds 0 entries"),
        ("phrases", {"events": [{"sentence": "Other.", "phrases": []}] * 9}, "that of the captions"),
        ("masks", {"events": [[None, None]] * 9}, "one mask or null for each of its 1 phrases"),
        ("masks", {"events": [[{"size": [2, 2], "counts": [1, 2]}]] * 9}, "run lengths add up to H * W"),
        ("masks", {"events": [[{"size": [8, 4], "counts": [0, 32]}]] * 9}, "frames of 128 x 128, but a mask of 4 x 8"),
        ("tracks", b"junk", "not a safetensors file"),
        ("tracks", {"9.0": np.zeros((3, 4, 2), np.float32)}, "tensor '9.0' is not an"),
        ("tracks", {"0.0": np.zeros((3, 4), np.float32)}, "must be (M, K, 2) floating point"),
        ("tracks", {"0.0": np.full((3, 4, 2), 1.5, np.float32)}, "outside the frame"),
        ("tracks", {"0.0": np.full((3, 4, 2), np.nan, np.float32)}, "not finite"),
    ],
)
def test_invalid_step_files_are_refused(fresh, step, content, sentence):
    path, tracks = (steps.step_path(fresh.work, name, "v0") for name in (step, "tracks"))
    tracks.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif step == "tracks":
        save_file(content, path)
    else:
        events = len(fresh.scenes["v0"].things)
        path.write_text(json.dumps({"events": content["events"][:events]}))
    assert fresh.run("--failure-budget", 0.2) == 0
    (failure,) = read_failures(fresh.work / "failures.jsonl")
    assert sentence in failure.reason


def test_steps_with_other_settings_are_not_mixed(annotated, capsys):
    assert annotated.run("--num-points", 1) == 1
    assert (
        "{'num_points': 3, 'lost': 0.3, 'when_questions': True}, not "
        "{'num_points': 1, 'lost': 0.3, 'when_questions': True}: remove" in capsys.readouterr().err
    )
    assert annotated.run("--segmenter", "sam") == 2
    assert "give --detector, too" in capsys.readouterr().err


@pytest.mark.parametrize(("step", "flag"), [("phrases", "--stanza"), ("masks", "--detector")])
def test_a_step_without_its_files_needs_its_model(fresh, capsys, step, flag):
    shutil.rmtree(fresh.work / "tracks")
    for number, path in enumerate(sorted((fresh.work / step).iterdir())):
        path.unlink()
        if number == 2:
            break
    (fresh.work / "settings.json").unlink()
    assert fresh.run("--failure-budget", 0.3) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        f"dataloaders.annotation: {flag} must be given, the folder of the model that makes the {step}: "
    )
    assert (
        f"3 of 8 videos have no file of {step}, such as {fresh.work}/{step}/v0.json" in error and error.count("\n") == 1
    )
    assert not (fresh.work / "settings.json").exists() and not list(fresh.work.glob("failures*")), "nothing was tried"


def test_other_output_files_are_not_replaced(annotated, tmp_path, capsys):
    output = tmp_path / "pite_143k.jsonl"
    output.write_text("precious")
    assert annotated.run("--output", output) == 1
    assert "was not made from" in capsys.readouterr().err
    assert output.read_text() == "precious"
    (tmp_path / "empty.json").write_text("{}")
    assert annotated.run("--captions", tmp_path / "empty.json") == 1
    assert "holds no video" in capsys.readouterr().err


def test_parts_share_the_videos_and_one_command_joins_them(fresh, annotated):
    done: list[set[str]] = []
    for part in ("1/3", "2/3", "3/3"):
        assert fresh.run("--part", part) == 0 and not fresh.output.exists()
        done.append({path.stem for path in (fresh.work / "records").iterdir()})
    assert [len(names) for names in done] == [3, 6, len(SEEDS)]
    assert fresh.run() == 0 and fresh.output.read_bytes() == annotated.output.read_bytes()


def test_until_stops_after_a_step(fresh):
    steps.step_path(fresh.work, "tracks", "v0").unlink()
    assert fresh.run("--until", "tracks") == 0
    assert steps.step_path(fresh.work, "tracks", "v0").exists()
    assert {path.name for path in fresh.work.iterdir()} == {"phrases", "masks", "tracks", "settings.json"}
    assert not fresh.output.exists()


def test_iter_frames_equals_decode_video(annotated):
    path = annotated.data / "stage2/videos/v0.mp4"
    total = annotated.scenes["v0"].num_frames
    frames = list(iter_frames(path, {0, 7}))
    assert [i for i, frame in enumerate(frames) if frame is not None] == [0, 7]
    assert len(frames) == total
    assert (frames[7] == decode_video(path, total)[7]).all()
