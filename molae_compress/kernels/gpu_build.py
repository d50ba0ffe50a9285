"""Compiles the GPU kernels ahead of time, without a GPU: machine code for four architectures and PTX for all others.

    python -m molae_compress.kernels.gpu_build

writes `csrc/gpu_kernels.bin` (packed images) and `csrc/gpu_kernels.inc` (their table), which `csrc/gpu_launch.cc` embeds
where it finds them. Needs the package triton, whose wheel brings an assembler; nothing of it is needed to run the result.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from molae_compress.errors import MolaeError
from molae_compress.kernels import gpu_tiles
from molae_compress.kernels.gpu_tiles import Tile

ARCHITECTURES = (80, 90, 100, 120)
TYPES = ("fp16", "bf16")
SOURCES = Path(__file__).parent / "csrc"
PTX_ARCHITECTURE = 80  # the oldest: PTX runs on what is newer
ROW_WARPS = 4

_FLOAT_POINTERS = frozenset(
    f"{name}_ptr" for name in ("a", "a_up", "w", "w_up", "out", "bias", "row_weight", "weight", "value", "kept", "base")
)
_FLOATS = frozenset(("slope", "cubic", "limit", "up_offset"))
_MULTIPLES_OF_8 = frozenset(("N", "K", "stride_a", "stride_out", "R", "H"))  # 16 bytes: what the launcher promises
_PTX_TYPES = {"i32": ".u32", "fp32": ".f32"}


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants.

    Attributes:
        name: as in the table, without the element type.
        kernel: name of the function, in the module `source`.
        source: `triton_gemm`, `triton_few` or `triton_rows`.
        constants: its constexpr arguments.
        warps: of a program.
        stages: of its pipeline.
        typed: compiled for each element type.
    """

    name: str
    kernel: str
    source: str
    constants: tuple[tuple[str, Any], ...]
    warps: int = ROW_WARPS
    stages: int = 3
    typed: bool = True


@dataclass(frozen=True)
class Image:
    """A compiled variant.

    Attributes:
        name: of the variant and the element type, `NAME.TYPE`.
        architecture: 80, 90, 100 or 120; 0 for PTX.
        entry: name of the function inside.
        code: cubin or PTX.
        shared: bytes of dynamic shared memory.
        warps: of a program.
        arguments: that the launcher passes, without Triton's own two.
    """

    name: str
    architecture: int
    entry: str
    code: bytes
    shared: int
    warps: int
    arguments: int


def variants() -> list[Variant]:
    """Everything that `csrc/gpu_launch.cc` may launch."""
    every, one = gpu_tiles.TILES, (gpu_tiles.MEDIUM,)
    found: list[Variant] = []
    for name, transposed, gate, family, tiles in (
        ("nt", False, 0, 0, every),
        ("nt_1", False, 0, 1, one),
        ("nt_2", False, 0, 2, one),
        ("nt_gate_1", False, 1, 1, one),
        ("nt_gate_2", False, 1, 2, one),
        ("nn", True, 0, 0, every),
        ("nn_1", True, 0, 1, one),
        ("nn_2", True, 0, 2, one),
        ("nn_gate_1", True, 1, 1, every),
        ("nn_gate_2", True, 1, 2, one),
        ("nn_split_1", True, 2, 1, every),
        ("nn_split_2", True, 2, 2, one),
        ("nn_pair_1", True, 3, 1, every),
        ("nn_pair_2", True, 3, 2, one),
    ):
        found += [_gemm(name, tile, transposed, gate, family, columns=False) for tile in tiles]
        if name.startswith("nn") or name == "nt":
            found.append(_few(name, transposed, gate, family, columns=False))
    found += [_gemm("nt_columns", gpu_tiles.GATHERED, False, 0, 0, columns=True)]
    found += [_few("nt_columns", False, 0, 0, columns=True)]
    for name, transposed, one_group in (("nt", False, False), ("nn", True, False), ("nn_one", True, True)):
        constants = (*_few_blocks(transposed), ("TRANSPOSED", transposed), ("ONE_GROUP", one_group))
        warps = gpu_tiles.ONE_GROUP_WARPS if one_group else gpu_tiles.FEW_WARPS
        found.append(Variant(f"few_combine.{name}", "few_combine_kernel", "triton_few", constants, warps))
    return found + _row_variants()


