"""The library as a piece of C++: every instruction set, sanitizers, the table of the runtime's functions, and the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from molae_compress.kernels import build, compiling

ROOT = Path(__file__).resolve().parents[1]
CSRC = compiling.FOLDER / "csrc"
SANITIZE = ("-O1", "-g", "-fsanitize=address")
MAX_BYTES = 5_000_000

needs_compiler = pytest.mark.skipif(compiling.find_compiler() is None, reason="no C++ compiler")


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def compile_program(target: Path, *arguments: str | Path) -> Path:
    run(compiling.find_compiler() or "g++", "-std=c++17", "-Wno-psabi", f"-I{CSRC}", *arguments, "-o", target)
    return target


@needs_compiler
def test_the_library_is_small_and_carries_the_mark_of_its_sources() -> None:
    library = build()
    assert library.stat().st_size < MAX_BYTES
    assert compiling.is_current(library)


def test_a_library_with_gpu_kernels_is_current_where_they_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an installed wheel: it carries the library, and not what was embedded."""
    kernels, library = tmp_path / "csrc" / "gpu_kernels.bin", tmp_path / "library.so"
    shutil.copytree(CSRC, tmp_path / "csrc", ignore=shutil.ignore_patterns("gpu_kernels.*"))
    monkeypatch.setattr(compiling, "FOLDER", tmp_path)
    plain = " ".join(compiling.marks())
    kernels.write_bytes(b"compiled")
    library.write_text(" ".join(compiling.marks()))
    assert compiling.is_current(library)
    kernels.write_bytes(b"compiled anew")
    assert not compiling.is_current(library)
    kernels.unlink()
    assert compiling.is_current(library)
    library.write_text(plain)
    assert compiling.is_current(library)
    kernels.write_bytes(b"compiled")
    assert not compiling.is_current(library), "`make kernels` is to embed them"


def test_every_source_is_compiled_or_included() -> None:
    # Compiled GPU kernels are made, not kept: they may be there or not.
    texts = {path.name: path.read_text() for path in CSRC.iterdir() if path.stem != "gpu_kernels"}
    included = set(re.findall(r'#include "(\S+)"', "".join(texts.values()))) - {"gpu_kernels.inc"}
    assert texts.keys() == set(compiling.SOURCES) | included


@needs_compiler
def test_a_compiler_that_refuses_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(compiling.CompileError, match="no-such-flag"):
        compiling.compile_library(tmp_path / "library.so", flags=("--no-such-flag",))
    assert not list(tmp_path.iterdir())


@needs_compiler
@pytest.mark.slow
def test_every_instruction_set_is_right_and_stays_in_bounds(tmp_path: Path) -> None:
    program = compile_program(
        tmp_path / "driver",
        *SANITIZE,
        "-fsanitize=undefined",
        "-fno-sanitize-recover=all",
        CSRC / "cpu_kernels.cc",
        ROOT / "tests/kernels_driver.cc",
    )
    assert "plain checked" in run(program, "500")


@needs_compiler
@pytest.mark.slow
def test_right_and_damaged_nodes_under_the_address_sanitizer(tmp_path: Path) -> None:
    library = compiling.compile_library(tmp_path / "libmolae_ops.so", flags=SANITIZE)
    # The sanitizer looks for the C++ library once, at the start; Python itself does not load it.
    names = ("libasan.so", "libstdc++.so")
    preload = " ".join(run(compiling.find_compiler() or "g++", f"-print-file-name={name}").strip() for name in names)
    # Python and ONNX Runtime leave memory behind at exit: not the matter here.
    env = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
    said = run(sys.executable, "-m", "tests.kernels_fuzz", library, "300", env=env)
    refused = re.fullmatch(r"300 nodes, (\d+) refused\n", said)
    assert refused is not None
    assert int(refused[1]) > 100


@needs_compiler
@pytest.mark.slow
def test_the_table_of_functions_is_that_of_the_real_header(tmp_path: Path, ort_include: Path | None) -> None:
    if ort_include is None:
        pytest.skip("no header: pytest --ort-include FOLDER with onnxruntime_c_api.h")
    table = (CSRC / "ort_abi.h").read_text()
    functions = re.findall(r"F\((\w+), (\d+)\)", table)
    fields = re.findall(r"\(\*(\w+)\)\(", table[table.index("struct OrtOperator") :])
    assert len(functions) > 30
    assert len(fields) > 20
    lines = ["#define ORT_API_MANUAL_INIT", "#include <onnxruntime_c_api.h>", '#include "ort_abi.h"', "#include <cstddef>"]
    lines += [f"static_assert(offsetof(OrtApi, {name}) == {index} * sizeof(void*));" for name, index in functions]
    lines += [f"static_assert(offsetof(OrtCustomOp, {name}) == offsetof(molae::OrtOperator, {name}));" for name in fields]
    values = {
        "kOrtFloat": "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT",
        "kOrtInt32": "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32",
        "kOrtInt64": "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64",
        "kOrtFloat16": "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16",
        "kOrtBfloat16": "ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16",
        "kOrtFail": "ORT_FAIL",
        "kOrtInvalidArgument": "ORT_INVALID_ARGUMENT",
        "kOptional": "INPUT_OUTPUT_OPTIONAL",
        "kAttributeInt": "ORT_OP_ATTR_INT",
        "kMemoryDefault": "OrtMemTypeDefault",
    }
    lines += [
        f"static_assert(static_cast<int>(molae::{ours}) == static_cast<int>({theirs}));" for ours, theirs in values.items()
    ]
    (tmp_path / "check.cc").write_text("\n".join([*lines, "int main() {}"]), encoding="utf-8")
    compile_program(tmp_path / "check", f"-I{ort_include}", tmp_path / "check.cc")


@needs_compiler
@pytest.mark.slow
def test_a_wheel_carries_the_library_and_names_its_platform(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT))
    run(*pip)
    (wheel,) = tmp_path.glob("*.whl")
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "molae_compress/kernels/libmolae_ops.so" in names
    assert "molae_compress/kernels/csrc/ort_abi.h" in names
