"""What the driver reports of NVDEC, with stand-ins for its library: none of this has run on a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from dataloaders.decode import nvdec
from dataloaders.decode.dali import pipeline
from dataloaders.decode.dali.sessions import ON_CPU, engines, on_gpu
from tests.media import needs_dali


class Driver:
    """libnvcuvid that gives these answers."""

    def __init__(self, status: int = 0, supported: int = 1, number: int = 7) -> None:
        self.status, self.supported, self.number = status, supported, number
        self.codecs: list[int] = []

    def cuvidGetDecoderCaps(self, pointer: Any) -> int:
        caps = ctypes.cast(pointer, ctypes.POINTER(nvdec._Caps)).contents
        self.codecs.append(caps.codec)
        caps.supported, caps.engines = self.supported, self.number
        caps.least_width, caps.least_height, caps.most_width, caps.most_height = 48, 16, 4096, 4096
        return self.status


def test_the_structure_is_that_of_the_header() -> None:
    """Places of CUVIDDECODECAPS in nvcuvid.h; the driver writes 88 bytes at most."""
    places = {name: getattr(nvdec._Caps, name).offset for name in ("supported", "engines", "most_width", "least_width")}
    assert places == {"supported": 24, "engines": 25, "most_width": 28, "least_width": 40}
    assert ctypes.sizeof(nvdec._Caps) >= 88


def test_capabilities() -> None:
    driver = Driver()
    assert nvdec.capabilities("hevc", driver) == nvdec.Capabilities(True, 7, (48, 16), (4096, 4096))
    assert driver.codecs == [8]
    assert nvdec.capabilities("h264", Driver(status=201)) is None, "no context"
    assert nvdec.capabilities("h264", object()) is None, "a driver without this function"
    nvdec.require(driver)
    with pytest.raises(ValueError, match="no NVDEC engine: use a slice"):
        nvdec.require(Driver(supported=0))


def test_a_container_without_the_video_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec, "LIBRARY", "libnvcuvid-that-is-absent.so.1")
    with pytest.raises(ValueError, match=r"libnvcuvid-that.*NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"):
        nvdec.require()


@needs_dali
def test_dali_under_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports, and fails when its pipeline is built: `--decoder auto` then takes PyAV at the start."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("Critical error when building pipeline: CUDA driver version is insufficient")

    monkeypatch.setattr(nvdec, "library", Driver)
    monkeypatch.setattr(pipeline, "Pipeline", fail)
    with pytest.raises(
        ValueError, match=r"driver version is insufficient\); nvidia-dali-cuda130 needs a driver from 580"
    ):
        pipeline.require("cuda")
    pipeline.require("cpu")


@pytest.mark.parametrize(
    ("codec", "size", "refused"),
    [
        ("hevc", (96, 80), True),
        ("hevc", (192, 144), False),
        ("vp9", (128, 120), True),
        ("h264", (96, 72), False),
        ("h264", (5120, 2880), True),
        ("hevc", (7680, 4320), False),
    ],
)
def test_sizes(codec: str, size: tuple[int, int], refused: bool) -> None:
    assert nvdec.refuses(codec, size) == refused


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("NVIDIA A100-SXM4-80GB", 5),
        ("NVIDIA H100 80GB HBM3", 7),
        ("NVIDIA H200", 7),
        ("NVIDIA L4", 4),
        ("NVIDIA L40S", 3),
        ("NVIDIA A10G", 2),
        ("GeForce", 4),
    ],
)
def test_engines_by_name(name: str, number: int) -> None:
    assert engines(name) == number


def test_sessions_fill_the_engines() -> None:
    """Two files for each engine; several pipelines, so that a long file holds up few others."""
    for number in (1, 5, 7):
        sessions = on_gpu(number)
        assert 2 * number <= sessions.pipelines * sessions.threads < 2 * number + sessions.pipelines
        assert sessions.in_flight == sessions.pipelines == 4 and sessions.batch >= sessions.threads
    assert ON_CPU.in_flight == 2
