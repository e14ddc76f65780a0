"""Kernel benchmarks: inputs, cases with their peers, rows of results, tile sizes."""
