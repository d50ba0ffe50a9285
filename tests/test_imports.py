"""The shape of the package: who may import whom, what importing it costs, how long its files may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = "molae_compress"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
MODULES = sorted(ROOT.rglob("*.py"))

BASE = {"tensors", "errors", "layouts"}
MIDDLE = {"adapters", "calibration", "solver", "modeling", "checkpoint"}
OUTER = {"tuning", "export", "report", "evaluate", "serving"}
ALLOWED: dict[str, set[str]] = dict.fromkeys(MIDDLE, BASE) | {
    "solver": {"tensors", "errors"},
    "layouts": {"tensors", "errors"},
    "kernels": {"tensors", "errors"},
    "modeling": BASE | {"kernels"},
    "tensors": {"errors"},
    "errors": set(),
}
HEAVY = ("onnx", "onnxruntime", "peft", "triton", "datasets", "matplotlib", "vllm")
ON_TRITON = ("molae_compress.kernels.gpu_launch", "molae_compress.kernels.triton_gemm")  # modules that import triton
MAX_LINES = 400


def imported(path: Path) -> set[str]:
    """Full names of the modules that the file imports, at its top or inside a function."""
    parents = (PACKAGE, *path.relative_to(ROOT).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else ()
            source = ".".join((*above, node.module) if node.module else above)
            # `from molae_compress import solver` names the module only in what it imports.
            names |= {f"{source}.{alias.name}" for alias in node.names} if source == PACKAGE else {source}
    return names


def forbidden(path: Path) -> list[str]:
    """What the file imports against the one-way rule; parts of the package by their short names."""
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    split = [name.split(".") for name in imported(path)]
    ours = {names[1] for names in split if names[0] == PACKAGE and len(names) > 1} - {part}
    theirs = {names[0] for names in split if names[0] != PACKAGE}
    wrong = ours - ALLOWED.get(part, ours)
    if part != "__main__":
        wrong |= ours & {"cli"}
    if part in OUTER:
        wrong |= ours & OUTER
    if part == "solver":
        wrong |= theirs - sys.stdlib_module_names - {"torch"}
    return sorted(wrong)


def test_imports_run_one_way() -> None:
    assert MODULES
    wrong = {str(path.relative_to(ROOT)): names for path in MODULES if (names := forbidden(path))}
    assert not wrong, f"imports against the rule in CONTRIBUTING.md: {wrong}"


def test_no_file_outgrows_its_reader() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    too_long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert not too_long, f"more than {MAX_LINES} lines: {too_long}"


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys, torch._dynamo\n"
        "before = set(sys.modules)\n"  # torch imports triton itself where it is installed
        f"import {PACKAGE}\n"
        f"loaded = [name for name in {(*HEAVY, *ON_TRITON)} if name in sys.modules and name not in before]\n"
        "print(loaded + ['cuda'] * torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"`import {PACKAGE}` loaded {done.stdout.strip()}"
