"""The C++ launcher against a fake driver: what it launches, for which device, and that carrying it out gives the answer."""

from __future__ import annotations

import ctypes
import random
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from hypothesis import given, settings

from molae_compress.kernels import gpu_reference, gpu_tiles
from molae_compress.kernels.activation import Activation
from tests.gpu import driver
from tests.gpu.driver import CGroupedGemm, CLatentExperts, Device, aligned, carry_out, gate_of, latent_call
from tests.gpu.problems import CLOSE, STRUCTURES, Form, error, forms, make

assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"
NO_DRIVER, NO_KERNELS, BAD_ARGUMENT, UNSUPPORTED, TOO_SMALL = range(-1, -6, -1)
HALF = Form(9, dtype=torch.float16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launcher")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Device:
    launcher = driver.compile_launcher(folder / "full", images=driver.stand_ins())
    return Device(driver.compile_fake(folder), launcher)


@pytest.fixture
def device(loaded: Device) -> Device:
    loaded.reset()
    return loaded


def launch_all(device: Device, form: Form, *, stream: int = 0) -> list[driver.Launch]:
    call, _, _ = latent_call(make(form))
    status, _ = device.enqueue("latent_experts", call, stream=stream)
    assert status == 0
    return device.launches()


def check_by_carrying_out(device: Device, form: Form) -> None:
    problem = make(form)
    device.reset()
    call, held, y_TH = latent_call(problem)
    status, scratch = device.enqueue("latent_experts", call)
    assert status == 0
    carry_out(device.launches())
    assert error(y_TH, gpu_reference.latent_experts(problem)) < CLOSE[form.dtype]
    assert len(held) + len(scratch) > 0  # kept alive until here


@given(forms(multiple=8, types=(torch.float16, torch.bfloat16)))
@settings(max_examples=15, deadline=None)
def test_what_is_launched_computes_the_operator(loaded: Device, form: Form) -> None:
    check_by_carrying_out(loaded, form)


@pytest.mark.parametrize("form", STRUCTURES, ids=str)
def test_every_structure(device: Device, form: Form) -> None:
    check_by_carrying_out(device, form)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["plain", "activated", "gated", "interleaved"])
def test_grouped_gemm(device: Device, form: str, transposed: bool) -> None:
    torch.manual_seed(0)
    counts, N, M = [5, 0, 40, 3], 24, 16
    S, G, gated = sum(counts) + 2, len(counts), form in ("gated", "interleaved")
    width = 2 * M if gated else M
    a, ends = aligned(torch.randn(S, N).half()), aligned(torch.tensor(counts).cumsum(0).int())
    b = aligned((torch.randn(G, *((N, width) if transposed else (width, N))) * 0.4).half())
    bias, weight = aligned(torch.randn(G, width).half()), aligned(torch.rand(S).half())
    out = aligned(torch.full((S, M), 7.0).half())
    activation = Activation("identity" if form == "plain" else "gelu")
    gate = gate_of(activation, gated=gated, interleaved=form == "interleaved")
    pointers = [tensor.data_ptr() for tensor in (a, b, ends, bias, weight, out)]
    call = CGroupedGemm(0, S, N, M, G, transposed, gate, *pointers)
    status, scratch = device.enqueue("grouped_gemm", call)
    assert status == 0
    carry_out(device.launches())
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    for row, group in enumerate(groups):
        matrix = b[group].T if transposed else b[group]
        wanted = gpu_reference.product(
            a[row], matrix, bias[group], activation, is_gated=gated, interleaved=form == "interleaved"
        )
        assert error(out[row], wanted * weight[row].float()) < 1e-2
    assert (out[-2:] == 7).all()  # rows of no group
    assert scratch.numel()


@pytest.mark.parametrize(
    ("major", "minor", "refused", "architecture"),
    [
        (8, 0, -1, 80),
        (8, 6, -1, 80),
        (8, 9, -1, 80),
        (9, 0, -1, 90),
        (10, 0, -1, 100),
        (10, 3, -1, 0),
        (11, 0, -1, 0),
        (12, 0, -1, 120),
        (12, 1, 120, 0),
        (9, 0, 90, 0),
    ],
)
def test_code_is_chosen_by_compute_capability(
    device: Device, major: int, minor: int, refused: int, architecture: int
) -> None:
    device.reset(major, minor, refused=refused)
    assert {launch.architecture for launch in launch_all(device, HALF)} == {architecture}


