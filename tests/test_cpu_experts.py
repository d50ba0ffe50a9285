"""Experts on a CPU by the operator library, called from torch: what they compute, on whose threads, when torch does it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from molae_compress.errors import KernelError
from molae_compress.kernels import build, compiling, cpu_experts
from molae_compress.modeling import to_dense
from molae_compress.tensors import LatentShape
from tests.test_modeling import SHAPES, attach_all_, dense_reference, logits, some_latent, some_routing
from tests.tiny import EXPERTS, FAMILIES, HIDDEN, tiny_model

pytestmark = pytest.mark.skipif(compiling.find_compiler() is None, reason="no C++ compiler")

TYPES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    build()
    cpu_experts._library.cache_clear()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the library, in order."""
    made: list[str] = []
    original: Callable[..., None] = cpu_experts._call

    def counted(name: str, call: object) -> None:
        made.append(name)
        original(name, call)

    monkeypatch.setattr(cpu_experts, "_call", counted)
    return made


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_are_those_of_float64(dtype: torch.dtype, transposed: bool, threads: int) -> None:
    counts = (0, 1, 4, 0, 5, 130, 2, 0)  # rows of a group: none, few, many
    for N, M in ((1, 1), (7, 53), (64, 32), (300, 257), (37, 1100)):
        a_SN, weight = torch.randn(sum(counts) + 3, N).to(dtype), torch.randn(len(counts), M, N).to(dtype)
        ends_G = torch.tensor(counts).cumsum(0).to(torch.int32)
        stored = weight.transpose(1, 2).contiguous() if transposed else weight
        found = cpu_experts.product(a_SN, stored, ends_G, transposed=transposed)
        parts = zip(a_SN.double().split([*counts, 3]), [*weight.double(), torch.zeros(M, N)], strict=True)
        wanted = torch.cat([rows @ matrix.double().T for rows, matrix in parts])
        assert found.dtype == dtype
        assert (found - wanted).norm() <= TYPES[dtype] * wanted.norm()
        one = cpu_experts.product(a_SN[:4], stored[0], transposed=transposed)
        torch.testing.assert_close(one.double(), a_SN[:4].double() @ weight[0].double().T, rtol=TYPES[dtype], atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_latent_experts_are_the_dense_ones_they_stand_for(
    family: str, shape: LatentShape, dtype: torch.dtype, calls: list[str]
) -> None:
    latent = some_latent(family, shape).to(dtype)
    latent.config._experts_implementation = "molae"
    x_TH, index_TK, weight_TK = some_routing(dtype)
    wanted = dense_reference(to_dense(some_latent(family, shape).to(dtype).float()), x_TH, index_TK, weight_TK)
    with torch.no_grad():
        for tokens in (11, 1, 0):
            # several routers hand out fp32 weights
            found = latent(x_TH[:tokens], index_TK[:tokens], weight_TK[:tokens].float())
            assert found.dtype == dtype
            assert found.shape == (tokens, HIDDEN)
            assert (found - wanted[:tokens]).norm() <= 2 * TYPES[dtype] * wanted[:tokens].norm()
    assert set(calls) == {"molae_cpu_experts"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_experts_are_what_their_own_class_computes(family: str, dtype: torch.dtype, calls: list[str]) -> None:
    model = tiny_model(family).to(dtype)
    model.set_experts_implementation("eager")
    wanted = logits(model)
    model.set_experts_implementation("molae")
    found = logits(model)
    assert set(calls) == {"molae_cpu_experts"}
    assert (found - wanted).norm() <= 5 * TYPES[dtype] * wanted.norm()


def test_the_layer_form_is_one_call_with_its_projections(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    latent = some_latent("qwen3_moe", SHAPES["layer"])
    wanted = latent(*some_routing())
    latent.config._experts_implementation = "molae"
    monkeypatch.setattr(nn.Linear, "forward", None)
    with torch.no_grad():
        torch.testing.assert_close(latent(*some_routing()), wanted, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1


def test_parts_that_adapters_stand_around_are_computed_by_products(calls: list[str]) -> None:
    class Around(nn.Module):
        def __init__(self, basis: nn.Module) -> None:
            super().__init__()
            self.basis = basis

        def forward(self, *args: object) -> Tensor:
            return self.basis(*args)

    latent = some_latent("qwen3_moe", SHAPES["orthonormal"])
    routing = some_routing()
    wanted = latent(*routing)
    latent.encode = Around(latent.encode)
    latent.config._experts_implementation = "molae"
    with torch.no_grad():
        torch.testing.assert_close(latent(*routing), wanted, rtol=1e-5, atol=1e-5)
    assert calls == ["molae_cpu_product"] * 4


def test_many_rows_of_dense_experts_in_bfloat16_are_left_to_torch(calls: list[str]) -> None:
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    wanted = logits(model)
    model.set_experts_implementation("molae")
    assert torch.equal(logits(model), wanted)
    assert not calls


def test_gradients_compilers_and_odd_tensors_are_left_to_torch(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    x_TH, index_TK, weight_TK = some_routing()
    latent = some_latent("qwen3_moe", SHAPES["interpolative"])
    latent.config._experts_implementation = "molae"
    latent(x_TH, index_TK, weight_TK).sum().backward()
    assert latent.core.down.grad is not None
    latent.requires_grad_(False)
    latent(x_TH.clone().requires_grad_(), index_TK, weight_TK).sum().backward()
    with torch.no_grad():
        assert not cpu_experts.can_run(x_TH.to("meta"), [])
        assert not cpu_experts.can_run(x_TH, [torch.ones(3, 4).T])
        assert not cpu_experts.can_run(x_TH, [torch.ones(3, dtype=torch.float16)])
        assert not cpu_experts.can_run(x_TH.double(), [])
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not cpu_experts.can_run(x_TH, [])
    assert not calls


@pytest.mark.parametrize("shape", [None, SHAPES["layer"], SHAPES["orthonormal"]], ids=["stock", "layer", "grouped"])
def test_without_a_library_the_answer_is_that_of_grouped_mm(
    shape: LatentShape | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise KernelError("not compiled")

    monkeypatch.setattr(cpu_experts, "library_path", absent)
    cpu_experts._library.cache_clear()
    model = tiny_model("qwen3_moe") if shape is None else attach_all_(tiny_model("qwen3_moe"), shape)
    model.set_experts_implementation("grouped_mm")
    wanted = logits(model)
    model.set_experts_implementation("molae")
    assert torch.equal(logits(model), wanted)
    cpu_experts._library.cache_clear()


def test_an_expert_that_does_not_exist_is_an_error() -> None:
    latent = some_latent("qwen3_moe", SHAPES["interpolative"])
    latent.config._experts_implementation = "molae"
    x_TH, index_TK, weight_TK = some_routing()
    with torch.no_grad(), pytest.raises(KernelError, match=f"'index' is -1 for token 0, expected 0 to {EXPERTS}"):
        latent(x_TH, index_TK.fill_(-1), weight_TK)


def test_the_library_works_on_the_threads_of_torch() -> None:
    """A runtime of its own would bring threads of its own; and ONNX Runtime is not needed."""
    program = (
        "import os, sys, torch\n"
        "from molae_compress.kernels import cpu_experts\n"
        "tasks = lambda: len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(3)\n"
        "a, w = torch.randn(300, 300), torch.randn(1, 300, 300)\n"
        "before = tasks()\n"
        "cpu_experts.product(a, w, transposed=False)\n"
        "ours = tasks() - before\n"
        "torch.ones(1 << 20).exp_()\n"
        "print(ours, tasks() - before, 'onnxruntime' in sys.modules)"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads where Linux lists them")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "2", "False"]
