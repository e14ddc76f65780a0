"""Triton kernels behind the public functions, imported when the first CUDA tensor arrives."""
