"""Transcripts: voice activity, the published filter, and a folder that is killed and resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

from dataloaders.decode.readable import DecodeError
from dataloaders.failures import LEDGER, read_failures
from dataloaders.transcripts import read_transcript
from dataloaders.transcripts.__main__ import main
from dataloaders.transcripts.sound import RATE, is_speech, read_sound, voice_segments

needs_packages = pytest.mark.skipif(
    not (find_spec("silero_vad") and find_spec("pocketsphinx")), reason="needs silero-vad and pocketsphinx ([audio])"
)
needs_voice = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng to make speech")


def write_media(path: Path, sound: np.ndarray | None, rate: int = RATE) -> Path:
    """A file with a black picture and, unless None, mono sound (n,) float32."""
    with av.open(str(path), "w") as container:
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
    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32) * 0.5
    sound = read_sound(write_media(tmp_path / "a.mkv", tone, 44_100))
    assert abs(len(sound) - RATE) < 50
    assert np.abs(np.fft.rfft(sound)).argmax() == pytest.approx(440, abs=2)


def test_files_without_sound_and_damaged_files(tmp_path: Path) -> None:
    assert read_sound(write_media(tmp_path / "a.mkv", None)).shape == (0,)
    (tmp_path / "b.mkv").write_bytes(b"no video")
    with pytest.raises(DecodeError, match=r"b\.mkv"):
        read_sound(tmp_path / "b.mkv")


@needs_packages
def test_tones_and_silence_are_no_voice() -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE).astype(np.float32) * 0.5
    assert voice_segments(tone) == voice_segments(np.zeros(RATE, np.float32)) == voice_segments(tone[:0]) == []


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


def test_a_tiny_whisper_gives_segments(tmp_path: Path) -> None:
    """A Whisper with random weights and its own files: loaded by path, without the network."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from dataloaders.transcripts.speech import Whisper

    config = WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, max_target_positions=32,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_length = 8
    model.save_pretrained(tmp_path)
    _save_processor(tmp_path)
    speech = Whisper(tmp_path)
    sound = np.random.default_rng(0).normal(0, 0.1, 2 * RATE).astype(np.float32)
    assert speech.language(sound) == "en"
    assert speech.text(sound) == speech.text(sound)
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        Whisper(tmp_path / "none")


def _save_processor(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(56))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def test_transcripts_in_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" Hello. \n")
    assert read_transcript(tmp_path / "a.txt") == "Hello."
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match="no transcript"):
        read_transcript(tmp_path / "b.json")