def test_how_a_product_is_launched(device: Device) -> None:
    form = replace(HALF, tokens=300, experts=4, top_k=2, rank_in=24, dtype=torch.bfloat16)
    call, _, _ = latent_call(make(form))
    device.reset(multiprocessors=5)
    assert device.enqueue("latent_experts", call, stream=0x55)[0] == 0
    launches = device.launches()
    names = [launch.name for launch in launches]
    assert names[:4] == ["count", "scan", "place", "tiles"]
    core = next(launch for launch in launches if launch.name.startswith("gemm.nn_gate_1"))
    assert core.name == "gemm.nn_gate_1.large.bf16"  # 600 slots of 4 experts
    assert core.entry == "grouped_gemm_kernel"
    assert core.grid == (5 * gpu_tiles.LARGE.resident, 1, 1)
    assert core.block == (32 * gpu_tiles.LARGE.warps, 1, 1)
    assert (core.shared, core.reserved) == (1024, 0)  # no more than every block may have
    assert {launch.stream for launch in launches} == {0x55}
    assert core.arguments[2] == call.core
    assert core.arguments[12:19] == (24, 24, 24, 24, 600, 4, 1)  # N, K, strides, rows, groups, group size
    assert core.arguments[-2:] == (0, 0)  # the two that Triton adds


def test_much_shared_memory_is_asked_for(device: Device) -> None:
    small = [launch for launch in launch_all(device, HALF) if ".small" in launch.name]
    assert small
    assert {(launch.shared, launch.reserved) for launch in small} == {(61440, 61440)}


def test_a_few_tokens_take_four_launches(device: Device) -> None:
    form = replace(HALF, tokens=gpu_tiles.FEW_TOKENS)
    names = [launch.name for launch in launch_all(device, form)]
    assert names == ["few.nt.fp16", "few.nn_gate_1.fp16", "few.nt.fp16", "few_combine.nn.fp16"]
    grids = [launch.grid for launch in device.launches()]
    slots = form.tokens * form.top_k
    assert [grid[0] for grid in grids] == [slots, slots, slots, form.tokens]


def test_kernels_are_loaded_once_for_each_context(device: Device) -> None:
    launch_all(device, HALF)
    once = device.fake.fake_loaded()
    launch_all(device, HALF)
    assert device.fake.fake_loaded() == once
    device.reset()
    launch_all(device, HALF)
    assert device.fake.fake_loaded() == once


def test_no_tokens_launch_nothing(device: Device) -> None:
    assert launch_all(device, replace(HALF, tokens=0)) == []


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"x": None}, BAD_ARGUMENT),
        ({"core": None}, BAD_ARGUMENT),
        ({"decode": None}, BAD_ARGUMENT),
        ({"rank_out": 0}, BAD_ARGUMENT),
        ({"input_group": 3}, BAD_ARGUMENT),
        ({"output_group": 0}, BAD_ARGUMENT),
        ({"tokens": -1}, BAD_ARGUMENT),
        ({"top_k": 0}, BAD_ARGUMENT),
        ({"rank_in": 64}, BAD_ARGUMENT),
        ({"core_up": 64}, BAD_ARGUMENT),
        ({"element": 2}, UNSUPPORTED),
        ({"rank_in": 12}, UNSUPPORTED),
        ({"intermediate": 4}, UNSUPPORTED),
        ({"x": 8}, UNSUPPORTED),
        ({"experts": 2048}, UNSUPPORTED),
        ({"tokens": 1 << 40}, UNSUPPORTED),
    ],
)
def test_what_does_not_fit_is_refused(device: Device, change: dict[str, int | None], status: int) -> None:
    call, _, _ = latent_call(make(HALF))
    for name, value in change.items():
        setattr(call, name, value)
    assert device.enqueue("latent_experts", call)[0] == status
    assert device.launches() == []


def test_an_unknown_activation_is_refused(device: Device) -> None:
    call, _, _ = latent_call(make(HALF))
    call.gate.activation = 6
    assert device.enqueue("latent_experts", call)[0] == BAD_ARGUMENT


def test_too_little_scratch_is_refused(device: Device) -> None:
    call, held, _ = latent_call(make(HALF))
    size, run = ctypes.c_size_t(), device.library.molae_gpu_latent_experts
    assert device.library.molae_gpu_latent_experts_scratch(ctypes.byref(call), ctypes.byref(size)) == 0
    room = ctypes.c_void_p(1 << 20)
    assert run(ctypes.byref(call), room, ctypes.c_size_t(size.value - 1), None) == TOO_SMALL
    assert run(ctypes.byref(call), None, size, None) == TOO_SMALL
    assert run(ctypes.byref(call), ctypes.c_void_p((1 << 20) + 16), size, None) == BAD_ARGUMENT
    assert device.launches() == []
    assert held


