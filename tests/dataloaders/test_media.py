"""The media that annotations name: each once, read once, read again after any change, with and without a cache."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataloaders import derived, media
from dataloaders.formats import present_splits
from dataloaders.media import duration_error, list_media, wrong_duration
from dataloaders.records import Media, RecordError
from tests.media import write_video
from tests.records import CAPTIONS, NARRATIVE, PITE, VALLEY, changed


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for split in ("stage1", "stage2", "stage3", "evaluation"):
        (folder / split).mkdir(parents=True)
    (folder / "stage1/localized_narratives.jsonl").write_text(json.dumps(NARRATIVE) + "\n")
    (folder / "stage2/pite_143k.jsonl").write_text(json.dumps(PITE) + "\n")
    (folder / "stage3/valley.json").write_text(json.dumps([VALLEY, VALLEY]))
    captions = {"v_1": {k: v for k, v in CAPTIONS.items() if k != "id"}}
    (folder / "evaluation/activitynet_captions.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The annotation files that were read, record by record."""
    files: list[str] = []
    real = derived._tasks
    monkeypatch.setattr(derived, "_tasks", lambda path, *rest: files.append(path.name) or real(path, *rest))
    return files


def keys(data: Path, *splits: str, cache: Path | None = None) -> list[str]:
    return [m.key for m in list_media(data, splits, cache).media]  # type: ignore[arg-type]


def test_media_of_all_splits_each_once(data: Path, tmp_path: Path) -> None:
    expected = [
        Media("stage1/coco/137576", data / "stage1/images/coco/000000137576.jpg", "image"),
        Media("stage2/v000001", data / "stage2/videos/v000001.mp4", clip=(129.8, 184.0)),
        Media("stage3/v_001", data / "stage3/videos/v_001.mp4"),
        Media("evaluation/v_1", data / "evaluation/videos/v_1.mp4"),
    ]
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        found = list_media(data, present_splits(data), cache)
        assert found.media == expected and not found.malformed


def test_every_shard_of_the_narratives_is_read(data: Path) -> None:
    for i in range(2):
        name = f"coco_train_localized_narratives-{i:05d}-of-00002.jsonl"
        (data / "stage1" / name).write_text(json.dumps({**NARRATIVE, "image_id": str(i)}) + "\n")
    assert keys(data, "stage1") == [f"stage1/coco/{i}" for i in (0, 1, 137576)]


def test_read_once(data: Path, tmp_path: Path, read: list[str]) -> None:
    cache = tmp_path / "cache"
    one = keys(data, "stage2", "stage3", cache=cache)
    assert read == ["pite_143k.jsonl", "valley.json"]
    assert keys(data, "stage3", "stage2", cache=cache) == one[::-1] and len(read) == 2
    assert sorted(path.suffix for path in cache.iterdir()) == [".parquet"] * 2, "no lock and no temporary file is left"


