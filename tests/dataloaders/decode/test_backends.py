"""PyAV, torchcodec and DALI decode the same frames from every kind of file, and so give the same features."""

from __future__ import annotations

import importlib.util
from concurrent.futures import Future
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal
from weakref import WeakSet

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from bench.frame_cases import picture
from bench.media import link_ffmpeg
from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.dali import pipeline as dali_pipeline
from dataloaders.decode.dali.agreement import compare, surroundings
from dataloaders.decode.dali.request import DecodeRequest, prepare
from dataloaders.decode.dali.sessions import ON_CPU, on_gpu
from dataloaders.decode.decoder import Decoded, DecodePool, decode_cropped
from dataloaders.decode.orientation import UPRIGHT
from dataloaders.decode.preprocess import Preprocess
from dataloaders.decode.sampling import frame_indices
from dataloaders.decode.video import Probe, probe
from dataloaders.records import Media
from pite.clip import ClipEncoder
from tests.clips import SIZE, save_clip
from tests.damage import garbled
from tests.media import TWO_PASS, needs_dali

N = 7
PREPROCESS = Preprocess(SIZE, SIZE)
VP9 = {"cpu-used": "8"}
DIFFERENCE = 3
"""Mean difference, of 255: DALI interpolates colour differently."""

needs_torchcodec = pytest.mark.skipif(
    importlib.util.find_spec("torchcodec") is None, reason="torchcodec is not installed: pip install torchcodec"
)


