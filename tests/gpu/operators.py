"""The operators for the CUDAExecutionProvider, between a fake ONNX Runtime and a fake driver."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from molae_compress.kernels import build, compiling, gpu_reference, has_gpu_kernels
from molae_compress.kernels.activation import Activation
from molae_compress.kernels.gpu_problem import LatentExpertsProblem
from tests.gpu import driver
from tests.gpu.driver import ALIGNED, TENSORS, CGroupedGemm, Device, aligned, carry_out, gate_of, latent_call
from tests.gpu.fake_ort import ALLOCATOR, BFLOAT16, FLOAT, FLOAT16, MEMORY, FakeRuntime, Placed, Run
from tests.gpu.problems import CLOSE, STRUCTURES, Form, error, make

assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ELEMENTS = {torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
GPT_OSS = Activation("silu", 1.702, 7.0, 1.0)
HALF = Form(9, dtype=torch.float16)
FORMS = [
    HALF,
    replace(HALF, tokens=2, dtype=torch.bfloat16, biased=True, interleaved=True, activation=GPT_OSS),
    replace(HALF, gated=False, activation=Activation("relu2"), rank_out=0),
    replace(HALF, interpolative=True, rank_in=32, rank_out=32, pair=True),  # nothing is stored but pivots
    *STRUCTURES[::3],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("operators")


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    return driver.compile_launcher(
        folder / "full", images=driver.stand_ins(), flags=("-O0", "-Wno-psabi"), names=compiling.SOURCES
    )


@pytest.fixture(scope="module")
def loaded(folder: Path, library: Path) -> Device:
    return Device(driver.compile_fake(folder), library)


@pytest.fixture
def device(loaded: Device) -> Device:
    loaded.reset()
    return loaded


@pytest.fixture(scope="module")
def runtime(loaded: Device, library: Path) -> FakeRuntime:
    return FakeRuntime(library)


def activation_of(activation: Activation, *, gated: bool, interleaved: bool) -> dict[str, Any]:
    numbers = {name: float(getattr(activation, name)) for name in ("alpha", "limit", "up_offset")}
    return {"activation": activation.kind, "gated": int(gated), "interleaved": int(interleaved), **numbers}


def latent_run(problem: LatentExpertsProblem, call: driver.CLatentExperts) -> Run:
    """The node of the same call: what the launcher is to be asked, told in ONNX Runtime's words."""
    p = problem
    tensors = [p.x_TH, p.index_TK, p.weight_TK, *(getattr(p.tensors, name) for name in TENSORS)]
    addresses = [getattr(call, name) for name in ("x", "index", "weight", *TENSORS)]
    # An empty tensor lies at an address that no kernel may be given.
    inputs = [
        None if tensor is None else Placed((address or 1) if tensor.numel() else 7, tuple(tensor.shape))
        for tensor, address in zip(tensors, addresses, strict=True)
    ]
    attributes = {name: getattr(p, name) for name in ("num_experts", "input_group", "output_group", "rank_in", "rank_out")}
    attributes |= activation_of(p.activation, gated=p.gated, interleaved=p.interleaved)
    return Run(inputs, call.y, attributes=attributes)


def nowhere(call: ctypes.Structure, names: tuple[str, ...]) -> None:
    """Addresses as those of a device: whoever reads there crashes."""
    for place, name in enumerate(names):
        if getattr(call, name):
            setattr(call, name, (place + 1) << 16 << 32)


def case(form: Form) -> tuple[LatentExpertsProblem, driver.CLatentExperts, list[Tensor], Tensor]:
    problem = make(form)
    call, held, y_TH = latent_call(problem)
    for name in TENSORS:
        tensor = getattr(problem.tensors, name)
        if tensor is not None and not tensor.numel():
            setattr(call, name, None)
    return problem, call, held, y_TH


def test_every_type_is_there_for_both_providers_and_the_cpu_comes_first(runtime: FakeRuntime) -> None:
    wanted = []
    for name in ("GroupedGemm", "LatentExperts"):
        wanted += [(name, CPU, element) for element in (FLOAT, FLOAT16, BFLOAT16)]
        wanted += [(name, CUDA, element) for element in (FLOAT16, BFLOAT16)]
    assert runtime.variants() == wanted


