"""DALI's graph, and the resize and colour conversion after it: batches of files in, cropped frames out, in order.

DALI reads and decodes. This module resizes the frames on their device with Pillow's weights, because CLIP was trained
on images that Pillow resized. DALI's own resize repeats the last pixel beyond the picture's edge, where Pillow leaves
it out; it differs by 14/255 at the edges of noise.

DALI decodes every picture with BT.601's colour matrix, which videos of low resolution have. Frames of videos tagged
BT.709 are converted afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataloaders.decode import nvdec
from dataloaders.decode.dali.request import BT709, DecodeRequest
from dataloaders.decode.preprocess import Preprocess
from dataloaders.errors import reason

if TYPE_CHECKING:
    from torch import Tensor


def require(device: str = "cpu") -> None:
    """Raise ValueError where DALI cannot be used on "cpu" or "cuda", whose current device is tried: with the cure.

    DALI may be installed and yet not run: without the driver's video libraries, or under a driver older than its CUDA.
    """
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        raise ValueError(
            f"DALI cannot be used here ({reason(error)}); install nvidia-dali-cuda130, or use pyav"
        ) from None
    if device != "cuda":
        return
    nvdec.require()
    try:
        Pipeline("video", Preprocess(), device, 1, 1)
    except RuntimeError as error:
        raise ValueError(
            f"DALI cannot decode on cuda here ({root_cause(error)}); nvidia-dali-cuda130 needs a driver from 580 on,"
            " nvidia-dali-cuda120 one from 525 on; or use pyav"
        ) from None


class Pipeline:
    """Decodes batches of media of one kind. After a bad sample or a timeout it cannot be used; build a new one."""

    def __init__(
        self, kind: Literal["video", "image"], preprocess: Preprocess, device: str, batch: int, threads: int
    ) -> None:
        from nvidia.dali import Pipeline as Graph
        from nvidia.dali import fn, types

        self._kind, self._preprocess, self._gpu = kind, preprocess, None
        if device == "cuda":
            import torch

            self._gpu = torch.cuda.current_device()
        placement = "cpu" if self._gpu is None else "mixed"
        # Depth 1, because the first run would otherwise wait for more input; `start` prefetches instead. With the
        # dynamic executor, outputs belong to their reader.
        graph = Graph(batch, threads, self._gpu, exec_dynamic=True, prefetch_queue_depth=1, set_affinity=False)
        with graph:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            if kind == "video":
                indices = fn.external_source(name="indices", dtype=types.INT32, ndim=1)
                frames = fn.decoders.video(encoded, device=placement, frames=indices, affine=False)
            else:
                encoded = fn.io.file.read(encoded)
                frames = fn.decoders.image(encoded, device=placement, output_type=types.RGB, jpeg_fancy_upsampling=True)
            graph.set_outputs(frames)
        graph.build()
        self._graph = graph

    def start(self, requests: Sequence[DecodeRequest]) -> None:
        """Start to decode in the background. Raises RuntimeError after an earlier batch failed."""
        if not requests:
            return
        inputs = (r.content if self._kind == "video" else bytes(r.media.path) for r in requests)
        self._graph.feed_input("encoded", [np.frombuffer(content, np.uint8) for content in inputs])
        if self._kind == "video":
            self._graph.feed_input("indices", [r.indices.astype(np.int32) for r in requests])
        self._graph.schedule_run()

    def finish(self, requests: Sequence[DecodeRequest], seconds: float | None) -> list[np.ndarray | Tensor]:
        """Wait for the oldest batch: cropped frames (u, S, S, 3) uint8 of each file, as tensors on the GPU if DALI runs
        there.

        Raises RuntimeError if any file of the batch is bad, and TimeoutError after `seconds`.
        """
        if not requests:
            return []
        import torch

        # In a thread, because DALI cannot be interrupted. A daemon thread does not keep the program from ending.
        answers: SimpleQueue[Any] = SimpleQueue()
        Thread(target=self._await, args=(answers,), daemon=True).start()
        try:
            answer = answers.get(timeout=seconds)
        except Empty:
            # At exit DALI joins every pipeline in its list, and this one would never end.
            self._graph._pipe = None
            raise TimeoutError(f"DALI timed out after {seconds:g} s") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        (output,) = answer
        frames = []
        for place, request in enumerate(requests):
            whole = torch.from_numpy(output.at(place)) if self._gpu is None else torch.from_dlpack(output[place])
            cropped = self._preprocess.cropped_batch(shown(whole if whole.ndim == 4 else whole[None], request.size))
            frames.append(_in_bt709(cropped) if request.matrix in BT709 else cropped)
        if self._gpu is None:
            self._graph.release_outputs()
            return [cropped.numpy() for cropped in frames]
        # DALI does not wait for torch's kernels and would decode the next files into memory that they still read.
        torch.cuda.current_stream().synchronize()
        self._graph.release_outputs()
        return list(frames)

    def _await(self, answers: SimpleQueue[Any]) -> None:
        try:
            if self._gpu is not None:
                import torch

                torch.cuda.set_device(self._gpu)  # Each thread has its own current device.
            answers.put(self._graph.share_outputs())
        except Exception as error:
            # As text: the exception's traceback would keep the failed pipeline alive, with all its memory.
            answers.put(str(error))


def shown(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """The shown part of decoded frames (n, H, W, 3); all of a still, of which no size is given."""
    width, height = size
    return frames[:, :height, :width] if width else frames


def _in_bt709(frames: Tensor) -> Tensor:
    """Correct the colours of frames (n, S, S, 3) uint8 that are BT.709 and were decoded as BT.601."""
    import torch

    matrix = torch.from_numpy(FROM_601_TO_709.T).to(frames.device)
    return (frames.float() @ matrix).round_().clamp_(0, 255).to(frames.dtype)


def _to_rgb(red: float, blue: float) -> np.ndarray:
    """(3, 3) matrix from Y, Cb, Cr to R, G, B. `red` and `blue` are their weights in luma."""
    green = 1 - red - blue
    to_red, to_blue = 2 * (1 - red), 2 * (1 - blue)
    return np.array([[1, 0, to_red], [1, -to_blue * blue / green, -to_red * red / green], [1, to_blue, 0]])


FROM_601_TO_709 = (_to_rgb(0.2126, 0.0722) @ np.linalg.inv(_to_rgb(0.299, 0.114))).astype(np.float32)


def root_cause(error: Exception) -> str:
    """The cause in DALI's message, without the place where its operators were defined, which comes first."""
    return " ".join(str(error).rpartition("encountered:")[2].split())[:200].rstrip(".")