def write(
    path: Path,
    codec: str,
    options: dict[str, str] | None = None,
    *,
    frames: int = 40,
    size: tuple[int, int] = (96, 72),
    rotation: int = 0,
    times: list[int] | None = None,
    bt709: bool = False,
) -> Path:
    """A video of the moving scene; `times` in milliseconds for a variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec != "mjpeg":
            stream.codec_context.gop_size = 12
        stream.bit_rate = 4_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if bt709:
            stream.codec_context.colorspace = 1
        if rotation:
            stream.set_display_rotation(rotation)
        container.start_encoding()
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, size), format="rgb24")
            if bt709:
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts = i if times is None else times[i]
            frame.time_base = Fraction(1, 10) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def hide_frames(path: Path, which: list[int]) -> Path:
    """Mark some frames of a VP8 file as hidden, as encoders do with frames that are references only."""
    content = path.read_bytes()
    with av.open(str(path)) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    for i in which:
        content = content.replace(packets[i], bytes([packets[i][0] & ~0x10]) + packets[i][1:])
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Media]:
    d = tmp_path_factory.mktemp("kinds")
    late = [7 * i * i + 10 * i for i in range(40)]
    hevc = {"x265-params": "log-level=none"}
    files = {
        "H.264 with B-frames": write(d / "b.mp4", "libx264", {"bf": "3"}),
        "H.264 with open GOPs": write(d / "open.mp4", "libx264", {"x264-params": "open-gop=1:bframes=3"}),
        "H.264, rotated": write(d / "rotated.mp4", "libx264", rotation=90),
        "H.264, variable frame rate": write(d / "vfr.mp4", "libx264", {"bf": "2"}, times=late),
        "HEVC": write(d / "hevc.mkv", "libx265", hevc),
        "MPEG-4, odd size": write(d / "mpeg4.mp4", "mpeg4", {"bf": "2"}, size=(97, 71)),
        "MJPEG": write(d / "mjpeg.avi", "mjpeg", {"qmin": "1", "qmax": "2"}),
        "VP8": write(d / "vp8.webm", "libvpx", VP9),
        "VP8 with hidden frames": hide_frames(write(d / "hidden.webm", "libvpx", VP9), [5, 17]),
        "VP9": write(d / "vp9.webm", "libvpx-vp9", VP9),
        "VP9 with hidden frames": TWO_PASS,
        "VP9 in MP4": write(d / "vp9.mp4", "libvpx-vp9", VP9),
        "VP9, BT.709": write(d / "bt709.webm", "libvpx-vp9", VP9, bt709=True),
        "VP9, odd size": write(d / "odd.webm", "libvpx-vp9", VP9, size=(97, 71)),
        "VP9, portrait": write(d / "tall.webm", "libvpx-vp9", VP9, size=(72, 96)),
        "VP9, rotated": write(d / "turned.mp4", "libvpx-vp9", VP9, rotation=180),
        "VP9, short": write(d / "short.webm", "libvpx-vp9", VP9, frames=3),
        "VP9, variable frame rate": write(d / "late.webm", "libvpx-vp9", VP9, times=late),
    }
    media = {name: Media(name, path) for name, path in files.items()}
    for name, path in {"VP9, a clip": "vp9.webm", "H.264, a clip": "b.mp4"}.items():
        media[name] = Media(name, d / path, clip=(1.05, 3.2))
    media["VP9, variable frame rate, a clip"] = Media("vfr clip", d / "late.webm", clip=(1.0, 5.0))
    return media


@pytest.fixture(scope="module")
def expected(videos: dict[str, Media]) -> dict[str, np.ndarray]:
    return {name: decode_cropped(m, N, PREPROCESS) for name, m in videos.items()}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ClipEncoder:
    directory = tmp_path_factory.mktemp("clip")
    save_clip(directory)
    return ClipEncoder(str(directory))


def features(encoder: ClipEncoder, frames: np.ndarray) -> torch.Tensor:
    """Features (n, channels), normalised to unit length."""
    return torch.nn.functional.normalize(encoder.encode(frames).double(), dim=-1)


def which(frames: np.ndarray, of: np.ndarray) -> list[int]:
    """The index in `of` of the frame most like each of `frames`."""
    differences = np.abs(frames[:, None].astype(np.int16) - of[None]).mean((2, 3, 4))
    return differences.argmin(1).tolist()


def test_the_comparison_can_tell_frames_apart(videos: dict[str, Media]) -> None:
    """Each frame differs from its neighbour by more than the decoders may differ."""
    frames = decode_cropped(videos["VP9"], 40, PREPROCESS)
    assert np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3)).min() > 2 * DIFFERENCE


@pytest.mark.parametrize("name", ["VP8 with hidden frames", "H.264 with B-frames", "VP9, a clip"])
def test_probe_counts_shown_frames(videos: dict[str, Media], name: str) -> None:
    media = videos[name]
    known = probe(media.path, media.clip)
    hidden = name == "VP8 with hidden frames"
    first, total = (11, 21) if media.clip else (0, 38 if hidden else 40)
    coded = (96, 80 if name[0] == "H" else 72)
    codec, matrix = {"VP8": ("vp8", 5), "H.2": ("h264", 2), "VP9": ("vp9", 2)}[name[:3]]
    assert known == Probe(codec, "yuv420p", 96, 72, UPRIGHT, matrix, False, coded, False, known.packets)
    assert (known.first, known.total, known.regular) == (first, total, not hidden)


@needs_torchcodec
def test_torchcodec(
    videos: dict[str, Media], expected: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, since both use FFmpeg. PyAV's wheel has its libraries under other names, hence the links."""
    link_ffmpeg(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    decode = partial(decode_cropped, num_frames=N, preprocess=PREPROCESS, reader="torchcodec")
    with DecodePool(decode, 1, by="torchcodec") as pool:
        results = dict(zip(videos, pool.map(videos.values())))
        cut = tmp_path / "cut.webm"
        cut.write_bytes(videos["VP9"].path.read_bytes()[:3000])
        assert "cut off" in next(pool.map([Media("cut", cut)])).reason
    for name, result in results.items():
        assert isinstance(result.frames, np.ndarray), result.reason
        if "odd size" in name:
            # They interpolate the colour of the last column and row differently.
            assert np.abs(result.frames.astype(int) - expected[name]).mean() < DIFFERENCE, name
        else:
            np.testing.assert_array_equal(result.frames, expected[name], err_msg=name)


@needs_dali
class TestDali:
    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, videos: dict[str, Media]) -> dict[str, Decoded]:
        with dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1, sessions=replace(ON_CPU, batch=4)) as decoder:
            return dict(zip(videos, decoder.map(videos.values())))

    def test_which_decoder_decodes_what(self, results: dict[str, Decoded]) -> None:
        """PyAV decodes what this DALI cannot decode or decodes differently; the result names the reason."""
        decoders = {name: result.by for name, result in results.items()}
        assert {name for name, by in decoders.items() if by.startswith("DALI")} == {
            "MJPEG",
            "VP8",
            *(
                name
                for name in results
                if name.startswith("VP9") and name not in ("VP9, rotated", "VP9, odd size", "VP9 with hidden frames")
            ),
        }
        assert decoders["VP9, odd size"] == "PyAV (odd size)"
        assert decoders["VP9 with hidden frames"] == "PyAV (hidden pictures)"
        assert decoders["VP9, rotated"] == "PyAV (rotated or mirrored)"
        assert decoders["VP8 with hidden frames"] == "PyAV (packets without a frame)"
        assert decoders["HEVC"] == "PyAV (DALI has no hevc on cpu)"
        assert decoders["VP9"] == "DALI (vp9)"

    def test_same_frames(self, results: dict[str, Decoded], videos: dict[str, Media]) -> None:
        for name, result in results.items():
            assert isinstance(result.frames, np.ndarray), result.reason
            known = probe(videos[name].path)
            every = decode_cropped(Media("", videos[name].path), known.total, PREPROCESS)
            clip = probe(videos[name].path, videos[name].clip)
            indices = clip.first + frame_indices(clip.total, N)
            assert which(result.frames, every) == indices.tolist(), name

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu(self, tmp_path: Path) -> None:
        """NVDEC's frames stay on the GPU and are those of PyAV, frame by frame; sizes are those that NVDEC accepts."""
        size, d = (192, 144), tmp_path
        files = {
            "H.264 with B-frames": write(d / "b.mp4", "libx264", {"bf": "3"}, size=size),
            "H.264 with open GOPs": write(
                d / "open.mp4", "libx264", {"x264-params": "open-gop=1:bframes=3"}, size=size
            ),
            "H.264 of the same coded size": write(d / "crop.mp4", "libx264", size=(192, 134)),
            "HEVC": write(d / "hevc.mkv", "libx265", {"x265-params": "log-level=none"}, size=size),
            "VP9": write(d / "vp9.webm", "libvpx-vp9", VP9, size=size),
        }
        media = [Media(name, path) for name, path in files.items()]
        media += [Media(f"{m.key}, a clip", m.path, clip=(1.05, 3.2)) for m in media] + [Media("two passes", TWO_PASS)]
        with dali.DaliDecoder("video", N, PREPROCESS, "cuda", workers=2, sessions=on_gpu(4)) as decoder:
            results = list(decoder.map(media))
        for m, result in zip(media, results):
            assert result.frames is not None, result.reason
            assert result.by.startswith("PyAV (hidden" if m.key == "two passes" else "DALI ("), (m.key, result.by)
            ours = result.frames if isinstance(result.frames, np.ndarray) else result.frames.cpu().numpy()
            agreement = compare(ours, surroundings(m, N, PREPROCESS).frames)
            assert agreement and agreement.difference < DIFFERENCE, (m.key, str(agreement))

    def test_same_features(
        self, results: dict[str, Decoded], expected: dict[str, np.ndarray], encoder: ClipEncoder
    ) -> None:
        for name, result in results.items():
            assert isinstance(result.frames, np.ndarray)
            difference = np.abs(result.frames.astype(int) - expected[name])
            assert difference.mean() < DIFFERENCE, name
            one, two = features(encoder, result.frames), features(encoder, expected[name])
            assert (one * two).sum(-1).min() >= 0.999, name
            # A random CLIP sees all frames as similar, yet each is nearest to itself.
            indices = [list(map(bytes, expected[name])).index(bytes(frame)) for frame in expected[name]]
            assert (one @ two.T).argmax(1).tolist() == indices, name

    @pytest.mark.parametrize("noise", [False, True], ids=["picture", "noise"])
    @pytest.mark.parametrize(
        "size", [(320, 240), (640, 360), (361, 643), (1280, 720), (224, 224), (100, 97), (230, 600)]
    )
    def test_preprocessing(self, tmp_path: Path, size: tuple[int, int], noise: bool) -> None:
        """On a still, whose pixels are the same for both: within 2/255 of CLIPImageProcessor (6/255 required)."""
        white = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(white if noise else picture(3, size)).save(tmp_path / "a.jpg", quality=95, subsampling=0)
        with dali.DaliDecoder("image", 1, Preprocess(), "cpu", workers=1) as decoder:
            (result,) = decoder.map([Media("a", tmp_path / "a.jpg", "image")])
        assert result.by == "DALI (jpeg)" and isinstance(result.frames, np.ndarray)
        with Image.open(tmp_path / "a.jpg") as image:
            reference = CLIPImageProcessorPil()(images=[image], return_tensors="pt")["pixel_values"]
        ours = Preprocess().normalized(torch.from_numpy(result.frames))
        scale = torch.tensor(Preprocess.std).view(3, 1, 1)
        assert ((ours - reference) * scale).abs().max() <= 2 / 255 + 1e-5

    def test_stills(self, tmp_path: Path) -> None:
        image = Image.fromarray(picture(3, (96, 72)))
        turned = Image.Exif()
        turned[0x0112] = 6
        image.save(tmp_path / "plain.jpg")
        image.save(tmp_path / "turned.jpg", exif=turned)
        image.save(tmp_path / "progressive.jpg", progressive=True)
        image.convert("L").save(tmp_path / "grey.jpg")
        image.convert("CMYK").save(tmp_path / "cmyk.jpg")
        image.save(tmp_path / "png.jpg", format="PNG")
        content = (tmp_path / "plain.jpg").read_bytes()
        (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
        (tmp_path / "noise.jpg").write_bytes(content[:300] + b"\x00\xff\x55" * 200 + b"\xff\xd9")
        (tmp_path / "empty.jpg").touch()
        names = ["plain", "turned", "cut", "progressive", "noise", "grey", "cmyk", "empty", "png", "plain", "missing"]
        media = [Media(f"{name}{i}", tmp_path / f"{name}.jpg", "image") for i, name in enumerate(names)]
        with dali.DaliDecoder("image", 1, PREPROCESS, "cpu", workers=1, sessions=replace(ON_CPU, batch=3)) as decoder:
            results = list(decoder.map(media))
        assert [r.media for r in results] == media
        for name, result in zip(names, results):
            if name in ("cut", "noise", "empty", "missing"):
                assert result.frames is None and f"{name}.jpg: " in result.reason
                continue
            assert isinstance(result.frames, np.ndarray)
            right = decode_cropped(result.media, 1, PREPROCESS)
            assert np.abs(result.frames.astype(int) - right).max() <= 2, name
            assert result.by.startswith("PyAV" if name in ("cmyk", "png") else "DALI"), (name, result.by)

    def test_a_bad_file_costs_no_other_file(self, videos: dict[str, Media], tmp_path: Path) -> None:
        """Bytes changed inside frames pass the probe and fail in the pipeline, which then fails for the whole batch."""
        good = videos["VP9"]
        with dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1, sessions=replace(ON_CPU, batch=4)) as decoder:
            (alone,) = decoder.map([good])
        media = []
        for i in range(20):
            if i % 5 != 3:
                media.append(Media(str(i), good.path))
                continue
            bad = tmp_path / f"{i}.webm"
            bad.write_bytes(garbled(good.path.read_bytes(), np.random.default_rng(i), tmp_path))
            media.append(Media(str(i), bad))
        with dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1, sessions=replace(ON_CPU, batch=4)) as decoder:
            builds = 0
            build, alive = decoder._build, WeakSet(decoder._pipelines)

            def count() -> dali.Pipeline:
                nonlocal builds
                builds += 1
                alive.add(pipeline := build())
                return pipeline

            decoder._build = count
            results = list(decoder.map(media))
            assert list(alive) == decoder._pipelines, "a failed pipeline frees its memory at once"
        assert builds >= 4, "the pipeline never failed: the files are not bad enough"
        assert [r.media for r in results] == media
        for i, result in enumerate(results):
            if i % 5 == 3:
                assert result.frames is None and f"{i}.webm: " in result.reason
            else:
                np.testing.assert_array_equal(result.frames, alone.frames)

    def test_missing_frames_are_not_returned_as_black(self, videos: dict[str, Media]) -> None:
        """DALI returns black for an index beyond the end, without an error; PyAV then decodes the file."""
        request = prepare(videos["VP9"], N, PREPROCESS, "cpu")
        assert isinstance(request, DecodeRequest)
        beyond = replace(request, indices=request.indices + 20)
        with dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1) as decoder:
            decoder._pipelines[0].start([beyond])
            (frames,) = decoder._pipelines[0].finish([beyond], 60)
            assert frames[0].any() and not frames[-1].any()
            result = decoder._result(beyond, frames)
            assert isinstance(result, Future)
            decoded = result.result()
        assert decoded.by == "PyAV (its last frame is black)"
        np.testing.assert_array_equal(decoded.frames, decode_cropped(videos["VP9"], N, PREPROCESS))

    def test_colours_that_dali_decodes_wrongly_are_decoded_by_pyav(
        self, videos: dict[str, Media], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(dali_pipeline, "FROM_601_TO_709", np.eye(3, dtype=np.float32))
        media = [videos["VP9, BT.709"], videos["VP9"], videos["VP9, BT.709"]]
        with dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1) as decoder:
            by = [result.by for result in decoder.map(media)]
        assert by == [wrong := "PyAV (DALI decodes vp9 with colour matrix 1 differently)", "DALI (vp9)", wrong]
        assert "falling back to PyAV for it" in caplog.text

    def test_a_pipeline_that_cannot_be_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: object) -> None:
            raise RuntimeError("Critical error when building pipeline: no driver")

        monkeypatch.setattr(dali, "Pipeline", fail)
        with pytest.raises(ValueError, match=r"DALI cannot decode on cpu here \(.*no driver\); use pyav"):
            dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1)

    @pytest.mark.parametrize("kind", ["video", "image"])
    def test_dali_that_does_not_work_is_refused_at_the_start(
        self, monkeypatch: pytest.MonkeyPatch, kind: Literal["video", "image"]
    ) -> None:
        """As in a container whose driver decodes nothing: before the first file, so that it does not depend on the files."""

        def fail(self: dali.Pipeline, requests: list[DecodeRequest]) -> None:
            raise RuntimeError("encountered: NVDEC is not there")

        monkeypatch.setattr(dali.Pipeline, "start", fail)
        with pytest.raises(ValueError, match=r"DALI cannot decode on cpu here \(NVDEC is not there\); use pyav"):
            dali.DaliDecoder(kind, N, PREPROCESS, "cpu", workers=1)

    def test_a_trial_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dali.Pipeline, "_await", lambda *_: None)
        with pytest.raises(ValueError, match=r"DALI cannot decode on cpu here \(DALI timed out after 0\.1 s\)"):
            dali.DaliDecoder("video", N, PREPROCESS, "cpu", workers=1, time_limit=0.1)
