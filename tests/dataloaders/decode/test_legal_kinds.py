"""Legal kinds of files that public bug reports name: each decodes as FFmpeg does, or is refused in one sentence."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dataloaders.decode.readable import DecodeError
from dataloaders.decode.stills import decode_image
from dataloaders.decode.video import decode_video, sample_video
from dataloaders.media import wrong_duration
from dataloaders.records import Media
from tests.media import grey, which_frame, write_video
from tests.odd_media import FINE, Track, picture, write_tracks


def decoded(path: Path, num_frames: int, clip: tuple[float, float] | None = None) -> list[int]:
    return [which_frame(frame) for frame in decode_video(path, num_frames, clip)]


@pytest.mark.parametrize(
    "pixels",
    [
        "yuv444p",
        "yuv422p",
        "yuv411p",
        "yuv420p10le",
        "yuv422p12le",
        "yuv444p16le",
        "gray",
        "gray10le",
        "bgr0",
        "gbrp10le",
    ],
)
def test_pixel_formats(tmp_path: Path, pixels: str) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 65, 47, pixels
        for i in range(12):
            frame = av.VideoFrame.from_ndarray(picture(i, (65, 47)), format="rgb24").reformat(format=pixels)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = decode_video(tmp_path / "v.mkv", 12)
    levels = frames[:, 20:40, 30:60].mean((1, 2, 3))
    assert np.abs(levels - [grey(i) for i in range(12)]).max() <= 1.5


def test_interlaced(tmp_path: Path) -> None:
    options = {"flags": "+ildct+ilme", "x264-params": "interlaced=1:qp=10"}
    assert decoded(write_video(tmp_path / "v.mp4", 20, options=options, size=(64, 64)), 20) == list(range(20))


@pytest.mark.parametrize("gop", [1, 200])
def test_key_frames(tmp_path: Path, gop: int) -> None:
    path = write_video(tmp_path / "v.mp4", 40, gop=gop, options={"bf": "2"})
    assert decoded(path, 40) == list(range(40)) and decoded(path, 5, (3.0, 3.5)) == list(range(30, 35))


def test_leading_frames_that_an_edit_list_hides(tmp_path: Path) -> None:
    """The edit list (ISO/IEC 14496-12, 8.6.6) starts at frame 7: the file's time line starts there."""
    path = write_video(tmp_path / "v.mp4", 40, codec="mpeg4", options=FINE)
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 4
    (unit,) = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)
    struct.pack_into(">II", content, at + 8, 3300, 7 * unit // 10)
    path.write_bytes(content)
    assert decoded(path, 33) == list(range(7, 40))
    assert decoded(path, 10, (1.0, 2.0)) == list(range(17, 27))


def test_a_transport_stream_from_inside_a_group_of_pictures(tmp_path: Path) -> None:
    """Pictures without their references are left out, as FFmpeg does."""
    path = write_video(tmp_path / "v.ts", 40, codec="mpeg2video", options=FINE, rate=25)
    path.write_bytes(path.read_bytes()[188 * 20 :])
    found = decoded(path, 10)
    assert found == sorted(found) and found[-1] == 39 and found[0] % 12 == 0 and found[0] > 0


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".flv"])
def test_written_into_a_pipe(tmp_path: Path, suffix: str) -> None:
    """Without lengths in the header, which cannot be corrected at the end."""

    class Pipe:
        def __init__(self, path: Path) -> None:
            self.file = path.open("wb")
            self.write = self.file.write

    codec, options = {".webm": ("libvpx-vp9", {"cpu-used": "8"}), ".flv": ("libx264", {})}.get(suffix, ("mpeg4", FINE))
    whole = write_video(tmp_path / f"whole{suffix}", 20, codec=codec, options=options)
    pipe = Pipe(tmp_path / f"v{suffix}")
    with (
        av.open(str(whole)) as source,
        av.open(pipe, "w", format={".mkv": "matroska"}.get(suffix, suffix[1:])) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    pipe.file.close()
    path = tmp_path / f"v{suffix}"
    np.testing.assert_array_equal(decode_video(path, 20), decode_video(whole, 20))
    lasts = sample_video(path, 5).facts.ends
    assert lasts == pytest.approx((2.0, 2.0), abs=0.15)


@pytest.mark.parametrize("name", ["v.ts", "v.mp4"])
def test_a_part_of_a_file_without_a_sign_of_it(tmp_path: Path, name: str) -> None:
    """A transport stream, or fragments of an MP4: only the duration of the record shows that some are missing."""
    options = {"movflags": "frag_keyframe+empty_moov"} if name.endswith("mp4") else {}
    path = write_video(tmp_path / name, 60, container_options=options)
    content = path.read_bytes()
    cut = content.rindex(b"moof", 0, len(content) * 2 // 3) - 4 if options else len(content) * 3 // 5 // 188 * 188
    for part, right in ((content, True), (content[:cut], False)):
        path.write_bytes(part)
        facts = sample_video(path, 5).facts
        reason = wrong_duration(Media("k", path, duration=6.0), facts.ends)
        assert reason is None if right else reason is not None and "but its annotation is for 6.0 s" in reason


def test_play_lists_and_encrypted_files_are_refused(tmp_path: Path) -> None:
    write_tracks(tmp_path / "part.ts", [Track(5)])
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n")
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "7" * 32, "encryption_kid": "1" * 32}
    write_video(tmp_path / "encrypted.mp4", 20, container_options=key)
    for name in ("list.mp4", "encrypted.mp4"):
        with pytest.raises(DecodeError) as caught:
            decode_video(tmp_path / name, 5)
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("tag", range(1, 9))
def test_the_orientations_of_exif(tmp_path: Path, tag: int) -> None:
    upright = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[tag]
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(np.ascontiguousarray(turned)).save(tmp_path / "a.png", exif=exif)
    assert (decode_image(tmp_path / "a.png") == upright).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_jpegs_of_other_programs(tmp_path: Path) -> None:
    """Several pictures in one file, damaged EXIF, inverted CMYK of Adobe, and a palette."""
    image = Image.fromarray(picture(20))
    image.save(tmp_path / "mpo.jpg", "MPO", save_all=True, append_images=[Image.fromarray(picture(50))])
    image.save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.quantize(8).save(tmp_path / "palette.jpg", "PNG")
    image.convert("L").save(tmp_path / "grey.jpg")
    for path in tmp_path.iterdir():
        assert abs(int(decode_image(path)[30, 40, 0]) - grey(20)) <= 3, path.name
