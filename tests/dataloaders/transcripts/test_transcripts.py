"""Transcripts: voice activity, the published filter, and a folder that is killed and resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import pytest

from dataloaders.decode.readable import DecodeError
from dataloaders.failures import LEDGER, read_failures
from dataloaders.transcripts import read_transcript, run
from dataloaders.transcripts.__main__ import main
from dataloaders.transcripts.files import write_transcript
from dataloaders.transcripts.flags import TranscriptFlags
from dataloaders.transcripts.run import SETTINGS
from dataloaders.transcripts.sound import RATE, is_speech, read_sound, voice_segments

needs_packages = pytest.mark.skipif(
    not (find_spec("silero_vad") and find_spec("pocketsphinx")), reason="needs silero-vad and pocketsphinx ([audio])"
)
needs_voice = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng to make speech")


def tone(seconds: float, loudness: float = 0.5, rate: int = RATE) -> np.ndarray:
    """A tone (n,) of 440 Hz."""
    times = np.arange(round(seconds * rate), dtype=np.float32) / rate
    return np.float32(loudness) * np.sin(2 * np.pi * 440 * times)


def write_media(path: Path, sound: np.ndarray | None, rate: int = RATE, title: str = "") -> Path:
    """A file with a black picture and, unless None, mono sound (n,) float32."""
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        picture = container.add_stream("mpeg4", rate=10)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuv420p"
        audio = None if sound is None else container.add_stream("pcm_s16le", rate=rate, layout="mono")
        black = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        for packet in [*picture.encode(black), *picture.encode(None)]:
            container.mux(packet)
        if audio is not None and sound is not None:
            samples = (sound * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = rate
            for packet in [*audio.encode(frame), *audio.encode(None)]:
                container.mux(packet)
    return path


def synthesized(text: str, folder: Path) -> np.ndarray:
    wav = folder / "speech.wav"
    subprocess.run(["espeak-ng", "-v", "en-us+f3", "-s", "120", "-w", str(wav), text], check=True)
    return read_sound(wav)


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        ([("Speech", 0.5), ("Music", 0.2), ("Dog", -3.0)], True),
        ([("Music", 1.6), ("Speech", 0.5), ("Dog", -3.0)], True),  # exactly the margin
        ([("Music", 1.7), ("Speech", 0.5), ("Dog", -3.0)], False),
        ([("Music", 1.7), ("Male speech, man speaking", 0.7), ("Speech", 0.5)], True),  # the first of the speech tags
        ([("Female speech, woman speaking", -4.9)], True),
        ([("Speech", -5.0)], False),
        ([("Dog", 2.0), ("Bark", 1.0), ("Animal", 0.9), ("Speech", 0.8)], False),  # the fourth
        ([], False),
    ],
)
def test_the_published_filter(tags: list[tuple[str, float]], kept: bool) -> None:
    assert is_speech(tags) == kept


def test_sound_is_resampled_to_mono(tmp_path: Path) -> None:
    sound = read_sound(write_media(tmp_path / "a.mkv", tone(1, rate=44_100), 44_100))
    assert abs(len(sound) - RATE) < 50
    assert np.abs(np.fft.rfft(sound)).argmax() == pytest.approx(440, abs=2)


def test_files_without_sound_and_damaged_files(tmp_path: Path) -> None:
    assert read_sound(write_media(tmp_path / "a.mkv", None)).shape == (0,)
    (tmp_path / "b.mkv").write_bytes(b"no video")
    with pytest.raises(DecodeError, match=r"b\.mkv"):
        read_sound(tmp_path / "b.mkv")


@needs_packages
def test_tones_and_silence_are_no_voice() -> None:
    assert voice_segments(tone(2)) == voice_segments(np.zeros(RATE, np.float32)) == voice_segments(tone(0)) == []


@needs_packages
@needs_voice
def test_a_folder_is_transcribed_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, output = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    silence = np.zeros(RATE, np.float32)
    speech = synthesized("the man is walking down the street", tmp_path)
    sound = np.concatenate([silence, speech, silence])
    write_media(videos / "a.mkv", sound)
    write_media(videos / "b.mkv", None)
    (videos / "c.mkv").write_bytes(b"no video")
    flags = ["--videos", str(videos), "--output", str(output), "--failure-budget", "0.5"]
    assert main(flags) == 0
    made = json.loads((output / "a.json").read_text())
    assert made["language"] == "en" and made["duration"] == pytest.approx(2 + len(speech) / RATE, abs=0.01)
    start, end = made["segments"][0]["start"], made["segments"][-1]["end"]
    assert start == pytest.approx(1, abs=0.3) and end == pytest.approx(1 + len(speech) / RATE, abs=0.8)
    assert "man is walking" in made["transcript"]
    assert read_transcript(output / "a.json") == made["transcript"]
    assert read_transcript(output / "b.json") is None
    assert [failure.id for failure in read_failures(output / LEDGER)] == ["c"]
    made_alone = (output / "a.json").read_bytes()
    before = {file.name: file.read_bytes() for file in output.glob("?.json")}
    (output / "a.json").unlink()
    assert main(flags) == 0
    assert {file.name: file.read_bytes() for file in output.glob("?.json")} == before
    write_media(videos / "0.mkv", sound)
    (output / "a.json").unlink()
    assert main(flags) == 0
    assert (output / "a.json").read_bytes() == made_alone, "another sound before it changes nothing"
    assert main([*flags, "--threshold", "0.7"]) == 1
    assert "give another --output" in capsys.readouterr().err


class FakeSpeech:
    """Speech to text that writes the length of what it hears, and a language by the loudness."""

    heard: ClassVar[list[int]] = []

    def language(self, sound: np.ndarray) -> str:
        self.heard.append(len(sound))
        return "de" if sound.max() > 0.7 else "en"

    def text(self, sound: np.ndarray) -> str:
        return f"{len(sound) / RATE:g} s"


def fake_voice(sound: np.ndarray, threshold: float = 0.5) -> list[tuple[int, int]]:
    """Each second is speech, apart from the first."""
    return [(start, start + RATE) for start in range(RATE, len(sound), RATE)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """English in a and b, German in c, and d without sound; with fake models."""
    monkeypatch.setattr(run, "voice_segments", fake_voice)
    monkeypatch.setattr(run, "PocketSphinx", FakeSpeech)
    (tmp_path / "videos").mkdir()
    for name, sound in (("a", tone(3)), ("b", tone(2)), ("c", tone(3, 0.9)), ("d", None)):
        write_media(tmp_path / f"videos/{name}.mkv", sound)
    return tmp_path


def transcribe_folder(folder: Path, output: str, *more: str) -> int:
    return main(["--videos", f"{folder}/videos", "--output", f"{folder}/{output}", *more])


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("?.json"))}


def test_files_of_a_folder(folder: Path) -> None:
    assert transcribe_folder(folder, "out") == 0
    made = {name: json.loads(content) for name, content in read(folder / "out").items()}
    assert [m["transcript"] for m in made.values()] == ["1 s 1 s", "1 s", "", ""]
    assert [m["language"] for m in made.values()] == ["en", "en", "de", None]
    assert [m["duration"] for m in made.values()] == [3, 2, 3, 0]
    assert made["a.json"]["segments"][1] == {"start": 2, "end": 3, "text": "1 s", "kept": True, "tags": []}


def test_a_killed_run_and_parts_make_the_same_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, *content: Any) -> None:
        if path.name == "b.json":
            raise KeyboardInterrupt
        write_transcript(path, *content)

    assert transcribe_folder(folder, "out") == 0
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_transcript", killed)
        assert transcribe_folder(folder, "cut") == 130
    assert list(read(folder / "cut")) == ["a.json"]
    assert transcribe_folder(folder, "cut") == 0
    assert transcribe_folder(folder, "parts", "--part", "2/2") == 0
    assert list(read(folder / "parts")) == ["b.json", "d.json"]
    assert transcribe_folder(folder, "parts", "--part", "1/2") == 0
    assert read(folder / "out") == read(folder / "cut") == read(folder / "parts")


def test_another_video_of_the_same_name_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transcribe_folder(folder, "out") == 0
    write_media(folder / "videos/a.mkv", tone(4))
    assert transcribe_folder(folder, "out") == 1
    assert "a.json: the transcript of another video than" in capsys.readouterr().err


def test_settings_are_hidden_and_damaged_ones_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "videos/a.mkv").rename(folder / "videos/settings.mkv")
    assert transcribe_folder(folder, "out") == 0
    assert json.loads((folder / "out/settings.json").read_text())["transcript"] == "1 s 1 s"
    (folder / "out" / SETTINGS).write_text("{")
    assert transcribe_folder(folder, "out") == 1
    assert f"{SETTINGS}: damaged" in capsys.readouterr().err


def test_the_language_is_that_of_thirty_seconds_of_speech(folder: Path) -> None:
    FakeSpeech.heard.clear()
    run.transcribe(write_media(folder / "long.mkv", tone(40)), folder / "long.json", FakeSpeech())
    assert FakeSpeech.heard == [30 * RATE]


def test_titles_addresses_and_changes_of_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_media(tmp_path / "a.mkv", tone(1), title="Xhibit Q")
    content = file.read_bytes()
    assert b"Xhibit Q" in content
    (tmp_path / "a:b.mkv").write_bytes(content.replace(b"Xhibit Q", b"\xe9hibit Q"))
    monkeypatch.chdir(tmp_path)
    assert len(read_sound(Path("a:b.mkv"))) == RATE
    parts = []
    for rate, layout, channels in ((44_100, "stereo", 2), (22_050, "mono", 1)):
        with av.open(str(tmp_path / "part.aac"), "w", format="adts") as container:
            stream = container.add_stream("aac", rate=rate, layout=layout)
            frame = av.AudioFrame.from_ndarray(np.stack([tone(1, rate=rate)] * channels), "fltp", layout)
            frame.sample_rate = rate
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
        parts.append((tmp_path / "part.aac").read_bytes())
    (tmp_path / "both.aac").write_bytes(b"".join(parts))
    sound = read_sound(tmp_path / "both.aac")
    assert len(sound) / RATE == pytest.approx(2, abs=0.15)
    for second in (0.1, 1.2):
        part = sound[round(second * RATE) :][: RATE // 2]
        assert np.abs(np.fft.rfft(part)).argmax() * 2 == pytest.approx(440, abs=4)


@pytest.mark.parametrize("failure", [ValueError("Frame does not match AudioResampler setup."), OSError("broken")])
def test_other_errors_of_the_decoder_are_decode_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(frames: object) -> None:
        raise failure

    monkeypatch.setattr("dataloaders.transcripts.sound._resampled", fail)
    with pytest.raises(DecodeError, match=r"a\.mkv: "):
        read_sound(write_media(tmp_path / "a.mkv", tone(1)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "gpu"], "--device is cpu, cuda, or one GPU"),
        (["--device", "cuda"], "--device cuda is for --model or --tagger"),
        (["--threshold", "2"], "--threshold is a probability"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--videos", "v", "--output", "o", *flags])
    assert message in capsys.readouterr().err


def test_settings_hold_what_the_models_folder_holds(tmp_path: Path) -> None:
    (tmp_path / "whisper").mkdir()
    flags = TranscriptFlags(videos=tmp_path, output=tmp_path, model=tmp_path / "whisper")
    before = flags.settings()
    (tmp_path / "whisper/model.safetensors").write_bytes(b"weights")
    assert flags.settings() != before
    assert str(flags.settings()["model"]).startswith("whisper (")


def test_transcripts_in_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" Hello. \n")
    assert read_transcript(tmp_path / "a.txt") == "Hello."
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match="no transcript"):
        read_transcript(tmp_path / "b.json")