def test_the_status_of_the_driver_is_passed_on(device: Device) -> None:
    call, _, _ = latent_call(make(HALF))
    device.reset(fails=719)
    assert device.enqueue("latent_experts", call)[0] == 719
    device.reset(0, 0)
    assert device.enqueue("latent_experts", call)[0] == 201
    assert b"CUresult" in device.library.molae_gpu_message(719)


def test_a_library_without_kernels_says_so(device: Device, folder: Path) -> None:
    library = ctypes.CDLL(str(driver.compile_launcher(folder / "empty", images=None)))
    call, _, _ = latent_call(make(HALF))
    size = ctypes.c_size_t()
    assert library.molae_gpu_latent_experts_scratch(ctypes.byref(call), ctypes.byref(size)) == NO_KERNELS
    assert library.molae_gpu_latent_experts(ctypes.byref(call), None, size, None) == NO_KERNELS


def test_a_machine_without_driver_gets_a_status(loaded: Device, folder: Path) -> None:
    launcher = folder / "full" / "liblaunch.so"
    program = (
        "import ctypes, sys\n"
        "try:\n"
        "    ctypes.CDLL('libcuda.so.1')\n"
        "except OSError:\n"
        "    pass\n"
        "else:\n"
        "    sys.exit('there is a driver')\n"
        f"library = ctypes.CDLL({str(launcher)!r})\n"
        f"call = (ctypes.c_char * {ctypes.sizeof(CLatentExperts)}).from_buffer_copy(bytes.fromhex(sys.argv[1]))\n"
        "size = ctypes.c_size_t()\n"
        "assert library.molae_gpu_latent_experts_scratch(ctypes.byref(call), ctypes.byref(size)) == 0\n"
        "print(library.molae_gpu_latent_experts(ctypes.byref(call), ctypes.c_void_p(256), size, None))\n"
    )
    call, held, _ = latent_call(make(HALF))
    done = subprocess.run([sys.executable, "-c", program, bytes(call).hex()], capture_output=True, text=True, check=False)
    if "there is a driver" in done.stderr:
        pytest.skip("this machine has a CUDA driver")
    assert done.stdout.strip() == str(NO_DRIVER), done.stderr
    assert held


def test_packed_code_is_unpacked(folder: Path) -> None:
    """Stored, fixed and dynamic blocks come back; damaged ones end inside their buffers (AddressSanitizer watches)."""
    source = folder / "inflate.cc"
    source.write_text(
        '#include "gpu_inflate.h"\n'
        "#include <cstdio>\n#include <vector>\n"
        "int main() {\n"
        "  unsigned sizes[2];\n"
        "  while (std::fread(sizes, 4, 2, stdin) == 2) {\n"
        "    std::vector<unsigned char> in(sizes[0]), out(sizes[1]);\n"
        "    if (std::fread(in.data(), 1, in.size(), stdin) != in.size()) return 1;\n"
        "    bool sound = molae_gpu::Inflate(in.data(), in.size(), out.data(), out.size()).run();\n"
        "    std::fputc(sound, stdout);\n"
        "    if (sound && !out.empty()) std::fwrite(out.data(), 1, out.size(), stdout);\n"
        "  }\n"
        "}\n",
        encoding="utf-8",
    )
    program = folder / "inflate"
    flags = ["-std=c++17", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{driver.SOURCES}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    generator = random.Random(0)
    texts = [b"", b"a", b"abc" * 40000, generator.randbytes(70000), bytes(generator.choices(range(40), k=60000))]
    texts.append((driver.SOURCES / "gpu_launch.cc").read_bytes())

    def packed(text: bytes, level: int, strategy: int) -> bytes:
        stream = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
        return stream.compress(text) + stream.flush()

    def run(records: list[tuple[bytes, int]]) -> bytes:
        sent = b"".join(struct.pack("<II", len(data), size) + data for data, size in records)
        done = subprocess.run([str(program)], input=sent, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    for level, strategy in ((0, zlib.Z_DEFAULT_STRATEGY), (9, zlib.Z_DEFAULT_STRATEGY), (9, zlib.Z_FIXED)):
        records = [(packed(text, level, strategy), len(text)) for text in texts]
        assert run(records) == b"".join(b"\x01" + text for text in texts)
    whole = packed(texts[-1], 9, zlib.Z_DEFAULT_STRATEGY)
    damaged = []
    for _ in range(200):
        data = bytearray(whole[: generator.randrange(1, len(whole))])
        for _ in range(generator.randrange(4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        damaged.append((bytes(data), len(texts[-1])))
    assert run(damaged).count(b"\x01") < len(texts[-1])
