"""One line that makes a Hugging Face model train with the fused loss and packed attention: `patch(model)`."""

from pite_kernels.patching.collate import pack_batch
from pite_kernels.patching.install import patch
from pite_kernels.patching.state import Patch

__all__ = ["Patch", "pack_batch", "patch"]
