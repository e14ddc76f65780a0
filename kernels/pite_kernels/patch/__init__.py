"""One line that makes a Hugging Face model train with the fused loss and packed attention: `patch(model)`."""

from pite_kernels.patch.handle import Patch, patch

__all__ = ["Patch", "patch"]
