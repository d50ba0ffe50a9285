"""Experts on a CPU by the operator library, called from torch: what they compute, on whose threads, when torch does it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from molae_compress.errors import KernelError
from molae_compress.kernels import build, compiling, cpu_experts
from molae_compress.modeling import to_dense
from molae_compress.tensors import LatentShape
from tests.test_modeling import SHAPES, attach_all_, dense_reference, logits, some_latent, some_routing
from tests.tiny import EXPERTS, FAMILIES, HIDDEN, TOP_K, tiny_model

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


class Around(nn.Module):
    """What an adapter puts in the place of a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: object) -> Tensor:
        return 2 * self.part(*args)


# The core of the layer form is a stock class, which takes the library by itself.
@pytest.mark.parametrize("part", ["encode", "core", "decode"])
@pytest.mark.parametrize(
    ("shape", "wanted_calls"),
    [("orthonormal", ["molae_cpu_product"] * 4), ("layer", ["molae_cpu_experts"])],
    ids=["grouped", "layer"],
)
def test_parts_that_something_stands_around_or_watches_are_called(
    shape: str, part: str, wanted_calls: list[str], calls: list[str]
) -> None:
    routing = some_routing()
    wrapped, watched = (some_latent("qwen3_moe", SHAPES[shape]) for _ in range(2))
    with torch.no_grad():
        wrapped.add_module(part, Around(wrapped.get_submodule(part)))
        watched.get_submodule(part).register_forward_hook(lambda _, __, out: 2 * out)
        for latent in (wrapped, watched):
            wanted = latent(*routing)
            latent.config._experts_implementation = "molae"
            calls.clear()
            torch.testing.assert_close(latent(*routing), wanted, rtol=1e-5, atol=1e-4)
            assert calls == wanted_calls


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
    with pytest.warns(RuntimeWarning, match="slower. not compiled"):
        found = logits(model)
    assert torch.equal(found, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model)  # once is enough
    cpu_experts._library.cache_clear()


def test_an_expert_that_does_not_exist_is_an_error() -> None:
    latent = some_latent("qwen3_moe", SHAPES["interpolative"])
    latent.config._experts_implementation = "molae"
    x_TH, index_TK, weight_TK = some_routing()
    with torch.no_grad(), pytest.raises(KernelError, match=f"'index' is -1 for token 0, expected 0 to {EXPERTS}"):
        latent(x_TH, index_TK.fill_(-1), weight_TK)


def test_tensors_of_other_sizes_than_those_of_the_call_are_an_error() -> None:
    """The library itself only has addresses, behind which it would read on."""
    layer, pivoted = (some_latent("qwen3_moe", SHAPES[name]).requires_grad_(False) for name in ("layer", "interpolative"))
    x_TH, index_TK, weight_TK = some_routing()
    for latent in (layer, pivoted):
        latent.config._experts_implementation = "molae"
        with pytest.raises(KernelError, match=r"\[11, 2\] and \[11, 1\]"):
            latent.routed(x_TH, index_TK, weight_TK[:, :1])
        with pytest.raises(KernelError, match="11 tokens"):
            latent.routed(x_TH, index_TK[:5], weight_TK[:5])
    down = layer.core.down_proj
    down.data = down.data[: EXPERTS // 2].contiguous()
    with pytest.raises(KernelError, match=f"'down' is {down.numel()} numbers .*, expected {2 * down.numel()}"):
        layer(x_TH, index_TK, weight_TK)
    pivoted.encode.pivots = pivoted.encode.pivots.long()
    with pytest.raises(KernelError, match=r"'encode_pivots' .* expected 48 of torch.int32"):
        pivoted(x_TH, index_TK, weight_TK)
    with pytest.raises(KernelError, match="rows of 4 numbers"):
        cpu_experts.product(torch.ones(2, 4), torch.ones(1, 3, 5), transposed=False)


def many_slots(tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.randint(EXPERTS, (tokens, TOP_K), generator=generator)
    return torch.randn(tokens, HIDDEN, generator=generator), index_TK, torch.rand(tokens, TOP_K, generator=generator)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["layer", "interpolative", "banks"])
def test_what_was_traced_computes_with_other_inputs(name: str, calls: list[str]) -> None:
    latent = some_latent("qwen3_moe", SHAPES[name]).requires_grad_(False)
    latent.config._experts_implementation = "molae"
    traced = torch.jit.trace(lambda *routing: latent(*routing), many_slots(60, 0), check_trace=False)
    assert not calls
    torch.testing.assert_close(traced(*many_slots(60, 1)), latent(*many_slots(60, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [None, "layer", "interpolative"])
def test_exported_graphs_take_any_number_of_tokens(name: str | None) -> None:
    model = tiny_model("qwen3_moe")
    experts = model.get_submodule("model.layers.1.mlp.experts") if name is None else some_latent("qwen3_moe", SHAPES[name])
    experts.to(torch.bfloat16).requires_grad_(False).config._experts_implementation = "molae"
    x_TH, index_TK, weight_TK = some_routing(torch.bfloat16)
    tokens = {0: torch.export.Dim("tokens", min=2, max=4096)}
    sizes = (tokens,) * 3 if name is None else ((tokens,) * 3,)
    exported = torch.export.export(experts, (x_TH, index_TK, weight_TK), dynamic_shapes=sizes).module()
    x_TH, index_TK, weight_TK = many_slots(200, 2)
    routing = x_TH.bfloat16(), index_TK, weight_TK.bfloat16()
    wanted = experts(*routing)
    assert (exported(*routing) - wanted).norm() <= TYPES[torch.bfloat16] * wanted.norm()


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