def _gemm(name: str, tile: Tile, transposed: bool, gate: int, family: int, *, columns: bool) -> Variant:
    constants = {
        "BM": tile.rows,
        "BN": tile.columns_of(gate > 0),
        "BK": tile.depth,
        "GROUPS": gpu_tiles.MAX_GROUPS,
        "TRANSPOSED": transposed,
        "GATE": gate,
        "FAMILY": family,
        "COLUMNS": columns,
        "ATOMIC": False,
        "UPCAST": False,
        "PRECISION": "tf32",
    }
    full = f"gemm.{name}.{tile.name}"
    return Variant(full, "grouped_gemm_kernel", "triton_gemm", tuple(constants.items()), tile.warps, tile.stages)


def _few_blocks(transposed: bool) -> tuple[tuple[str, Any], ...]:
    return (*zip(("BN", "BK"), gpu_tiles.few_tile(transposed), strict=True), ("STAGES", gpu_tiles.FEW_STAGES))


def _few(name: str, transposed: bool, gate: int, family: int, *, columns: bool) -> Variant:
    constants = (("TRANSPOSED", transposed), ("GATE", gate), ("FAMILY", family), ("COLUMNS", columns))
    return Variant(
        f"few.{name}", "few_rows_kernel", "triton_few", (*_few_blocks(transposed), *constants), gpu_tiles.FEW_WARPS
    )


def _row_variants() -> list[Variant]:
    bins = gpu_tiles.bins_for(gpu_tiles.MAX_GROUPS)
    steps = gpu_tiles.steps_for(gpu_tiles.MAX_RANK)
    plain: list[tuple[str, tuple[tuple[str, Any], ...]]] = [
        ("count", (("BLOCK", gpu_tiles.SORT_BLOCK), ("BINS", bins))),
        ("scan", (("CHUNK", gpu_tiles.SCAN_CHUNK),)),
        ("place", (("BLOCK", gpu_tiles.SORT_BLOCK),)),
        ("tiles", (("GROUPS", gpu_tiles.MAX_GROUPS),)),
        ("columns", (("STEPS", steps), ("BLOCK", gpu_tiles.COLUMNS_BLOCK))),
    ]
    found = [Variant(name, f"{name}_kernel", "triton_rows", constants, typed=False) for name, constants in plain]
    return found + [
        Variant(name, "combine_kernel", "triton_rows", (("POSITION", position), ("BN", gpu_tiles.COMBINE_BLOCK)))
        for name, position in (("combine.rows", False), ("combine.columns", True))
    ]


def argument_types(variant: Variant, arguments: Sequence[str], element: str) -> dict[str, str]:
    """Argument -> type, as Triton writes types, without the constants."""
    constants = dict(variant.constants)
    types: dict[str, str] = {}
    for name in arguments:
        if name in constants:
            continue
        if name in _FLOAT_POINTERS:
            types[name] = f"*{element}"
        elif name.endswith("_ptr"):
            types[name] = "*i64" if name == "index_ptr" else "*i32"
        else:
            types[name] = "fp32" if name in _FLOATS else "i32"
    return types


def for_architecture(variant: Variant, architecture: int) -> Variant:
    """The variant with the tile that suits an architecture; others than products of tiles stay as they are."""
    if variant.source != "triton_gemm":
        return variant
    constants, name = dict(variant.constants), variant.name.rpartition(".")[2]
    gated = constants["GATE"] > 0
    named = next(tile for tile in (*gpu_tiles.TILES, gpu_tiles.GATHERED, gpu_tiles.EXACT) if tile.name == name)
    tile = gpu_tiles.fitted(named, architecture, gated=gated)
    constants |= {"BN": tile.columns_of(gated), "BK": tile.depth}
    return replace(variant, constants=tuple(constants.items()), warps=tile.warps, stages=tile.stages)


def compile_variant(variant: Variant, architecture: int, element: str) -> tuple[Image, str]:
    """The image of one variant for one architecture and element type, and its PTX.

    Raises:
        MolaeError: Triton passes arguments in another way than the launcher does.
    """
    # Triton reads these when it compiles; line tables would double the images.
    import triton

    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        return _compiled(variant, architecture, element)