@pytest.mark.parametrize("scratch", [1 << 20, (1 << 20) + 64])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_launcher_is_asked_what_the_node_says(runtime: FakeRuntime, device: Device, form: Form, scratch: int) -> None:
    problem, call, _, _ = case(form)
    nowhere(call, ("x", "index", "weight", *TENSORS, "y"))
    run = latent_run(problem, call)
    run.scratch = scratch
    assert runtime.run(("LatentExperts", CUDA, ELEMENTS[form.dtype]), run) is None
    found = device.launches()
    size = ctypes.c_size_t()
    assert device.library.molae_gpu_latent_experts_scratch(ctypes.byref(call), ctypes.byref(size)) == 0
    (taken,) = run.taken
    start = -(-scratch // ALIGNED) * ALIGNED
    assert taken[:2] == ("scratch", MEMORY)
    assert scratch + taken[2] >= start + size.value
    assert run.freed == [scratch]
    assert run.dims == tuple(problem.x_TH.shape)
    device.reset()
    enqueue = device.library.molae_gpu_latent_experts
    assert enqueue(ctypes.byref(call), ctypes.c_void_p(start), size, ctypes.c_void_p(run.stream)) == 0
    assert found == device.launches()
    assert {launch.stream for launch in found} == {0x55}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_a_node_launches_computes_the_operator(runtime: FakeRuntime, device: Device, form: Form) -> None:
    problem, call, held, y_TH = case(form)
    memory = torch.full((1 << 22,), 0x7F, dtype=torch.uint8)
    run = latent_run(problem, call)
    run.scratch = memory.data_ptr()
    assert runtime.run(("LatentExperts", CUDA, ELEMENTS[form.dtype]), run) is None
    assert run.taken[0][2] <= memory.numel()
    carry_out(device.launches())
    assert error(y_TH, gpu_reference.latent_experts(problem)) < CLOSE[form.dtype]
    assert held


GEMM = ("a", "b", "ends", "bias", "row_weight", "out")


def gemm_case(*, gated: bool, transposed: bool, full: bool) -> tuple[CGroupedGemm, Run, dict[str, Tensor]]:
    torch.manual_seed(0)
    counts, N, M, extra = [5, 0, 40, 3], 24, 16, 2
    S, G, width = sum(counts) + extra, len(counts), 2 * M if gated else M
    made = {
        "a": torch.randn(S, N).bfloat16(),
        "b": (torch.randn(G, *((N, width) if transposed else (width, N))) * 0.4).bfloat16(),
        "ends": torch.tensor(counts).cumsum(0).int(),
    }
    if full:
        made |= {"bias": torch.randn(G, width).bfloat16(), "row_weight": torch.rand(S).bfloat16()}
    made["out"] = torch.full((S, M), 7.0).bfloat16()
    held = {name: aligned(tensor) for name, tensor in made.items()}
    gate = gate_of(GPT_OSS, gated=gated, interleaved=gated)
    pointers = {name: tensor.data_ptr() for name, tensor in held.items()}
    call = CGroupedGemm(1, S, N, M, G, transposed, gate, **pointers)
    inputs = [Placed(pointers[name], tuple(held[name].shape)) if name in held else None for name in GEMM[:-1]]
    while inputs[-1] is None:
        inputs.pop()
    attributes = activation_of(GPT_OSS, gated=gated, interleaved=gated) | {"transposed": int(transposed)}
    return call, Run(inputs, call.out, attributes=attributes), held


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_grouped_gemm(runtime: FakeRuntime, device: Device, gated: bool, transposed: bool, full: bool) -> None:
    call, run, held = gemm_case(gated=gated, transposed=transposed, full=full)
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    run.scratch = -(-memory.data_ptr() // ALIGNED) * ALIGNED
    assert runtime.run(("GroupedGemm", CUDA, BFLOAT16), run) is None
    assert run.dims == tuple(held["out"].shape)
    assert (len(run.taken), run.freed) == (1, [run.scratch])
    found, out = device.launches(), held["out"]
    assert device.cleared() == [(out.data_ptr(), out.numel() * 2, 0x55, 0)]
    device.reset()
    size = ctypes.c_size_t()
    assert device.library.molae_gpu_grouped_gemm_scratch(ctypes.byref(call), ctypes.byref(size)) == 0
    place, stream = ctypes.c_void_p(run.scratch), ctypes.c_void_p(0x55)
    assert device.library.molae_gpu_grouped_gemm(ctypes.byref(call), place, size, stream) == 0
    assert found == device.launches()
    ctypes.memset(out.data_ptr(), 0, out.numel() * 2)
    carry_out(found)
    assert out[:-2].any(dim=1).all()
    assert (out[-2:] == 0).all()


def test_a_gemm_without_rows_or_groups(runtime: FakeRuntime, device: Device) -> None:
    variant = ("GroupedGemm", CUDA, FLOAT16)
    empty, no_groups = Placed(0, (0,)), Placed(0, (0, 16, 8))
    run = Run([Placed(0, (0, 8)), Placed(1 << 40, (3, 16, 8)), Placed(1 << 41, (3,))], 0)
    assert runtime.run(variant, run) is None
    assert run.dims == (0, 16)
    assert device.cleared() == []
    run = Run([Placed(1 << 40, (5, 8)), no_groups, empty], 1 << 42)
    assert runtime.run(variant, run) is None
    assert device.cleared() == [(1 << 42, 5 * 16 * 2, 0x55, 0)]
    assert device.launches() == []


@pytest.mark.parametrize("tokens", [0, 3])
def test_tokens_without_experts_become_zero(runtime: FakeRuntime, device: Device, tokens: int) -> None:
    problem, call, _, _ = case(replace(HALF, tokens=tokens))
    run = latent_run(problem, call)
    for place in (1, 2):
        run.inputs = [*run.inputs[:place], Placed(0, (tokens, 0)), *run.inputs[place + 1 :]]
    run.output = 1 << 40
    assert runtime.run(("LatentExperts", CUDA, FLOAT16), run) is None
    assert run.dims == (tokens, 32)
    assert device.cleared() == ([(1 << 40, 3 * 32 * 2, 0x55, 0)] if tokens else [])
    assert device.launches() == []


def test_without_a_stream_memory_is_the_allocators(runtime: FakeRuntime, device: Device) -> None:
    problem, call, _, _ = case(HALF)
    run = latent_run(problem, call)
    run.stream = 0
    assert runtime.run(("LatentExperts", CUDA, FLOAT16), run) is None
    ((how, whose, _),) = run.taken
    assert (how, whose, run.freed) == ("allocator", ALLOCATOR, [run.scratch])
    assert {launch.stream for launch in device.launches()} == {0}


def refusal(runtime: FakeRuntime, form: Form, change: dict[str, Any] | None = None) -> tuple[str, Run]:
    problem, call, _, _ = case(form)
    nowhere(call, ("x", "index", "weight", *TENSORS, "y"))
    run = latent_run(problem, call)
    for name, value in (change or {}).items():
        setattr(run, name, value)
    message = runtime.run(("LatentExperts", CUDA, ELEMENTS[form.dtype]), run)
    assert message is not None
    assert message.startswith("molae::LatentExperts: ")
    return message, run


def test_what_the_launcher_refuses_is_an_error(runtime: FakeRuntime, device: Device) -> None:
    message, run = refusal(runtime, replace(HALF, rank_in=12))
    assert "multiples of 8" in message
    assert run.taken == []
    message, _ = refusal(runtime, HALF, {"scratch": 0})
    assert "scratch memory on the GPU" in message
    device.reset(fails=719)
    message, run = refusal(runtime, HALF)
    assert message.endswith("CUresult: 719")
    assert run.freed == [run.scratch]
    device.reset(0, 0)
    assert refusal(runtime, HALF)[0].endswith("CUresult: 201")


def test_wrong_shapes_and_attributes_are_refused_as_on_the_cpu(runtime: FakeRuntime, device: Device) -> None:
    problem, call, _, _ = case(HALF)
    run = latent_run(problem, call)
    run.inputs = [*run.inputs[:5], Placed(1 << 40, (64, 48)), *run.inputs[6:]]
    message = runtime.run(("LatentExperts", CUDA, FLOAT16), run)
    assert message == "molae::LatentExperts: the input 'core' is [64,48], expected [E*R_in,J] = [32,48]"
    run.attributes = {**run.attributes, "activation": "swish"}
    assert "'activation' is 'swish'" in (runtime.run(("LatentExperts", CUDA, FLOAT16), run) or "")
    assert device.launches() == []


def test_a_library_with_kernels_is_told_from_one_without(library: Path) -> None:
    assert has_gpu_kernels(library)


def test_a_library_without_kernels_says_so_when_a_session_is_created() -> None:
    if (driver.SOURCES / "gpu_kernels.inc").exists():
        pytest.skip("`make gpu-kernels` was run here")
    plain = FakeRuntime(build())
    assert not has_gpu_kernels(build())
    message, latent = refusal(plain, HALF)
    assert "make gpu-kernels" in message
    _, gemm, _ = gemm_case(gated=True, transposed=False, full=True)
    assert "make gpu-kernels" in (plain.run(("GroupedGemm", CUDA, BFLOAT16), gemm) or "")
    assert latent.dims is gemm.dims is None, "refused when it is called, not when a session is created"


def test_a_machine_without_driver_gets_an_error(library: Path) -> None:
    program = (
        "import ctypes, sys\n"
        "from pathlib import Path\n"
        "from tests.gpu.fake_ort import FLOAT16, FakeRuntime, Placed, Run\n"
        "try:\n"
        "    ctypes.CDLL('libcuda.so.1')\n"
        "except OSError:\n"
        "    pass\n"
        "else:\n"
        "    sys.exit('there is a driver')\n"
        "run = Run([Placed(1 << 40, (5, 8)), Placed(1 << 41, (3, 16, 8)), Placed(1 << 42, (3,))], 1 << 43)\n"
        f"print(FakeRuntime(Path({str(library)!r})).run(('GroupedGemm', {CUDA!r}, FLOAT16), run), run.freed)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if "there is a driver" in done.stderr:
        pytest.skip("this machine has a CUDA driver")
    assert done.stdout == "molae::GroupedGemm: no CUDA driver: libcuda.so.1 cannot be opened [1048576]\n", done.stderr
