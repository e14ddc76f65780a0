"""Chooses the device of CLIP and the decoder, before anything is loaded, and logs both with the reason."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dataloaders.cpu import available_cores
from dataloaders.decode import torchcodec
from dataloaders.decode.dali import decoder as dali
from dataloaders.decode.dali.sessions import ON_CPU, Sessions, engines, on_gpu
from dataloaders.ranks import Ranks
from engine.encode.config import EncodeConfig

NAMES = {"pyav": "PyAV", "dali": "DALI", "torchcodec": "torchcodec"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """How this rank encodes.

    device    "cpu" or "cuda:1"
    decoder   "pyav", "dali" or "torchcodec"
    workers   decoding processes of this rank
    sessions  how DALI uses the device
    """

    device: str
    decoder: str
    workers: int
    sessions: Sessions = ON_CPU


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
    decoder, why = _choose_decoder(config, kind)
    workers = config.workers
    if workers is None:
        workers = max(1, available_cores() // ranks.local_size // (2 if kind == "cpu" else 1))
    if kind == "cpu":
        # Each thread needs a core, and the decoders need theirs.
        free = available_cores() // ranks.local_size - workers
        torch.set_num_threads(max(1, min(torch.get_num_threads(), free)))
        device, sessions, name = "cpu", ON_CPU, f"the CPU ({torch.get_num_threads()} threads)"
    elif ranks.local >= torch.cuda.device_count():
        raise ValueError(f"{ranks.local_size} ranks on a machine with {torch.cuda.device_count()} GPUs")
    else:
        torch.cuda.set_device(ranks.local)
        device, gpu = f"cuda:{ranks.local}", torch.cuda.get_device_name(ranks.local)
        sessions, name = on_gpu(engines(gpu)), f"{device} ({gpu})"
    if ranks.local == 0:
        log.info("ranks: %d, hosts: %d", ranks.size, -(-ranks.size // ranks.local_size))
        log.info("CLIP %s on %s in %s", config.choices.clip, name, "float32" if kind == "cpu" else "bfloat16")
        # On a GPU the default is DALI; each host that lacks it warns.
        level = logging.WARNING if (config.decoder, kind, decoder) == ("auto", "cuda", "pyav") else logging.INFO
        log.log(level, "decoder %s (%s), %d decoding processes a rank", NAMES[decoder], why, workers)
    return Backend(device, decoder, workers, sessions)


def _choose_decoder(config: EncodeConfig, device: str) -> tuple[str, str]:
    """The decoder and why it was chosen: the one that --decoder names, else DALI where CLIP runs on a GPU and DALI works,
    else PyAV."""
    {"dali": dali.require, "torchcodec": torchcodec.require}.get(config.decoder, lambda: None)()
    if config.decoder != "auto":
        return config.decoder, "--decoder"
    if device == "cpu":
        return "pyav", "CLIP runs on the CPU"
    try:
        dali.require()
    except ValueError as error:
        return "pyav", str(error)
    return "dali", "CLIP runs on a GPU"