def _compiled(variant: Variant, architecture: int, element: str) -> tuple[Image, str]:
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = for_architecture(variant, architecture)
    kernel = getattr(import_module(f"molae_compress.kernels.{variant.source}"), variant.kernel)
    names, constants = list(kernel.arg_names), dict(variant.constants)
    types = argument_types(variant, names, element)
    aligned = {name: 16 for name, kind in types.items() if kind.startswith("*")}
    aligned |= {name: 8 for name in types if name in _MULTIPLES_OF_8}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", value]] for name, value in aligned.items()},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx, data = compiled.asm["ptx"], compiled.metadata
    check_arguments(ptx, list(types.values()))
    name = f"{variant.name}.{element}" if variant.typed else variant.name
    return Image(name, architecture, data.name, compiled.asm["cubin"], data.shared, data.num_warps, len(types)), ptx


def check_arguments(ptx: str, types: Sequence[str]) -> None:
    """Raises `MolaeError` unless the kernel takes `types` and two more pointers: what the launcher passes.

    Triton adds the pointers, to global and to profiling memory; it promises neither their number nor their order.
    """
    entry = re.search(r"\.entry\s+\w+\((.*?)\)", ptx, re.DOTALL)
    found = re.findall(r"\.param\s+(\.\w+)", entry[1]) if entry else []
    wanted = [_PTX_TYPES.get(kind, ".u64") for kind in types] + [".u64", ".u64"]
    if found != wanted:
        raise MolaeError(
            f"The compiled kernel takes the arguments {found} where the launcher passes {wanted}.",
            why="Versions of Triton differ in the arguments they add.",
            remedy="Install the version of triton that constraints.txt names.",
        )


def compile_all(
    architectures: Iterable[int] = ARCHITECTURES,
    elements: Iterable[str] = TYPES,
    chosen: Sequence[Variant] | None = None,
    *,
    processes: int = 2,
) -> list[Image]:
    """Images of all variants, and PTX of those for the oldest architecture.

    Args:
        architectures: some of `ARCHITECTURES`.
        elements: some of `TYPES`.
        chosen: some of `variants()`; all by default.
        processes: that compile at the same time.
    """
    elements = tuple(elements)
    jobs = [
        (variant, architecture, element)
        for architecture in architectures
        for variant in (variants() if chosen is None else chosen)
        for element in (elements if variant.typed else elements[:1])
    ]
    images: list[Image] = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for image, ptx in pool.map(partial(_unpacked, compile_variant), jobs):
            images.append(image)
            if image.architecture == PTX_ARCHITECTURE:
                text = re.sub(r"^\s*//.*\n", "", ptx, flags=re.MULTILINE).encode()
                images.append(Image(image.name, 0, image.entry, text, image.shared, image.warps, image.arguments))
    return images


def _unpacked(function: Any, job: tuple[Any, ...]) -> Any:
    return function(*job)


def write_table(images: Sequence[Image], folder: Path) -> tuple[Path, Path]:
    """Writes `gpu_kernels.bin` and `gpu_kernels.inc` into `folder`; returns their paths."""
    blob, rows = bytearray(), []
    for image in images:
        packed = zlib.compress(image.code, 9, wbits=-15)
        rows.append(
            f'    {{"{image.name}", "{image.entry}", {image.architecture}, {len(blob)}, {len(packed)}, {len(image.code)}, '
            f"{image.shared}, {image.warps}, {image.arguments}}},"
        )
        blob += packed
    binary, table = folder / "gpu_kernels.bin", folder / "gpu_kernels.inc"
    binary.write_bytes(blob)
    constants = {name: value for name, value in vars(gpu_tiles).items() if name.isupper() and isinstance(value, int)}
    tiles = [
        f'    {{"{tile.name}", {tile.rows}, {tile.columns}, {tile.resident}, {tile.from_rows}}},'
        for tile in (*gpu_tiles.TILES, gpu_tiles.GATHERED)
    ]
    lines = [
        "// Written by molae_compress.kernels.gpu_build.",
        f'#define MOLAE_GPU_BLOB "{binary.resolve()}"',
        *(f"constexpr int {name} = {value};" for name, value in constants.items()),
        "constexpr Tile kTiles[] = {",
        *tiles,
        "};",
        "constexpr Image kImages[] = {",
        *rows,
        "};",
    ]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return binary, table


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=SOURCES, help="Folder for the two files.")
@click.option("--processes", type=int, default=2, show_default=True, help="Compilers at work at the same time.")
def main(output: Path, processes: int) -> None:
    """Compiles every kernel for every architecture and writes what the operator library embeds."""
    images = compile_all(processes=processes)
    output.mkdir(parents=True, exist_ok=True)
    binary, table = write_table(images, output)
    click.echo(f"{len(images)} images, {binary.stat().st_size} bytes: {binary}, {table}")


if __name__ == "__main__":
    main()
