"""One rank's share of one kind of media, and the decoder for it."""

from __future__ import annotations

import logging
from collections.abc import Container
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.decoder import DecodePool, Decoder, decode_file
from dataloaders.records import Media
from dataloaders.store.features import FeatureStore
from engine.encode.backend import Backend
from engine.encode.config import EncodeConfig

if TYPE_CHECKING:
    from pite.clip import ClipEncoder

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
        num_frames, preprocess = self.store.manifest.num_frames, self.encoder.preprocess
        limit, chosen, sampling = self.config.time_limit, self.backend.decoder, self.config.sampling
        workers = min(files, self.backend.workers)
        if chosen == "dali":
            device = self.encoder.device.type
            try:
                return dali.DaliDecoder(
                    self.kind, num_frames, preprocess, device, workers, time_limit=limit, sampling=sampling
                )
            except ValueError as error:
                if self.config.decoder != "auto":
                    raise
                log.warning("%s: falling back to PyAV for all %ss", error, self.kind)
        decode = partial(decode_file, num_frames=num_frames, preprocess=preprocess, sampling=sampling)
        if chosen == "torchcodec" and self.kind == "video":
            return DecodePool(partial(decode, reader="torchcodec"), workers, time_limit=limit, by="torchcodec")
        return DecodePool(decode, workers, time_limit=limit)
