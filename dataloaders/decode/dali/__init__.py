"""Decoding with NVIDIA DALI."""
