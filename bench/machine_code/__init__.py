"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory and the instructions of a K-step.

`launches` records what the CUDA code launches on fake tensors, `shapes` makes those calls, `programs` compiles and
measures. `tests/kernels/test_specialisations.py` runs it with the installed Triton, `python -m bench.machine_code`
with several releases.
"""
