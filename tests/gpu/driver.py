"""The C++ launcher of the package with stand-ins for images, above a driver that only writes down what it is asked.

Launches can be carried out after all: the kernels are interpreted, on the very arguments that the driver was given.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molae_compress.kernels.gpu_build import ARCHITECTURES, SOURCES, TYPES, Image, argument_types, variants, write_table
from molae_compress.kernels.gpu_problem import LatentExpertsProblem

MOST_ARGUMENTS, ALIGNED = 40, 256
TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32, "i64": torch.int64}
TENSORS = (
    *("encode", "encode_pivots", "core", "up_encode", "up_encode_pivots", "core_up", "core_bias"),
    *("down", "decode", "decode_pivots", "decode_bias"),
)


class CFunction(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("entry", ctypes.c_char * 64),
        *((name, ctypes.c_int) for name in ("architecture", "arguments", "shared")),
    )


class CLaunch(ctypes.Structure):
    _fields_ = (
        ("function", CFunction),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * MOST_ARGUMENTS),
    )


class CCleared(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_uint64) for name in ("start", "size", "stream")), ("launched", ctypes.c_int))


class CGate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("activation", "gated", "interleaved")),
        *((name, ctypes.c_float) for name in ("alpha", "limit", "up_offset")),
    )


class CLatentExperts(ctypes.Structure):
    _fields_ = (
        ("element", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "intermediate", "top_k", "experts")),
        *((name, ctypes.c_int64) for name in ("input_group", "output_group", "rank_in", "rank_out")),
        ("gate", CGate),
        *((name, ctypes.c_void_p) for name in ("x", "index", "weight", *TENSORS, "y")),
    )


class CGroupedGemm(ctypes.Structure):
    _fields_ = (
        ("element", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "columns", "groups")),
        ("transposed", ctypes.c_int32),
        ("gate", CGate),
        *((name, ctypes.c_void_p) for name in ("a", "b", "ends", "bias", "row_weight", "out")),
    )


@dataclass(frozen=True)
class Launch:
    """One launch as the driver saw it."""

    name: str
    entry: str
    architecture: int
    reserved: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    arguments: tuple[int, ...]


def stand_ins() -> list[Image]:
    """An image of every variant that says what it is, in place of code; some want much shared memory."""
    kernels = {
        variant: getattr(import_module(f"molae_compress.kernels.{variant.source}"), variant.kernel) for variant in variants()
    }
    images = []
    for variant, kernel in kernels.items():
        count = len(argument_types(variant, kernel.arg_names, "fp16"))
        for name in (f"{variant.name}.{element}" for element in TYPES) if variant.typed else (variant.name,):
            for architecture in (*ARCHITECTURES, 0):
                head = b"// P" if architecture == 0 else b"\x7fELF"
                code = head + f"{name} {architecture} {count}".encode()
                shared = 61440 if ".small" in name else 1024
                images.append(Image(name, architecture, variant.kernel, code, shared, variant.warps, count))
    return images


def compile_fake(folder: Path) -> Path:
    """The fake driver, under the name by which the launcher asks for the real one."""
    made = folder / "libfakecuda.so"
    source = Path(__file__).with_name("fake_cuda.c")
    flags = ("-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1")
    subprocess.run(["g++", "-x", "c", *flags, str(source), "-o", str(made)], check=True)
    return made


def compile_launcher(
    folder: Path,
    *,
    images: list[Image] | None,
    flags: tuple[str, ...] = (),
    names: tuple[str, ...] = ("gpu_launch.cc", "gpu_driver.cc"),
) -> Path:
    """The launcher, or a library of other sources with it, with `images` embedded or without any."""
    folder.mkdir(exist_ok=True)
    if images is not None:
        write_table(images, folder)
    made = folder / "liblaunch.so"
    sources = [str(SOURCES / name) for name in names]
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden", *flags]
    subprocess.run([*command, f"-I{folder}", *sources, "-o", str(made), "-ldl"], check=True)
    return made


class Device:
    """The launcher and the fake driver, loaded into this process."""

    def __init__(self, fake: Path, launcher: Path) -> None:
        self.fake = ctypes.CDLL(str(fake), mode=ctypes.RTLD_GLOBAL)
        self.fake.fake_launch.restype = ctypes.POINTER(CLaunch)
        self.fake.fake_cleared.restype = ctypes.POINTER(CCleared)
        self.library = ctypes.CDLL(str(launcher))
        self.library.molae_gpu_message.restype = ctypes.c_char_p

    def reset(self, major: int = 9, minor: int = 0, *, multiprocessors: int = 3, refused: int = -1, fails: int = 0) -> None:
        """Another device: nothing is loaded or launched yet."""
        self.fake.fake_reset(major, minor, multiprocessors, refused, fails)

    def launches(self) -> list[Launch]:
        """What was launched since the reset."""
        found = []
        for number in range(self.fake.fake_launched()):
            seen = self.fake.fake_launch(number).contents
            function = seen.function
            found.append(
                Launch(
                    function.name.decode(),
                    function.entry.decode(),
                    function.architecture,
                    function.shared,
                    tuple(seen.grid),
                    tuple(seen.block),
                    seen.shared,
                    seen.stream,
                    tuple(seen.arguments[: function.arguments + 2]),
                )
            )
        return found

    def cleared(self) -> list[tuple[int, int, int, int]]:
        """Start, size and stream of what was filled with zeros since the reset, and the number of launches before it."""
        seen = [self.fake.fake_cleared(number).contents for number in range(self.fake.fake_clearings())]
        return [(each.start, each.size, each.stream, each.launched) for each in seen]

    def enqueue(self, kind: str, call: ctypes.Structure, *, stream: int = 0) -> tuple[int, Tensor]:
        """Status of the call, and the scratch memory that it was given."""
        size = ctypes.c_size_t()
        status = getattr(self.library, f"molae_gpu_{kind}_scratch")(ctypes.byref(call), ctypes.byref(size))
        scratch = torch.full((size.value + ALIGNED,), 0x7F, dtype=torch.uint8)  # large floats, no index
        start = -scratch.data_ptr() % ALIGNED
        if status:
            return status, scratch
        run = getattr(self.library, f"molae_gpu_{kind}")
        place, stream_at = ctypes.c_void_p(scratch.data_ptr() + start), ctypes.c_void_p(stream)
        return run(ctypes.byref(call), place, size, stream_at), scratch


def aligned(tensor: Tensor) -> Tensor:
    """A copy whose first byte lies at a multiple of 64, as a device allocates."""
    room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    skip = (-room.data_ptr() % 64) // tensor.element_size()
    return room[skip : skip + tensor.numel()].view(tensor.shape).copy_(tensor)


def gate_of(activation: Any, *, gated: bool, interleaved: bool) -> CGate:
    return CGate(activation.code, gated, interleaved, activation.alpha, activation.limit, activation.up_offset)


def latent_call(problem: LatentExpertsProblem) -> tuple[CLatentExperts, list[Tensor], Tensor]:
    """The call, the tensors that it points to, and its output."""
    p = problem
    given = {"x": p.x_TH, "index": p.index_TK, "weight": p.weight_TK, "y": torch.full_like(p.x_TH, float("nan"))}
    given |= {name: tensor for name in TENSORS if (tensor := getattr(p.tensors, name)) is not None}
    held = {name: aligned(tensor) for name, tensor in given.items()}
    (T, H), top_k = p.x_TH.shape, p.index_TK.shape[1]
    sizes = (T, H, p.tensors.down.shape[1], top_k, p.num_experts, p.input_group, p.output_group, p.rank_in, p.rank_out)
    gate = gate_of(p.activation, gated=p.gated, interleaved=p.interleaved)
    element = int(p.x_TH.dtype == torch.bfloat16)
    call = CLatentExperts(element, *sizes, gate, **{name: tensor.data_ptr() for name, tensor in held.items()})
    return call, list(held.values()), held["y"]


def carry_out(launches: list[Launch]) -> None:
    """Interprets the launched kernels one after the other, on the memory that their arguments point to."""
    known = {variant.name: variant for variant in variants()}
    for launch in launches:
        stem, _, last = launch.name.rpartition(".")
        variant, element = (known[stem], last) if stem in known else (known[launch.name], "fp16")
        kernel: Any = getattr(import_module(f"molae_compress.kernels.{variant.source}"), variant.kernel)
        types = argument_types(variant, kernel.arg_names, element)
        values = {name: value_of(raw, kind) for (name, kind), raw in zip(types.items(), launch.arguments[:-2], strict=True)}
        constants = dict(variant.constants)
        if "UPCAST" in constants:
            constants["UPCAST"] = element == "bf16"
        kernel[launch.grid](**values, **constants)


def value_of(raw: int, kind: str) -> Any:
    if kind == "i32":
        return ctypes.c_int32(raw & 0xFFFFFFFF).value
    if kind == "fp32":
        return ctypes.c_float.from_buffer(ctypes.c_uint32(raw & 0xFFFFFFFF)).value
    dtype = TORCH_TYPES[kind[1:]]
    if raw == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * 16).from_address(raw), dtype=dtype, count=1)
