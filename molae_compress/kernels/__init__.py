"""Operators of the domain `molae` for ONNX Runtime: a shared library of C++, and what finds and compiles it."""

from __future__ import annotations

from molae_compress.kernels.library import DOMAIN, build, has_gpu_kernels, library_path, register

__all__ = ["DOMAIN", "build", "has_gpu_kernels", "library_path", "register"]
