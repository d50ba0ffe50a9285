"""The operator library as the package sees it: where it lies, how it is made, how ONNX Runtime gets to know it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from molae_compress.errors import KernelError
from molae_compress.kernels.compiling import LIBRARY, CompileError, compile_library, is_current

if TYPE_CHECKING:
    from onnxruntime import SessionOptions

DOMAIN = "molae"
_NO_KERNELS = -2  # MOLAE_GPU_NO_KERNELS of csrc/gpu_launch.h
_REMEDY = (
    "Run `python -c 'from molae_compress.kernels import build; build()'` (in a clone: `make kernels`): it takes g++. "
    "The lowerings `ort-moe` and `standard` of the ONNX export need no library."
)


def library_path() -> Path:
    """The compiled library of the operators `molae::GroupedGemm` and `molae::LatentExperts`.

    Raises:
        KernelError: it was not compiled when the package was installed, or its sources are others by now.
    """
    if not LIBRARY.is_file():
        raise KernelError(
            f"The operator library {LIBRARY} does not exist.",
            why="There was no C++ compiler when the package was installed, or the package was not installed but copied.",
            remedy=_REMEDY,
        )
    if not is_current(LIBRARY):
        raise KernelError(
            f"The operator library {LIBRARY} was compiled from other sources than those beside it.",
            why="The sources have changed since.",
            remedy=_REMEDY,
        )
    return LIBRARY


def has_gpu_kernels(library: Path) -> bool:
    """Whether an operator library was built with GPU kernels (`make gpu-kernels`). It is loaded for that.

    Raises:
        KernelError: the file is no operator library of this version.
    """
    try:
        ask = ctypes.CDLL(str(library)).molae_gpu_latent_experts_scratch
    except (OSError, AttributeError) as error:
        raise KernelError(f"'{library}' cannot be used as an operator library ({error}).", remedy=_REMEDY) from error
    return bool(ask(None, ctypes.byref(ctypes.c_size_t())) != _NO_KERNELS)


def build(*, force: bool = False) -> Path:
    """Compiles the library if there is none of the present sources, in about half a minute.

    Args:
        force: compile in any case.

    Raises:
        KernelError: there is no compiler, or it refuses.
    """
    if not force and is_current(LIBRARY):
        return LIBRARY
    try:
        return compile_library()
    except CompileError as error:
        raise KernelError(
            f"The operator library cannot be compiled: {error}.",
            remedy="Install g++ 11 or later (Debian: `apt install g++`), or name another compiler in CXX.",
        ) from error


def register(options: SessionOptions) -> None:
    """Makes the operators known to the sessions that are created with `options`.

    Raises:
        KernelError: there is no library, or this ONNX Runtime does not take it.
    """
    path = library_path()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's own classes share no base but this
        raise KernelError(
            f"ONNX Runtime does not load the operator library {path} ({error}).",
            remedy="Use ONNX Runtime 1.22 or later, and a library compiled on this machine (`build(force=True)`).",
        ) from error
