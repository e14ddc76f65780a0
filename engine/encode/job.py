"""One rank's share of one kind of media, and the decoder for it."""

from __future__ import annotations

import logging
from collections.abc import Container
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.decoder import DecodePool, Decoder, Reader, decode_file
from dataloaders.records import Media
from dataloaders.store.features import FeatureStore
from engine.encode.backend import NAMES, Backend
from engine.encode.config import EncodeConfig

if TYPE_CHECKING:
    from pite.clip import ClipEncoder

ENGINES: dict[str, Literal["DALI", "torchcodec"]] = {"dali": "DALI", "torchcodec-cuda": "torchcodec"}
"""--decoder -> what decodes on the GPU."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """This rank's media of one kind, grouped by file, with the store, the encoder and the settings for decoding.

    absent  keys of media without a file, which are not decoded
    """

    kind: Literal["video", "image"]
    groups: list[list[Media]]
    absent: Container[str]
    store: FeatureStore
    encoder: ClipEncoder
    config: EncodeConfig
    backend: Backend

    @property
    def batch_size(self) -> int:
        """Frames per forward pass."""
        return self.config.batch_size

    @property
    def missing(self) -> list[list[Media]]:
        """The media to encode: neither in the store nor absent."""
        groups = ([m for m in whole if m.key not in self.store and m.key not in self.absent] for whole in self.groups)
        return [group for group in groups if group]

    @property
    def num_absent(self) -> int:
        """Number of media that are neither stored nor have a file."""
        return sum(m.key in self.absent for group in self.groups for m in group)

    def decoder(self, files: int) -> AbstractContextManager[Decoder]:
        """A decoder for this many files: PyAV also where DALI was chosen by default and cannot be started."""
        engine = ENGINES.get(self.backend.decoder)
        if engine == "DALI" or (engine is not None and self.kind == "video"):
            try:
                return dali.DaliDecoder(
                    self.kind,
                    preprocess=self.encoder.preprocess,
                    device=self.encoder.device.type,
                    workers=min(files, self.backend.workers),
                    time_limit=self.config.time_limit,
                    sessions=self.backend.sessions,
                    cpu_share=self.backend.cpu_share,
                    engine=engine,
                    **self._frames,
                )
            except ValueError as error:
                if self.config.decoder != "auto":
                    raise
                log.warning("%s: falling back to PyAV for all %ss", error, self.kind)
        if self.backend.decoder == "torchcodec" and self.kind == "video":
            return self._pool(files, "torchcodec")
        return self._pool(files, "pyav")

    def reference(self, files: int) -> DecodePool:
        """The decoder that `--verify` compares with: PyAV, whatever decoded the files before."""
        return self._pool(files, "pyav")

    @property
    def _frames(self) -> dict[str, Any]:
        return {"num_frames": self.store.manifest.num_frames, "sampling": self.config.choices.sampling}

    def _pool(self, files: int, reader: Reader) -> DecodePool:
        decode = partial(decode_file, preprocess=self.encoder.preprocess, reader=reader, **self._frames)
        workers = min(files, self.backend.workers)
        return DecodePool(decode, workers, time_limit=self.config.time_limit, by=NAMES[reader])
