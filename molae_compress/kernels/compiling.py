"""Compiles the operator library, with nothing but the standard library: installing the package runs it too."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = (
    "cpu_kernels.cc",
    "gpu_driver.cc",
    "gpu_launch.cc",
    "gpu_operators.cc",
    "grouped.cc",
    "grouped_gemm.cc",
    "latent_bank.cc",
    "latent_experts.cc",
    "register.cc",
    "routes.cc",
    "runtime.cc",
)
FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "libmolae_ops.so"
# Nothing of the machine that compiles: the library chooses among instruction sets when it runs.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-Wno-psabi")
LINKED = ("-ldl",) if sys.platform == "linux" else ()  # a library of its own before glibc 2.34
MARK = "molae-sources:"


class CompileError(RuntimeError):
    """There is no compiler, or it refuses; the message is the end of what it says."""


def find_compiler() -> str | None:
    """The C++ compiler: `CXX` of the environment, as for every build, or the system's."""
    names = (os.environ.get("CXX", ""), "g++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def fingerprint() -> str:
    """A hash of all sources and flags; a library carries that of its own."""
    total = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted((FOLDER / "csrc").iterdir()):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def is_current(library: Path) -> bool:
    """Whether the file is a library of these very sources."""
    return library.is_file() and f"{MARK}{fingerprint()}".encode() in library.read_bytes()


def compile_library(target: Path = LIBRARY, *, flags: tuple[str, ...] = ()) -> Path:
    """Compiles all sources into one shared library, which appears whole or not at all.

    Args:
        target: where it goes.
        flags: further flags for the compiler.

    Raises:
        CompileError: there is no compiler, it refuses, or `target` cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise CompileError("no C++ compiler was found: g++, c++ or what CXX names")
    if sys.platform == "win32":
        raise CompileError("Windows is not supported")
    sources = [str(FOLDER / "csrc" / name) for name in SOURCES]
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            command = [compiler, *FLAGS, *flags, f'-DMOLAE_MARK="{MARK}{fingerprint()}"', *sources, "-o", str(made), *LINKED]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
            os.replace(made, target)
    except OSError as error:
        raise CompileError(f"{target} cannot be written ({error})") from error
    return target