@pytest.mark.parametrize("change", ["size", "contents", "code"])
def test_read_again_after_a_change(
    data: Path, tmp_path: Path, read: list[str], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, file = tmp_path / "cache", data / "stage2/pite_143k.jsonl"
    keys(data, "stage2", cache=cache)
    if change == "code":
        monkeypatch.setattr(media, "_code", lambda: "another version")
    else:
        status = file.stat()
        file.write_text(json.dumps({**PITE, "id": "v000002" if change == "contents" else "w"}) + "\n")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    expected = {"size": "stage2/w", "contents": "stage2/v000002", "code": "stage2/v000001"}[change]
    assert keys(data, "stage2", cache=cache) == [expected] and len(read) == 2


def test_a_long_file_is_read_again_after_a_change_in_its_middle(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksum covers the ends only, the time of the change the rest."""
    monkeypatch.setattr(media, "_END", 16)
    cache, file = tmp_path / "cache", data / "stage2/pite_143k.jsonl"
    records = [json.dumps(changed(PITE, "id", name)) for name in "abc"]
    file.write_text("\n".join(records))
    os.utime(file, (1, 1))
    assert keys(data, "stage2", cache=cache) == ["stage2/a", "stage2/b", "stage2/c"]
    records[1] = records[1].replace('"b"', '"d"')
    file.write_text("\n".join(records))
    assert keys(data, "stage2", cache=cache) == ["stage2/a", "stage2/d", "stage2/c"]


def test_another_suffix_is_found_without_reading_again(data: Path, tmp_path: Path, read: list[str]) -> None:
    cache, videos = tmp_path / "cache", data / "stage3/videos"
    keys(data, "stage3", cache=cache)
    videos.mkdir()
    (videos / "v_001.mkv").touch()
    (found,) = list_media(data, ["stage3"], cache).media
    assert found.path == videos / "v_001.mkv" and len(read) == 1


def test_processes_give_the_same_list(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "_CHUNK", 4)
    lines = [json.dumps(changed(PITE, "id", f"v{i}" if i != 13 else "..")) for i in range(50)]
    (data / "stage2/pite_143k.jsonl").write_text("\n".join(lines))
    alone, together = (list_media(data, ["stage2"], processes=processes) for processes in (0, 2))
    assert alone == together and len(alone.media) == 49
    (malformed,) = alone.malformed
    assert malformed.startswith(f"{data / 'stage2/pite_143k.jsonl'}:14: field 'id' holds '..'")


def test_processes_that_start_together_read_once(data: Path, tmp_path: Path) -> None:
    """One reads, and the other waits and opens the list."""
    code = (
        "import sys, time, pathlib, logging; from dataloaders import derived, media; tasks = derived._tasks; read = []; "
        "logging.basicConfig(level='INFO'); "
        "derived._tasks = lambda *rest: (read.append(1), time.sleep(1), tasks(*rest))[-1]; "
        "print('ready', flush=True); sys.stdin.readline(); "
        "print(len(read), media.list_media(pathlib.Path(sys.argv[1]), ['stage2'], pathlib.Path(sys.argv[2])), len(read))"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(data), str(tmp_path / "cache")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert sorted(out.split()[-1] for out, _ in outputs) == ["0", "1"], outputs
    assert sum("waiting for the lists of media that another process makes" in err for _, err in outputs) == 1
    assert outputs[0][0].rpartition(" ")[0] == outputs[1][0].rpartition(" ")[0]


def test_a_read_only_folder(
    data: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its lists are used; what it lacks is read each time, after a warning."""
    cache = tmp_path / "cache"
    expected = keys(data, "stage2", cache=cache)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(derived, "lock", refuse)
    assert keys(data, "stage2", cache=cache) == expected and not caplog.records
    assert keys(data, "stage3", cache=cache) == keys(data, "stage3", cache=cache) == ["stage3/v_001"]
    assert read == ["pite_143k.jsonl", "valley.json", "valley.json"]
    assert f"lists of media cannot be kept in {cache} (Read-only file system)" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_a_file_system_without_locks(
    data: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    cache = tmp_path / "cache"
    assert keys(data, "stage2", cache=cache) == keys(data, "stage2", cache=cache) == ["stage2/v000001"]
    assert len(read) == 1 and "processes that start together each make the same lists of media" in caplog.text


def test_a_damaged_list_is_named(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    keys(data, "stage2", cache=cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{file} is damaged .*; remove it, and it will be made again"):
        keys(data, "stage2", cache=cache)


def test_records_without_media_have_their_lines(data: Path, tmp_path: Path) -> None:
    bad = changed(VALLEY, "v_id", "..")
    (data / "stage3/valley.json").write_text(json.dumps([bad, VALLEY, bad], indent=1))
    for _ in range(2):
        found = list_media(data, ["stage3"], tmp_path / "cache")
        assert [m.key for m in found.media] == ["stage3/v_001"]
        lines = [
            int(sentence.removeprefix(f"{data}/stage3/valley.json:").partition(":")[0]) for sentence in found.malformed
        ]
        assert lines[0] == 2 and lines[1] > lines[0] and "cannot name a media file" in found.malformed[1]


def test_a_truncated_file_is_refused_each_time(data: Path, tmp_path: Path) -> None:
    (data / "stage3/valley.json").write_text(json.dumps([VALLEY])[:-1])
    for _ in range(2):
        with pytest.raises(RecordError, match="ends before its closing bracket"):
            list_media(data, ["stage3"], tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_one_key_for_two_clips_is_a_malformed_record(data: Path, tmp_path: Path) -> None:
    other = changed(changed(PITE, "meta.split", [10.0, 64.2]), "trajectories", [])
    lines = [PITE, other, changed(PITE, "id", "b"), PITE, other]
    (data / "stage2/pite_143k.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for _ in range(2):
        found = list_media(data, ["stage2"], tmp_path / "cache")
        assert [(m.key, m.clip) for m in found.media] == [("stage2/v000001", (129.8, 184)), ("stage2/b", (129.8, 184))]
        assert found.malformed == [
            f"{data}/stage2/pite_143k.jsonl:{line}: 'stage2/v000001' is v000001.mp4 from 10 to 64.2 s, but v000001.mp4 from "
            "129.8 to 184 s in an earlier record; give each file or clip an id of its own"
            for line in (2, 5)
        ]


def test_one_key_for_two_files_is_a_malformed_record(data: Path) -> None:
    (data / "stage3/videos").mkdir()
    for name in ("a.mkv", "a.mp4"):
        (data / "stage3/videos" / name).touch()
    records = [{**VALLEY, "v_id": name} for name in ("a.mkv", "a", "a.mkv")]
    (data / "stage3/valley.json").write_text(json.dumps(records))
    found = list_media(data, ["stage3"])
    assert [m.path.name for m in found.media] == ["a.mkv"] and len(found.malformed) == 1
    assert "'stage3/a' is all of a.mp4, but all of a.mkv in an earlier record" in found.malformed[0]
    (data / "stage3/videos/a.mkv").unlink()
    found = list_media(data, ["stage3"])
    assert [m.path.name for m in found.media] == ["a.mp4"] and not found.malformed
    (data / "stage3/videos/a.mp4").unlink()
    assert len(list_media(data, ["stage3"]).media) == 1 and not list_media(data, ["stage3"]).malformed


CUT = "Ptf_2VRj-V0_000122_000132"


def test_a_clip_named_by_its_times_is_cut_from_its_source(data: Path, tmp_path: Path, read: list[str]) -> None:
    """VATEX's names. The list on disk holds the names, so a file that appears later is found without reading again."""
    records = [{**VALLEY, "v_id": name} for name in (CUT, f"sub/{CUT}", "short_1_2", "Ptf_2VRj-V0_9_3")]
    (data / "stage3/valley.json").write_text(json.dumps(records))
    videos = data / "stage3/videos"
    (videos / "sub").mkdir(parents=True)

    def found() -> list[tuple[str, tuple[float, float] | None]]:
        media = list_media(data, ["stage3"], tmp_path / "cache").media
        assert [m.key for m in media] == [f"stage3/{r['v_id']}" for r in records]
        return [(str(m.path.relative_to(videos)), m.clip) for m in media]

    named = [(f"{r['v_id']}.mp4", None) for r in records]
    assert found() == named
    for source in ("Ptf_2VRj-V0.webm", "sub/Ptf_2VRj-V0.mp4", "short.mp4"):
        (videos / source).touch()
    cut = [("Ptf_2VRj-V0.webm", (122.0, 132.0)), ("sub/Ptf_2VRj-V0.mp4", (122.0, 132.0)), *named[2:]]
    assert found() == cut
    (videos / f"{CUT}.mkv").touch()
    assert found() == [(f"{CUT}.mkv", None), *cut[1:]], "a file of the clip is used whole"
    assert read == ["valley.json"]


def test_a_records_times_come_before_those_in_its_name(data: Path) -> None:
    record = changed(changed(PITE, "id", CUT), "meta.split", [122.5, 176.7])
    (data / "stage2/pite_143k.jsonl").write_text(json.dumps(record))
    (data / "stage2/videos").mkdir()
    (data / "stage2/videos/Ptf_2VRj-V0.mp4").touch()
    (media,) = list_media(data, ["stage2"]).media
    assert (media.path.name, media.clip) == ("Ptf_2VRj-V0.mp4", (122.5, 176.7))
    (data / f"stage2/videos/{CUT}.mp4").touch()
    (media,) = list_media(data, ["stage2"]).media
    assert (media.path.name, media.clip) == (f"{CUT}.mp4", (122.5, 176.7)), "other times than those in the name"
    record = changed(record, "id", "Ptf_2VRj-V0_000122_000177")
    (data / "stage2/pite_143k.jsonl").write_text(json.dumps(record))
    (data / "stage2/videos/Ptf_2VRj-V0_000122_000177.mp4").touch()
    (media,) = list_media(data, ["stage2"]).media
    assert (media.path.stem, media.clip) == (record["id"], None), "the file is the clip"


def test_durations_of_whole_files_are_compared_with_their_annotation(data: Path, tmp_path: Path) -> None:
    file = write_video(tmp_path / "v.mp4", 40)  # 4 s
    for seconds in (3.1, 4.0, 4.9, None):
        assert wrong_duration(Media("k", file, duration=seconds)) is None
    assert duration_error(Media("k", file, duration=3.1)) == pytest.approx(0.9)
    reason = f"{file}: lasts 4.0 s, but its annotation is for 28.8 s; is it another video?"
    assert wrong_duration(Media("k", file, duration=28.8)) == reason
    assert wrong_duration(Media("k", file, clip=(0, 1), duration=28.8)) is None
    assert wrong_duration(Media("k", tmp_path / "nothing.mp4", duration=28.8)) is None
    durations = [m.duration for m in list_media(data, present_splits(data)).media]
    assert durations == [None, 54.2, None, 82.73]


def test_a_clip_of_another_length_than_its_duration_is_malformed(data: Path) -> None:
    """All times of a record are scaled by `meta.duration`."""
    (data / "stage2/pite_143k.jsonl").write_text(json.dumps(changed(PITE, "meta.split", [100.0, 184.0])))
    found = list_media(data, ["stage2"])
    assert not found.media and "field 'meta.duration' is 54.2 s, but 'meta.split' lasts 84 s" in found.malformed[0]
