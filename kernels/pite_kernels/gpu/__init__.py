"""Triton kernels of the public functions; each module is imported at the first call with a CUDA tensor."""
