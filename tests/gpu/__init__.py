"""Tests of the GPU kernels on a CPU; `tests/test_gpu_kernels.py` runs them in processes of their own.

Triton has to be told that it interprets before it is first imported, and the fake driver has to be the first of its name.
"""
