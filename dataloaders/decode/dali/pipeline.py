"""DALI's graph and the arithmetic around it: files go in by batches, frames as CLIP wants them come out in order.

DALI reads and decodes; resizing is ours, where the frames are, by Pillow's weights. Its own resize repeats a picture's last
pixel beyond the edge where Pillow leaves it out, which CLIP was taught on, and differs by 14/255 at the edges of noise.

DALI takes every picture for one in BT.601's colours, as videos of low resolution are; those tagged BT.709 are converted
afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dataloaders.decode.dali.request import BT709, Ticket
from dataloaders.decode.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import Tensor

_THREADS = 4


def require() -> None:
    """Raise ValueError where DALI cannot be used."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        raise ValueError(f"DALI cannot be used here ({error}); install nvidia-dali-cuda130, or take pyav") from None


class Pipeline:
    """Decodes batches of media of one kind. Once a sample was bad, or nothing comes any more, a new one must be built."""

    def __init__(self, kind: Literal["video", "image"], preprocess: Preprocess, device: str, batch: int) -> None:
        from nvidia.dali import Pipeline as Graph
        from nvidia.dali import fn, types

        self._kind, self._preprocess, self._gpu = kind, preprocess, None
        if device == "cuda":
            import torch

            self._gpu = torch.cuda.current_device()
        placement = "cpu" if self._gpu is None else "mixed"
        # Of depth 1, for a first run would otherwise wait for more input: `start` is what works ahead. The dynamic executor
        # leaves outputs to their reader.
        graph = Graph(batch, _THREADS, self._gpu, exec_dynamic=True, prefetch_queue_depth=1, set_affinity=False)
        with graph:
            encoded = fn.io.file.read(fn.external_source(name="path", dtype=types.UINT8, ndim=1))
            if kind == "video":
                indices = fn.external_source(name="indices", dtype=types.INT32, ndim=1)
                frames = fn.decoders.video(encoded, device=placement, frames=indices)
            else:
                frames = fn.decoders.image(encoded, device=placement, output_type=types.RGB, jpeg_fancy_upsampling=True)
            graph.set_outputs(frames)
        graph.build()
        self._graph = graph

    def start(self, tickets: Sequence[Ticket]) -> None:
        """Decode in the background. Raises RuntimeError where the pipeline is spoiled."""
        if not tickets:
            return
        self._graph.feed_input("path", [np.frombuffer(bytes(t.media.path), np.uint8) for t in tickets])
        if self._kind == "video":
            self._graph.feed_input("indices", [t.indices.astype(np.int32) for t in tickets])
        self._graph.schedule_run()

    def finish(self, tickets: Sequence[Ticket], seconds: float | None) -> list[np.ndarray | Tensor]:
        """Cropped frames (u, S, S, 3) uint8 of each file of the batch that was started first, on a GPU as tensors there.

        Raises RuntimeError where any file is bad, and TimeoutError when `seconds` have passed.
        """
        if not tickets:
            return []
        import torch

        # A thread, for DALI cannot be interrupted. A daemon, which nobody waits for at the end.
        answers: SimpleQueue[Any] = SimpleQueue()
        Thread(target=self._await, args=(answers,), daemon=True).start()
        try:
            answer = answers.get(timeout=seconds)
        except Empty:
            # At the program's end DALI joins every pipeline that it knows of.
            self._graph._pipe = None
            raise TimeoutError(f"DALI gave nothing for {seconds:g} s") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        (output,) = answer
        frames = []
        for place, ticket in enumerate(tickets):
            whole = torch.from_numpy(output.at(place)) if self._gpu is None else torch.from_dlpack(output[place])
            cropped = self._preprocess.cropped_batch(whole if whole.ndim == 4 else whole[None])
            frames.append(_in_bt709(cropped) if ticket.matrix in BT709 else cropped)
        if self._gpu is None:
            self._graph.release_outputs()
            return [cropped.numpy() for cropped in frames]
        # DALI knows nothing of what torch still reads, and would decode the next files there.
        torch.cuda.current_stream().synchronize()
        self._graph.release_outputs()
        return list(frames)

    def _await(self, answers: SimpleQueue[Any]) -> None:
        try:
            if self._gpu is not None:
                import torch

                torch.cuda.set_device(self._gpu)  # Each thread has its own.
            answers.put(self._graph.share_outputs())
        except Exception as error:
            # In words: the error itself holds frames that hold the spoiled pipeline, with all its memory.
            answers.put(str(error))


def _in_bt709(frames: Tensor) -> Tensor:
    """Frames (n, S, S, 3) uint8 that were taken for BT.601's, in BT.709's colours."""
    import torch

    matrix = torch.from_numpy(FROM_601_TO_709.T).to(frames.device)
    return (frames.float() @ matrix).round_().clamp_(0, 255).to(frames.dtype)


def _to_rgb(red: float, blue: float) -> np.ndarray:
    """(3, 3) from Y, Cb, Cr to R, G, B, for the shares of red and blue in luma."""
    green = 1 - red - blue
    to_red, to_blue = 2 * (1 - red), 2 * (1 - blue)
    return np.array([[1, 0, to_red], [1, -to_blue * blue / green, -to_red * red / green], [1, to_blue, 0]])


FROM_601_TO_709 = (_to_rgb(0.2126, 0.0722) @ np.linalg.inv(_to_rgb(0.299, 0.114))).astype(np.float32)


def root_cause(error: Exception) -> str:
    """DALI's own words, out of a message that starts with where its operators were defined."""
    return " ".join(str(error).rpartition("encountered:")[2].split())[:200]
