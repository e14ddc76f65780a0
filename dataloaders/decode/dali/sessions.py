"""How DALI uses a device: several narrow pipelines in turn, together with as many threads as keep NVDEC busy.

A thread of DALI decodes one file, which is one session, on one NVDEC engine. Its operator waits for the longest file of a
batch. So one wide batch leaves most sessions idle at its end (by simulation of lengths that vary as those of videos do, 16
files on 14 threads keep 42% of them busy), and several narrow pipelines fill the gaps of one another. Not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

ENGINES = {"A100": 5, "A30": 4, "A10": 2, "A10G": 2, "H100": 7, "H200": 7, "GH200": 7, "L40": 3, "L4": 4, "B200": 7}
"""Number of NVDEC engines by a part of the device's name, from NVIDIA's table of video decoders."""

_UNKNOWN = 4
_PIPELINES, _PER_ENGINE = 4, 2


@dataclass(frozen=True)
class Sessions:
    """How a device decodes.

    pipelines  graphs of DALI that decode in turn
    threads    of each of them; each thread decodes one file at a time
    batch      files that one of them decodes at once
    """

    pipelines: int
    threads: int
    batch: int

    @property
    def in_flight(self) -> int:
        """Batches that are scheduled at once; a single pipeline has the next one waiting."""
        return max(2, self.pipelines)

    @property
    def window(self) -> int:
        """Files that are put into batches by size and length."""
        return self.batch * self.in_flight


ON_CPU = Sessions(pipelines=1, threads=4, batch=16)


def engines(device_name: str) -> int:
    """Number of NVDEC engines of a device. "NVIDIA A100-SXM4-80GB" has 5."""
    words = device_name.replace("-", " ").split()
    known = [count for name, count in ENGINES.items() if any(word.rstrip("S") == name for word in words)]
    return known[0] if known else _UNKNOWN


def on_gpu(number_of_engines: int) -> Sessions:
    """Two sessions for each engine: one is read and parsed while another decodes."""
    threads = -(-_PER_ENGINE * number_of_engines // _PIPELINES)
    return Sessions(_PIPELINES, threads, batch=2 * threads)
