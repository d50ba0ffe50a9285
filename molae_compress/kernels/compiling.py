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
    "cpu_entry.cc",
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
MARK, KERNELS_MARK = "molae-sources:", "molae-kernels:"
# Made by `gpu_build`, and part of neither the repository nor a wheel.
MADE = ("gpu_kernels.bin", "gpu_kernels.inc")


class CompileError(RuntimeError):
    """There is no compiler, or it refuses; the message is the end of what it says."""


def find_compiler() -> str | None:
    """The C++ compiler: `CXX` of the environment, as for every build, or the system's."""
    names = (os.environ.get("CXX", ""), "g++", "c++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def marks() -> list[str]:
    """Hashes of all sources and flags, and of the compiled GPU kernels if there are any; a library carries its own."""
    files = sorted((FOLDER / "csrc").iterdir())
    found = [MARK + _hash([path for path in files if path.name not in MADE])]
    return found + [KERNELS_MARK + _hash([path]) for path in files if path.name == MADE[0]]


def _hash(paths: list[Path]) -> str:
    total = hashlib.sha256(" ".join(FLAGS).encode())
    for path in paths:
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def is_current(library: Path) -> bool:
    """Whether the file is a library of these very sources; GPU kernels may be in it though they are not here."""
    if not library.is_file():
        return False
    content = library.read_bytes()
    return all(mark.encode() in content for mark in marks())


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
            command = [compiler, *FLAGS, *flags, f'-DMOLAE_MARK="{" ".join(marks())}"', *sources, "-o", str(made), *LINKED]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CompileError(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
            os.replace(made, target)
    except OSError as error:
        raise CompileError(f"{target} cannot be written ({error})") from error
    return target
