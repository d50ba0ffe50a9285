"""What the compiled GPU kernels are made of: registers, spills, shared memory, matrix and 16-byte instructions.

    python -m molae_compress.kernels.gpu_facts

compiles the main products for every architecture and prints the table. It says what the machine code holds, not how fast
it is. Needs the package triton, whose wheel brings the disassembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from molae_compress.kernels.gpu_build import ARCHITECTURES, Image, compile_all, variants

SHARED_LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes a block may have. Code of sm_80 also runs on 8.6 and 8.9, where it is less than on 8.0."""

MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The instruction of each architecture's tensor cores for tiles of 64 rows and more."""

MAIN = tuple(f"gemm.{name}" for name in ("nt.small", "nt.medium", "nt.large", "nn.large", "nt_columns.gathered")) + tuple(
    f"gemm.nn_{gate}_1.{tile}" for gate in ("gate", "split", "pair") for tile in ("small", "large")
)
FEW = ("few.nt", "few.nn", "few.nn_gate_1", "few_combine.nt", "few_combine.nn", "few_combine.nn_one", "combine.rows")
_COUNTED = {
    "matrix": r"\b(?:HMMA|HGMMA|UTCHMMA)\b",
    "spills": r"\b(?:STL|LDL)\b",
    "wide_loads": r"\b(?:LDG\.E\S*\.128|LDGSTS\S*\.128)\b",
    "wide_stores": r"\bSTG\.E\S*\.128\b",
}


@dataclass(frozen=True)
class Facts:
    """Of one image of machine code.

    Attributes:
        name: of the image.
        architecture: 80, 90, 100 or 120.
        registers: of a thread.
        stack: bytes of a thread in local memory; spilled registers are among them.
        shared: bytes of dynamic shared memory of a block.
        size: bytes of the image.
        instructions: mnemonics of the matrix instructions that occur.
        matrix: how many of them.
        spills: loads and stores of local memory.
        wide_loads: loads of 16 bytes from global memory.
        wide_stores: stores of 16 bytes to it.
    """

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    size: int
    instructions: frozenset[str]
    matrix: int
    spills: int
    wide_loads: int
    wide_stores: int


def facts_of(image: Image) -> Facts:
    """Disassembles one image of machine code."""
    assert image.architecture, "PTX is not machine code"
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(image.code)
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", cubin)
        code = _output(tools / "nvdisasm", "-c", cubin)
    found = {key: re.findall(pattern, code) for key, pattern in _COUNTED.items()}
    registers, stack = (int(_number(key, usage)) for key in ("REG", "STACK"))
    return Facts(
        image.name,
        image.architecture,
        registers,
        stack,
        image.shared,
        len(image.code),
        frozenset(found["matrix"]),
        *(len(found[key]) for key in _COUNTED),
    )


def collect(names: Iterable[str], architectures: Iterable[int] = ARCHITECTURES, element: str = "fp16") -> list[Facts]:
    """Compiles the variants of these names and disassembles them."""
    wanted = set(names)
    chosen = [variant for variant in variants() if variant.name in wanted]
    return [facts_of(image) for image in compile_all(architectures, (element,), chosen) if image.architecture]


def _output(tool: Path, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _number(key: str, usage: str) -> str:
    found = re.search(rf"\b{key}:(\d+)", usage)
    assert found is not None, usage
    return found[1]


@click.command()
@click.option("--element", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True, help="Element type.")
def main(element: str) -> None:
    """Prints a table of the compiled products."""
    click.echo("kernel                        arch  registers  spills  shared  matrix         16-byte loads/stores  bytes")
    for f in collect((*MAIN, *FEW), element=element):
        matrix = f"{f.matrix} {'/'.join(sorted(f.instructions))}" if f.matrix else "-"
        wide = f"{f.wide_loads}/{f.wide_stores}"
        click.echo(
            f"{f.name:<30}{f.architecture:>4}{f.registers:>11}{f.spills:>8}{f.shared:>8}  {matrix:<15}{wide:<22}{f.size:>5}"
        )


if __name__ == "__main__":
    main()
