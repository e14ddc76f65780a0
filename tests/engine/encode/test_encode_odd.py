"""A folder of odd files as the web has them: each is encoded with the right frames, or in the ledger with the reason."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.decode.decoder import decode_cropped
from dataloaders.decode.sampling import frame_indices
from dataloaders.failures import read_failures
from dataloaders.formats.fields import locate, names_in
from dataloaders.records import Media
from dataloaders.store.features import FeatureStore
from engine.encode.config import EncodeConfig
from engine.encode.run import encode
from pite.clip import ClipEncoder
from tests.media import truncate, which_frame, write_audio, write_video
from tests.odd_media import (
    FINE,
    MATRICES,
    Track,
    picture,
    write_heic,
    write_long_webp,
    write_matrix,
    write_piped,
    write_resized,
    write_tracks,
)

N = 5
STILL = 20
"""The frame whose picture all stills hold."""
FILM = Track(20, default=True)
COVER = Track(1, size=(48, 80), offset=50, codec="mjpeg", default=False)
PREVIEW = Track(4, size=(32, 24), offset=50, default=False)

Expected = dict[str, tuple[tuple[float, float] | None, list[int] | str]]
"""Name -> the clip, and the frames that are right or the pattern of the reason."""


def frames(total: int, first: int = 0) -> list[int]:
    return (first + frame_indices(total, N)).tolist()


def good_videos(d: Path) -> Expected:
    nfd, vp9 = unicodedata.normalize("NFD", "café"), {"cpu-used": "8"}
    for suffix, codec, options in [
        (".webm", "libvpx-vp9", vp9),
        (".mkv", "libx265", {"x265-params": "log-level=none"}),
        (".flv", "libx264", {}),
        (".3gp", "mpeg4", FINE),
        (".mpg", "mpeg2video", FINE),
        (".wmv", "wmv2", FINE),
        (".mov", "libx264", {}),
    ]:
        rate = 25 if suffix == ".mpg" else 10
        write_video(d / f"as{suffix}", 20, codec=codec, options=options, rate=rate).rename(
            d / f"as_{suffix[1:]}{suffix}"
        )
    write_video(d / "v.webm", 20, codec="libvpx", options=vp9).rename(d / "renamed.mp4")
    write_video(d / "UPPER.MP4", 20)
    write_video(d / "v.mp4", 20).rename(d / f"{nfd}.mp4")
    write_video(d / "v.mp4", 20).rename(d / "a:b.mp4")
    write_video(d / "fragmented.mp4", 20, container_options={"movflags": "frag_keyframe+empty_moov"})
    write_video(d / "odd_size.mkv", 20, codec="mpeg4", options=FINE, size=(65, 47))
    write_video(d / "one_frame.mp4", 1)
    write_video(d / "uneven.mp4", 40, times=[7 * i * i + 10 * i for i in range(40)])
    write_video(d / "reordered.avi", 40, options={"bf": "3"})
    write_video(d / "reordered_clip.avi", 40, options={"bf": "3"})
    for name, matrix in MATRICES.items():
        write_matrix(d / f"{name}.mp4", matrix, 20)
    for suffix in (".mp4", ".mkv"):
        write_tracks(d / f"late_{suffix[1:]}{suffix}", [Track(20, start=3.0)], sound=5.0)
        write_tracks(d / f"cover_{suffix[1:]}{suffix}", [COVER, FILM])
        write_tracks(d / f"preview_{suffix[1:]}{suffix}", [PREVIEW, FILM])
    write_tracks(d / "late_whole.mp4", [Track(20, start=3.0)], sound=5.0)
    write_tracks(d / "default_cover.mkv", [Track(1, offset=50, default=True), Track(20, default=False)])
    write_tracks(d / "slides.mp4", [Track(6)], last=6.0)
    write_tracks(d / "from_1000_s.ts", [Track(20, start=1000.0)])
    write_tracks(d / "motion_jpeg.avi", [Track(20, codec="mjpeg")])
    write_piped(d / "piped.avi")
    write_resized(d / "resized.ts")
    pictures = [Image.fromarray(picture(i)) for i in range(20)]
    pictures[0].save(d / "animation.gif", save_all=True, append_images=pictures[1:], duration=100)
    names = [path.stem for path in d.iterdir()]
    whole: Expected = {
        unicodedata.normalize("NFC", name).replace("UPPER", "upper"): (None, frames(20)) for name in names
    }
    return whole | {
        "one_frame": (None, [0] * N),
        "uneven": (None, frames(40)),
        "reordered": (None, frames(40)),
        "reordered_clip": ((2.0, 3.0), frames(10, 20)),
        "late_mp4": ((3.5, 4.5), frames(10, 5)),
        "late_mkv": ((3.5, 4.5), frames(10, 5)),
        "slides": ((0.4, 6.0), [4, 4, 4, 4, 5]),
        "from_1000_s": ((0.5, 1.5), frames(10, 5)),
    }


def bad_videos(d: Path) -> Expected:
    whole = write_video(d / "beyond.mp4", 20)
    truncate(whole, d / "cut.mp4", 0.6)
    write_audio(d / "audio.mp4")
    write_tracks(d / "before.mp4", [Track(20, start=3.0)], sound=5.0)
    (d / "page.mp4").write_text("<html>404 Not Found</html>")
    (d / "empty.mp4").touch()
    for form in ("AVIF", "PNG"):
        Image.fromarray(picture(3)).save(d / f"{form}.mp4", form)
    return {
        "beyond": ((0.5, 9.0), "last frame is at 1.90 s, before the clip's end at 9 s"),
        "cut": (None, "cut off"),
        "audio": (None, "holds no video stream"),
        "before": ((0.5, 2.0), r"holds no frame between 0\.5 and 2 s"),
        "page": (None, "is it a video"),
        "empty": (None, "the file is empty"),
        "AVIF": (None, r"a still image \(avif or heic\), not a video"),
        "PNG": (None, r"a still image \(png\), not a video"),
        "missing": (None, "No such file"),
    }


def stills(d: Path) -> Expected:
    image = Image.fromarray(picture(STILL))
    for form in ("PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"):
        image.save(d / f"{form}.jpg", form)
    levels = picture(STILL)[..., 0].astype(np.uint16) * 257
    for form in ("PNG", "TIFF"):
        Image.fromarray(levels).save(d / f"grey16_{form}.jpg", form)
    image.convert("CMYK").save(d / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 3
    image.rotate(180).save(d / "turned.jpg", exif=exif)
    clear = np.dstack([picture(STILL), np.zeros((48, 64), np.uint8)])
    clear[12:36, 16:48, 3] = 255
    Image.fromarray(clear).save(d / "transparent.png")
    Image.fromarray(np.where(clear[..., 3:] > 0, clear, 0)).save(d / "transparent_webp.jpg", "WEBP", lossless=True)
    for size in ((1, 30000), (60000, 1)):
        Image.new("RGB", size, (4 * STILL,) * 3).save(d / f"long{size[0]}.png")
    write_long_webp(d / "long_webp.jpg")
    names = [path.stem for path in d.iterdir()]
    write_heic(d / "heic.jpg")
    Image.fromarray(np.ones((9, 9), np.float32)).save(d / "float.jpg", "TIFF")
    image.save(d / "v.jpg")
    truncate(d / "v.jpg", d / "cut_jpeg.jpg", 0.5)
    return {name: (None, [STILL]) for name in names} | {
        "heic": (None, "a HEIC image, which Pillow does not support"),
        "float": (None, "its pixels have 32 bits, without the value of white"),
        "cut_jpeg": (None, "(?i)truncated"),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected]:
    """A data folder, and what is expected of each key."""
    data = tmp_path_factory.mktemp("odd") / "data"
    videos, images = data / "stage2/videos", data / "stage1/images"
    videos.mkdir(parents=True)
    images.mkdir(parents=True)
    filmed, shot = good_videos(videos), stills(images)
    filmed |= bad_videos(videos)
    records = [
        {"id": name, "conversations": [], "meta": {"split": clip, "duration": clip and clip[1] - clip[0]}}
        for name, (clip, _) in filmed.items()
    ]
    narratives = [{"image_id": name, "caption": "A.", "timed_caption": [], "traces": []} for name in shot]
    for place, lines in (
        (data / "stage2/pite_143k.jsonl", records),
        (data / "stage1/localized_narratives.jsonl", narratives),
    ):
        place.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data, {f"stage2/{k}": v for k, v in filmed.items()} | {f"stage1/{k}": v for k, v in shot.items()}


def test_each_odd_file_is_right_or_refused(clip: Path, world: tuple[Path, Expected], tmp_path: Path) -> None:
    data, expected = world
    assert len(expected) >= 45
    config = EncodeConfig(
        data=data, store=tmp_path / "store", clip=str(clip), num_frames=N, workers=0, batch_size=20, failure_budget=1.0
    )
    summary = encode(config)
    stores = {kind: FeatureStore(config.store / f"{kind}s") for kind in ("image", "video")}
    stored = {key: store.read(key) for store in stores.values() for key in store.keys}
    reasons = {f.id: f.reason for f in read_failures(config.store / "failures.jsonl")}
    refused = {key: pattern for key, (_, pattern) in expected.items() if isinstance(pattern, str)}
    assert reasons.keys() == refused.keys() and stored.keys() == expected.keys() - refused.keys()
    for key, pattern in refused.items():
        assert re.search(pattern, reasons[key]), reasons[key]
    assert summary.uneven == 1
    encoder = ClipEncoder(str(clip))
    for key, features in stored.items():
        time, right = expected[key]
        split, name = key.split("/")
        folder, kind = (data / "stage1/images", "image") if split == "stage1" else (data / "stage2/videos", "video")
        media = locate(Media(key, folder / f"{name}.mp4", kind, time), names_in(folder))  # type: ignore[arg-type]
        cropped = decode_cropped(media, N, encoder.preprocess)
        assert [which_frame(frame) for frame in cropped] == right, key
        np.testing.assert_allclose(features, encoder.encode(cropped).numpy(), atol=2e-3)
