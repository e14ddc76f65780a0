"""Chooses the device of CLIP and the decoder, before anything is loaded, and logs both with the reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dataloaders.cpu import available_cores
from dataloaders.decode import nvdec, torchcodec
from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.dali import torchcodec as cuda_torchcodec
from dataloaders.decode.dali.sessions import ON_CPU, Sessions, engines, on_gpu
from dataloaders.ranks import Ranks
from engine.encode.config import EncodeConfig
from engine.encode.share import estimated_share

NAMES = {"pyav": "PyAV", "dali": "DALI", "torchcodec": "torchcodec", "torchcodec-cuda": "torchcodec on the GPU"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """How this rank encodes.

    device    "cpu" or "cuda:1"
    decoder   "pyav", "dali", "torchcodec" or "torchcodec-cuda"
    workers   decoding processes of this rank
    sessions  how DALI uses the device
    cpu_share  share of the videos that the CPU decodes while DALI decodes the others
    """

    device: str
    decoder: str
    workers: int
    sessions: Sessions = ON_CPU
    cpu_share: float = 0.0


def choose_backend(config: EncodeConfig, ranks: Ranks) -> Backend:
    """Choose this rank's device and decoder. Selects that GPU, or on a CPU limits torch's threads to spare the decoders.

    Raises ValueError for a device or decoder that cannot be used.
    """
    import torch

    kind: str = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    elif kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    workers = config.workers
    if workers is None:
        workers = max(1, available_cores() // ranks.local_size // (2 if kind == "cpu" else 1))
    if kind == "cpu":
        # Each thread needs a core, and the decoders need theirs.
        free = available_cores() // ranks.local_size - workers
        torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))
        device, name = "cpu", f"the CPU ({torch.get_num_threads()} threads)"
    elif ranks.local >= torch.cuda.device_count():
        raise ValueError(f"{ranks.local_size} ranks on a machine with {torch.cuda.device_count()} GPUs")
    else:
        torch.cuda.set_device(ranks.local)
        torch.cuda.synchronize()  # Creates the context in which NVDEC's capabilities are read.
        device = f"cuda:{ranks.local}"
        name = f"{device} ({torch.cuda.get_device_name(ranks.local)})"
    decoder, why = _choose_decoder(config, kind)
    sessions, share = ON_CPU, 0.0
    if kind == "cuda" and decoder in ("dali", "torchcodec-cuda"):
        number = _engines(ranks.local)
        sessions, share = on_gpu(number), estimated_share(workers, number)
    if ranks.local == 0:
        log.info("ranks: %d, hosts: %d", ranks.size, -(-ranks.size // ranks.local_size))
        log.info("CLIP %s on %s in %s", config.choices.clip, name, "float32" if kind == "cpu" else "bfloat16")
        # On a GPU the default is DALI; each host that lacks it warns.
        level = logging.WARNING if (config.decoder, kind, decoder) == ("auto", "cuda", "pyav") else logging.INFO
        log.log(level, "decoder %s (%s), %d decoding processes a rank", NAMES[decoder], why, workers)
    return Backend(device, decoder, workers, sessions, share)


def _engines(local: int) -> int:
    """Number of NVDEC engines of a GPU: from the driver, else from its name."""
    import torch

    found = nvdec.capabilities("h264")
    return found.engines if found and found.engines else engines(torch.cuda.get_device_name(local))


def _choose_decoder(config: EncodeConfig, device: str) -> tuple[str, str]:
    """The decoder and why it was chosen: the one that --decoder names, else DALI where CLIP runs on a GPU and DALI works,
    else PyAV."""
    if config.decoder == "dali":
        dali.require(device)
    elif config.decoder == "torchcodec":
        torchcodec.require()
    elif config.decoder == "torchcodec-cuda":
        if device == "cpu":
            raise ValueError("--decoder torchcodec-cuda needs --device cuda; torchcodec decodes on the CPU")
        cuda_torchcodec.require(device)
    if config.decoder != "auto":
        return config.decoder, "--decoder"
    if device == "cpu":
        return "pyav", "CLIP runs on the CPU"
    try:
        dali.require(device)
    except ValueError as error:
        return "pyav", str(error)
    return "dali", "CLIP runs on a GPU"
