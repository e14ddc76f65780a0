"""What the fork server of `ranks.py` imports once for all ranks.

A rank whose garbage collector scanned these objects would copy the memory that it shares with the fork server. Frozen,
they cut a rank's CPU time to a third. Nor does a rank draw losses.png.
"""

from __future__ import annotations

import gc
from importlib import import_module

from engine import job

for name in (
    *("torch.utils.tensorboard", "torch.distributed.fsdp", "peft"),
    *("engine.encode.run", "pite.pooled", "pytest"),
):
    import_module(name)

job.plot_losses = lambda stages, output: None
gc.collect()
gc.freeze()
gc.unfreeze = lambda: None  # a run ends by it
