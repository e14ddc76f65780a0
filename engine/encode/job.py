"""One rank's share of one kind of media, and the decoder for it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.decoder import DecodePool, Decoder, decode_cropped
from dataloaders.records import Media
from dataloaders.store.features import FeatureStore
from engine.encode.config import EncodeConfig

if TYPE_CHECKING:
    from pite.clip import ClipEncoder


@dataclass(frozen=True)
class Job:
    """This rank's media of one kind, grouped by file, with the store, the encoder and the settings for decoding."""

    kind: Literal["video", "image"]
    groups: list[list[Media]]
    store: FeatureStore
    encoder: ClipEncoder
    config: EncodeConfig
    workers: int

    @property
    def batch_size(self) -> int:
        """Frames per forward pass."""
        return self.config.batch_size

    @property
    def missing(self) -> list[list[Media]]:
        return [group for whole in self.groups if (group := [m for m in whole if m.key not in self.store])]

    def decoder(self, files: int) -> AbstractContextManager[Decoder]:
        """A decoder for this many files."""
        num_frames, preprocess = self.store.manifest.num_frames, self.encoder.preprocess
        limit = self.config.time_limit
        chosen = chosen_decoder(self.config, self.encoder.device.type)
        workers = min(files, self.workers)
        if chosen == "dali":
            return dali.DaliDecoder(
                self.kind, num_frames, preprocess, self.encoder.device.type, workers, time_limit=limit
            )
        decode = partial(decode_cropped, num_frames=num_frames, preprocess=preprocess)
        if chosen == "torchcodec" and self.kind == "video":
            return DecodePool(partial(decode, reader="torchcodec"), workers, time_limit=limit, by="torchcodec")
        return DecodePool(decode, workers, time_limit=limit)


def chosen_decoder(config: EncodeConfig, device: str) -> str:
    """The decoder that --decoder names; `auto` is DALI if CLIP runs on a GPU and DALI works, else PyAV."""
    if config.decoder != "auto":
        return config.decoder
    if device == "cuda":
        try:
            dali.require()
        except ValueError as error:
            print(f"engine.encode: {error}: decoding on the CPU", file=sys.stderr)
        else:
            return "dali"
    return "pyav"
