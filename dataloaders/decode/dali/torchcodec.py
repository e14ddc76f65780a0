"""torchcodec's CUDA decoder in the place of DALI's pipeline: `--decoder torchcodec-cuda`. Not yet run on a GPU.

It decodes file by file in threads. So a bad file fails alone, and no batch waits for its longest file. It takes frames in the
order in which they are shown, hidden ones left out, crops with the parameters of the file, and converts BT.709: the files that
DALI would count wrongly can be its own. A CUDA build of torchcodec and FFmpeg's libraries are needed. Whether it is faster
than DALI is a question for `bench.encode`; until that has run, DALI is the default.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TimedOut
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataloaders.decode import nvdec, torchcodec
from dataloaders.decode.dali.pipeline import shown
from dataloaders.decode.dali.request import DecodeRequest
from dataloaders.decode.dali.trial import small_video
from dataloaders.decode.preprocess import Preprocess
from dataloaders.errors import reason

if TYPE_CHECKING:
    from torch import Tensor

CANNOT_DECODE = "torchcodec cannot decode it"


def require(device: str = "cpu") -> None:
    """Raise ValueError, with the cure, where torchcodec cannot be used on "cpu" or on the current device of "cuda"."""
    torchcodec.require()
    if device != "cuda":
        return
    nvdec.require()
    try:
        _decoder(small_video(device), device).get_frame_at(0)
    except RuntimeError as error:
        raise ValueError(
            f"torchcodec cannot decode on cuda here ({reason(error)}); install its CUDA build, or use --decoder dali"
        ) from None


class TorchcodecPipeline:
    """Decodes batches of videos in threads, with the interface of DALI's `Pipeline`."""

    def __init__(
        self, kind: Literal["video", "image"], preprocess: Preprocess, device: str, batch: int, threads: int
    ) -> None:
        assert kind == "video", "torchcodec decodes no stills"
        self._preprocess, self._device = preprocess, device
        if device == "cuda":
            import torch

            self._device = f"cuda:{torch.cuda.current_device()}"
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="torchcodec")
        self._waiting: deque[list[Future[Tensor]]] = deque()

    def start(self, requests: Sequence[DecodeRequest]) -> None:
        """Start to decode in the background."""
        if requests:
            self._waiting.append([self._threads.submit(self._decode, request) for request in requests])

    def finish(self, requests: Sequence[DecodeRequest], seconds: float | None) -> list[np.ndarray | Tensor | str]:
        """Wait for the oldest batch: cropped frames (u, S, S, 3) uint8 of each file, or why PyAV must decode it.

        Raises TimeoutError after `seconds`; the threads that hang are abandoned.
        """
        if not requests:
            return []
        until = None if seconds is None else monotonic() + seconds
        frames: list[np.ndarray | Tensor | str] = []
        for future in self._waiting.popleft():
            try:
                found = future.result(None if until is None else max(0.0, until - monotonic()))
                frames.append(found.numpy() if found.device.type == "cpu" else found)
            except TimedOut:
                self._threads.shutdown(wait=False, cancel_futures=True)
                raise TimeoutError(f"torchcodec timed out after {seconds:g} s") from None
            except Exception:  # A damaged file can raise anything. PyAV finds the reason.
                frames.append(CANNOT_DECODE)
        return frames

    def _decode(self, request: DecodeRequest) -> Tensor:
        import torch

        frames = _decoder(request.content, self._device).get_frames_at(request.indices.tolist()).data
        cropped = self._preprocess.cropped_batch(shown(frames.permute(0, 2, 3, 1), request.size))
        if cropped.is_cuda:
            torch.cuda.current_stream(cropped.device).synchronize()  # Another thread reads them.
        return cropped


def _decoder(content: bytes, device: str) -> Any:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(content, device=device, num_ffmpeg_threads=1, seek_mode="exact")
