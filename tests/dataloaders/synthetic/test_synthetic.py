"""The synthetic world: its records agree with its pixels, and its bytes are the same in every run."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dataloaders.synthetic import scene
from dataloaders.synthetic.__main__ import main
from dataloaders.synthetic.language import GROUNDING_QUESTION, instruct_record
from dataloaders.synthetic.render import draw
from dataloaders.synthetic.world import WorldConfig, make_world
from tests.commands import status_of

CONFIG = WorldConfig(videos=24, evaluation=4, images=6, frames=32, seed=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("world") / "w"
    assert make_world(output, CONFIG, processes=1)
    return output


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_same_seed_gives_the_same_bytes_for_any_number_of_processes(world, tmp_path):
    make_world(tmp_path / "again", CONFIG, processes=2)
    assert digests(tmp_path / "again") == digests(world)


def test_another_seed_gives_another_world(world, tmp_path):
    make_world(tmp_path / "other", WorldConfig(videos=1, evaluation=1, images=1, seed=4), processes=1)
    one = "stage2/videos/v000000.mp4"
    assert digests(tmp_path / "other")[one] != digests(world)[one]


def test_repeating_writes_nothing(world):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert not make_world(world, CONFIG, processes=1)
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_a_killed_run_is_completed(world, tmp_path):
    output = tmp_path / "w"
    make_world(output, CONFIG, processes=1)
    manifest = json.loads((output / "world.json").read_text())
    (output / "world.json").write_text(json.dumps(manifest | {"complete": False}))
    (output / "stage2/videos/v000007.mp4").unlink()
    (output / "stage3/valley.json").unlink()
    assert make_world(output, CONFIG, processes=1)
    assert digests(output) == digests(world)


def test_another_configuration_in_the_same_folder_is_refused(world, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"another synthetic world .*choose another folder"):
        make_world(world, WorldConfig(videos=24, evaluation=4, images=6, seed=5), processes=1)
    (tmp_path / "mine.txt").write_text("precious")
    assert main([str(tmp_path), "--videos", "1"]) == 1
    assert "is no synthetic world" in capsys.readouterr().err
    assert status_of(main, [str(tmp_path / "new"), "--videos", "0"]) == 2
    assert "--videos must be at least 1" in capsys.readouterr().err


def test_videos_are_h264_with_the_duration_of_their_records(world):
    for record in lines(world / "stage2/pite_143k.jsonl")[:6]:
        with av.open(str(world / f"stage2/videos/{record['id']}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 64, 64)
            assert float(stream.duration * stream.time_base) == pytest.approx(record["meta"]["duration"])


def test_stage_3_shares_the_videos_of_stage_2(world):
    link = world / "stage3/videos"
    assert link.is_symlink()
    assert str(link.readlink()) == "../stage2/videos"
    assert {path.stem for path in link.glob("*.mp4")} == {r["id"] for r in lines(world / "stage2/pite_143k.jsonl")}


def test_a_point_is_present_exactly_where_its_thing_is_visible():
    for seed in range(40):
        video = scene.sample_video(np.random.default_rng(seed))
        frames = draw(video, 256).astype(int)
        for i, thing in enumerate(video.things):
            points = thing.path[None] + scene.RADIUS * scene.KEY_POINTS[:, None]
            for point, track in zip(points, scene.key_point_tracks(video, i)):
                for k, (x, y) in enumerate(point):
                    inside = 0 <= x < 1 and 0 <= y < 1
                    shown = tuple(frames[thing.first + k, int(y * 256), int(x * 256)].tolist()) if inside else None
                    if shown == scene.COLOURS[thing.colour]:
                        assert track[k] == pytest.approx((x, y), abs=1e-4)
                    elif not inside or shown in (*scene.COLOURS.values(), (140, 140, 140)):
                        assert track[k].tolist() == [-1, -1]


def test_more_key_points_do_not_change_a_world(monkeypatch):
    """A model of three points trains on the same data in a world of five points as of three."""
    five = [scene.sample_video(np.random.default_rng(seed)) for seed in range(40)]
    tracks = [[scene.key_point_tracks(video, i) for i in range(len(video.things))] for video in five]
    assert all(len(track) == 5 for each in tracks for track in each)
    monkeypatch.setattr(scene, "KEY_POINTS", scene.KEY_POINTS[:3])
    for seed, (video, each) in enumerate(zip(five, tracks)):
        three = scene.sample_video(np.random.default_rng(seed))
        assert (three.num_frames, three.background, three.occluder) == (
            video.num_frames,
            video.background,
            video.occluder,
        )
        for i, (thing, other, track) in enumerate(zip(three.things, video.things, each, strict=True)):
            assert (thing.phrase, thing.first, thing.last) == (other.phrase, other.first, other.last)
            assert np.array_equal(scene.key_point_tracks(three, i), track[:3])


def test_decoded_videos_show_each_thing_on_its_trajectory_and_only_during_its_event(world):
    agree, hidden = [], 0
    for record in lines(world / "stage2/pite_143k.jsonl"):
        frames = decode(world / f"stage2/videos/{record['id']}.mp4").astype(int)
        last = len(frames) - 1
        for trajectory in record["trajectories"]:
            colour = np.array(scene.COLOURS[trajectory["phrase"].lower().split()[1]])
            first, end = (round(t / record["meta"]["duration"] * last) for t in trajectory["times"])
            points = np.array(trajectory["points"])
            assert points.shape == (5, end - first + 1, 2)
            k, here = np.nonzero((points >= 0).all(-1).T)
            x, y = np.minimum(points[here, k] * 64, 63).astype(int).T
            agree += (np.abs(frames[first + k, y, x] - colour).max(-1) < 60).tolist()
            hidden += int((points < 0).any(-1).sum())
            away = np.concatenate([frames[:first], frames[end + 1 :]])
            assert not (np.abs(away - colour).max(-1) < 25).any()
    # Chroma is stored at half resolution: where two things touch, a pixel may take its neighbour's tint.
    assert np.mean(agree) > 0.98
    assert len(agree) > 1000
    assert hidden > 10


def test_occluded_and_leaving_points_are_absent_in_exactly_these_frames():
    path = np.stack((np.linspace(0.21, 1.11, 10), np.full(10, 0.5)), -1)
    thing = scene.Thing("red", "circle", "right", 0, 9, path)
    cover = scene.Thing("blue", "square", "up", 3, 3, path[3:4])
    video = scene.Scene(10, 30, (thing, cover), occluder=(0.58, 0.4, 0.65, 0.6))
    centre = scene.key_point_tracks(video, 0)[0]
    assert (centre[:, 0] < 0).tolist() == [k in (3, 4, 8, 9) for k in range(10)]
    assert centre[2].tolist() == [0.41, 0.5]
    frames = draw(video, 64)
    assert frames[4, 32, int(path[4, 0] * 64)].tolist() == [140, 140, 140]
    assert (scene.key_point_tracks(video, 1) >= 0).all()


def test_every_phrase_is_at_its_offset_and_every_mark_is_in_the_answer(world):
    for record in lines(world / "stage2/pite_143k.jsonl") + lines(world / "evaluation/pite_143k.jsonl"):
        answer, marks = record["conversations"][1]["value"], record["meta"]["token"]
        for trajectory in record["trajectories"]:
            begin = trajectory["start"]
            assert answer[begin : begin + len(trajectory["phrase"])] == trajectory["phrase"]
        assert all(mark in answer for mark in marks)
        assert all(0 <= seconds <= record["meta"]["duration"] for seconds in marks.values())
        lengths = [(b - a) / record["meta"]["duration"] for a, b in (t["times"] for t in record["trajectories"])]
        assert all(0.1 < length < 0.46 for length in lengths)


def test_questions_about_one_video_differ_only_in_their_object(world):
    questions: dict[str, list[tuple[str, str]]] = {}
    for record in json.loads((world / "stage3/valley.json").read_text()):
        question, answer = (turn["value"] for turn in record["conversations"])
        questions.setdefault(record["v_id"], []).append((question, answer))
    before, after = GROUNDING_QUESTION.split("{}")
    truth = {record["id"]: record["meta"] for record in lines(world / "stage2/pite_143k.jsonl")}
    for video, pairs in questions.items():
        assert len({question for question, _ in pairs}) == len(pairs) <= 2
        seconds = list(truth[video]["token"].values())
        starts = {round(seconds[i] / truth[video]["duration"] * 32) for i in range(0, len(seconds), 2)}
        for question, answer in pairs:
            assert question.startswith(f"<video>\n{before}a ")
            assert question.endswith(after)
            assert int(answer.removeprefix("From ")[:2]) in starts
    assert any(len(pairs) == 2 for pairs in questions.values())
    instruct = json.loads((world / "stage3/video_instruct.json").read_text())
    assert {record["video_id"] for record in instruct} == set(truth)


def test_mouse_traces_circle_the_thing_of_the_current_words(world):
    for record in lines(world / "stage1/localized_narratives.jsonl"):
        words = [timed["utterance"] for timed in record["timed_caption"]]
        assert " ".join(words) == record["caption"]
        image = np.asarray(Image.open(world / f"stage1/images/{record['image_id']}.jpg")).astype(int)
        for trace in record["traces"]:
            begin, end = trace[0]["t"], trace[-1]["t"]
            (colour,) = (
                t["utterance"]
                for t in record["timed_caption"]
                if begin - 1e-6 <= t["start_time"] <= end and t["utterance"] in scene.COLOURS
            )
            x, y = (np.mean([point[axis] for point in trace]) for axis in "xy")
            pixel = image[min(int(y * 64), 63), min(int(x * 64), 63)]
            assert min(scene.COLOURS, key=lambda name: np.abs(pixel - np.array(scene.COLOURS[name])).sum()) == colour


def test_held_out_captions_agree_with_held_out_trajectories(world):
    captions = json.loads((world / "evaluation/activitynet_captions.json").read_text())
    records = {record["id"]: record for record in lines(world / "evaluation/pite_143k.jsonl")}
    assert captions.keys() == records.keys()
    for name, caption in captions.items():
        assert caption["timestamps"] == [t["times"] for t in records[name]["trajectories"]]
        assert caption["duration"] == records[name]["meta"]["duration"]
        for sentence, trajectory in zip(caption["sentences"], records[name]["trajectories"], strict=True):
            assert sentence.lower().startswith(trajectory["phrase"].lower())


def test_twins_are_equal_and_differ_in_their_motion_alone():
    rng = np.random.default_rng(0)
    for _ in range(50):
        video = scene.sample_twins(rng)
        one, other = video.things
        assert one.phrase == other.phrase and one.direction != other.direction
        assert one.last < other.first and other.last < video.num_frames
        assert all(len(thing.path) == thing.last - thing.first + 1 for thing in video.things)
        assert "Which direction" not in instruct_record("", video, rng)["q"], "it would have two answers"


def test_a_world_from_before_the_twins_is_complete(world, tmp_path):
    shutil.copytree(world, tmp_path / "w", symlinks=True)
    manifest = json.loads((tmp_path / "w/world.json").read_text())
    assert manifest.pop("twins") == 0
    (tmp_path / "w/world.json").write_text(json.dumps(manifest))
    assert not make_world(tmp_path / "w", CONFIG, processes=1)


def test_a_share_of_the_videos_shows_twins(tmp_path):
    make_world(tmp_path, WorldConfig(videos=1, evaluation=20, images=1, twins=0.5), processes=1)
    captions = json.loads((tmp_path / "evaluation/activitynet_captions.json").read_text())
    things = [[sentence.partition(" moves ")[0] for sentence in video["sentences"]] for video in captions.values()]
    assert 4 <= sum(len(set(named)) < len(named) for named in things) <= 16
