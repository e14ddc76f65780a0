"""Draw scenes and write them as H.264 MP4 or JPEG files, with the same bytes in every run."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

from dataloaders.files import file_written_atomically
from dataloaders.synthetic.scene import COLOURS, FRAMES_PER_SECOND, RADIUS, Scene, signed_distance

OCCLUDER_GREY = 140
# One thread: x264 splits its rate control by thread, and the world's own processes already fill the cores.
_CODEC_OPTIONS = {"preset": "ultrafast", "crf": "18", "threads": "1"}


def draw(scene: Scene, size: int) -> np.ndarray:
    """Return the frames of a scene, (num_frames, size, size, 3) uint8 RGB, with anti-aliased edges."""
    frames = np.full((scene.num_frames, size, size, 3), scene.background, np.float32)
    centres = ((np.arange(size) + 0.5) / size).astype(np.float32)
    grid = np.stack(np.meshgrid(centres, centres), -1)
    for thing in scene.things:
        # Compute only the part of the frame that the thing touches.
        left, top = np.floor((thing.path.min(0) - 1.2 * RADIUS) * size).astype(int).clip(0, size)
        right, bottom = np.ceil((thing.path.max(0) + 1.2 * RADIUS) * size).astype(int).clip(0, size)
        offset = grid[None, top:bottom, left:right] - thing.path[:, None, None].astype(np.float32)
        coverage = np.clip(signed_distance(thing.shape, offset) * size + 0.5, 0, 1)[..., None]
        shown = frames[thing.first : thing.last + 1, top:bottom, left:right]
        shown += coverage * (np.asarray(COLOURS[thing.colour], np.float32) - shown)
    if scene.occluder is not None:
        left, top, right, bottom = (round(edge * size) for edge in scene.occluder)
        frames[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = OCCLUDER_GREY
    return (frames + 0.5).astype(np.uint8)


def write_mp4(path: Path, frames: np.ndarray) -> None:
    """Encode frames (T, H, W, 3) uint8 RGB as H.264 in MP4. A kill leaves no partial file under `path`."""
    with (
        file_written_atomically(path, flush=False) as temporary,
        av.open(str(temporary), "w", format="mp4") as container,
    ):
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=_CODEC_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_jpeg(path: Path, image: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8 RGB as JPEG. A kill leaves no partial file under `path`."""
    with file_written_atomically(path, flush=False) as temporary:
        Image.fromarray(image).save(temporary, format="JPEG", quality=92)
