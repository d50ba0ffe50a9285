"""Every kernel, interpreted on a CPU, against its naive reference: ragged and empty groups, tails, all options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molae_compress.adapters import find_experts
from molae_compress.kernels import gpu_launch, gpu_reference
from molae_compress.kernels.activation import Activation
from molae_compress.kernels.gpu_experts import bank_problem, stock_experts
from molae_compress.kernels.gpu_latent import latent_experts
from molae_compress.kernels.gpu_operands import Matrices, Rows, Slots
from molae_compress.kernels.gpu_tiles import EXACT, GATHERED, TILES
from molae_compress.modeling import attach_
from molae_compress.tensors import LatentShape
from tests.gpu.problems import CLOSE, STRUCTURES, Form, activations, error, forms, make
from tests.test_modeling import random_latent, some_routing
from tests.tiny import EXPERTS, FAMILIES, tiny_model

assert triton.knobs.runtime.interpret, "run with TRITON_INTERPRET=1"

quick = settings(max_examples=15, deadline=None)
types = st.sampled_from(list(CLOSE))


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Matrices, list[int]]:
    """Inputs, matrices, and rows of each group."""
    counts = draw(st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40]), min_size=1, max_size=5))
    N, K, dtype = draw(st.integers(1, 70)), draw(st.sampled_from([1, 8, 31, 64, 130])), draw(types)
    gate = draw(st.sampled_from(["none", "one", "pair"]))
    transposed, G = draw(st.booleans()), len(counts)
    torch.manual_seed(draw(st.integers(0, 99)))

    def matrices(width: int) -> Tensor:
        return (torch.randn(G, *((K, width) if transposed else (width, K))) * 0.4).to(dtype)

    stored = 2 * N if gate == "one" else N
    bias = torch.randn(G, N if gate == "none" else 2 * N).to(dtype) if draw(st.booleans()) else None
    held = Matrices(
        matrices(stored),
        transposed,
        gated=gate != "none",
        interleaved=gate != "none" and draw(st.booleans()),
        weight_up=matrices(N) if gate == "pair" else None,
        bias=bias,
        activation=draw(activations),
    )
    return torch.randn(sum(counts), K).to(dtype), held, counts


def expected(a: Tensor, m: Matrices, row: int, group: int, a_up: Tensor) -> Tensor:
    matrix = m.weight[group].T if m.transposed else m.weight[group]
    bias = None if m.bias is None else m.bias[group]
    if m.weight_up is None:
        return gpu_reference.product(a[row], matrix, bias, m.activation, is_gated=m.gated, interleaved=m.interleaved)
    up = m.weight_up[group].T if m.transposed else m.weight_up[group]
    parts = matrix.float() @ a[row].float(), up.float() @ a_up[row].float()
    h_J = torch.stack(parts, 1).flatten() if m.interleaved else torch.cat(parts)
    h_J = h_J if bias is None else h_J + bias.float()
    return gpu_reference.gated(h_J, m.activation, is_gated=True, interleaved=m.interleaved)


@given(st.lists(st.integers(-1, 7), min_size=1, max_size=300), st.integers(1, 6), st.integers(1, 3))
@quick
def test_slots_are_sorted(experts: list[int], E: int, top_k: int) -> None:
    index_TK = torch.tensor(experts * top_k).view(-1, top_k)
    slots = gpu_launch.sort_slots(index_TK, E)
    order_S, ends_E = gpu_reference.sorted_slots(index_TK, E)
    assert torch.equal(slots.order_S, order_S)
    assert torch.equal(slots.ends_E, ends_E)


def test_many_slots_are_sorted() -> None:
    """More blocks and counts than the scan takes at once."""
    index_TK = torch.randint(0, 40, (4000, 2), generator=torch.Generator().manual_seed(0))
    slots = gpu_launch.sort_slots(index_TK, 40)
    order_S, ends_E = gpu_reference.sorted_slots(index_TK, 40)
    assert torch.equal(slots.order_S, order_S)
    assert torch.equal(slots.ends_E, ends_E)


@given(st.integers(1, 70), st.integers(1, 3), st.data())
@quick
def test_columns_are_split(hidden: int, groups: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, hidden))
    torch.manual_seed(rank)
    pivots_GR = torch.stack([torch.randperm(hidden)[:rank].sort().values for _ in range(groups)]).int()
    columns = gpu_launch.other_columns(pivots_GR.flatten(), groups, hidden)
    rest, position = gpu_reference.columns(pivots_GR, hidden)
    assert torch.equal(columns.rest, rest.flatten())
    assert torch.equal(columns.position, position.flatten())


@given(products(), st.sampled_from(TILES), st.booleans())
@quick
def test_grouped_products(drawn: tuple[Tensor, Matrices, list[int]], tile: object, weighted: bool) -> None:
    a, m, counts = drawn
    ends = torch.tensor(counts).cumsum(0).int()
    a_up = a.flip(0).contiguous()
    weight = torch.rand(a.shape[0]).to(a.dtype) if weighted else None
    order = torch.arange(a.shape[0]).int()
    rows = Rows(a.shape[0], Slots(order, ends, 1), 1)
    found = gpu_launch.grouped_gemm(a, m, rows, a_up=a_up, row_weight=weight, tile=tile)
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    for row, group in enumerate(groups):
        wanted = expected(a, m, row, group, a_up) * (1.0 if weight is None else weight[row].float())
        assert error(found[row], wanted) < CLOSE[a.dtype]


@given(products(), st.integers(1, 3), st.data())
@quick
def test_products_of_few_rows(drawn: tuple[Tensor, Matrices, list[int]], gather: int, data: st.DataObject) -> None:
    a, m, counts = drawn
    if not a.shape[0]:
        return
    G = len(counts)
    index_TK = torch.tensor(data.draw(st.lists(st.integers(-1, G), min_size=gather, max_size=gather)))[None]
    found = gpu_launch.few_rows(a, m, gather, index_TK=index_TK, experts=G, gather=gather, a_up=a.flip(0).contiguous())
    for row, group in enumerate(index_TK[0].tolist()):
        if 0 <= group < G:
            assert error(found[row], expected(a, m, 0, group, a.flip(0))) < CLOSE[a.dtype]


@given(forms(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_latent_experts(form: Form, deterministic: bool) -> None:
    problem = make(form)
    found = latent_experts(problem, deterministic=deterministic)
    assert error(found, gpu_reference.latent_experts(problem)) < CLOSE[form.dtype]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("form", STRUCTURES, ids=str)
def test_every_structure(form: Form, deterministic: bool) -> None:
    problem = make(form)
    found = latent_experts(problem, deterministic=deterministic)
    assert error(found, gpu_reference.latent_experts(problem)) < CLOSE[form.dtype]


@pytest.mark.parametrize("tile", [*TILES, GATHERED, EXACT], ids=lambda tile: tile.name)
def test_a_group_longer_than_a_tile(tile: object) -> None:
    torch.manual_seed(0)
    a, weight = torch.randn(300, 24), torch.randn(3, 40, 24)
    ends = torch.tensor([140, 140, 290]).int()
    order = torch.randperm(300).int()
    m = Matrices(weight, transposed=False)
    rows = Rows(300, Slots(order, ends, 1), 1, gather=1, scatter=1)
    found = gpu_launch.grouped_gemm(a, m, rows, tile=tile)
    for row in range(290):
        slot = int(order[row])
        assert error(found[slot], weight[0 if row < 140 else 2] @ a[slot]) < 1e-4


def test_sums_in_a_fixed_order_repeat_bit_for_bit() -> None:
    problem = make(Form(17, experts=6, top_k=4, dtype=torch.float16))
    assert torch.equal(latent_experts(problem), latent_experts(problem))


def test_a_slot_of_no_expert_adds_nothing() -> None:
    form = Form(9, strangers=True, biased=True)
    problem = make(form)
    absent = (problem.index_TK < 0) | (problem.index_TK >= form.experts)
    assert absent.any()
    changed = replace(problem, weight_TK=problem.weight_TK.masked_fill(absent, float("nan")))
    assert torch.equal(latent_experts(changed), latent_experts(problem))


SHAPES = {
    "one group a side": LatentShape("grouped", 12, 20, EXPERTS, EXPERTS, storage="interpolative"),
    "groups": LatentShape("grouped", 20, 12, 4, 2),
    "separate": LatentShape("grouped", 12, 16, 2, 1, gate_up="separate"),
    "dense down": LatentShape("grouped", 16, None, 1, 1, storage="interpolative"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_kernels_compute_what_the_module_does(family: str, shape: LatentShape) -> None:
    model = tiny_model(family)
    spec = find_experts(model)[-1]
    model = attach_(model, {spec.name: (shape, random_latent(spec, shape))})
    latent = model.get_submodule(spec.name)
    x_TH, index_TK, weight_TK = some_routing()
    for count in (3, 11):
        inputs = x_TH[:count], index_TK[:count], weight_TK[:count]
        with torch.no_grad():
            problem = bank_problem(latent, latent.spec, shape, *inputs)
            assert problem is not None
            wanted = latent._grouped(latent, latent._banks[0], *inputs)
            assert error(latent_experts(problem), wanted) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_experts_run_on_the_kernels(family: str) -> None:
    model = tiny_model(family)
    stock = model.get_submodule(find_experts(model)[-1].name)
    x_TH, index_TK, weight_TK = some_routing()
    for count in (3, 11):
        inputs = x_TH[:count], index_TK[:count], weight_TK[:count]
        with torch.no_grad():
            found = stock_experts(stock, *inputs)
            assert found is not None
            assert error(found, stock(*inputs)) < 1e-5


def test_an_unknown_activation_is_left_to_others() -> None:
    model = tiny_model("qwen3_moe")
    stock = model.get_submodule(find_experts(model)[-1].name)
    stock.act_fn = torch.nn.Tanh()
    with torch.no_grad():
        assert stock_experts(stock, *some_routing()) is None


def test_sizes_of_one_expert_and_one_row() -> None:
    form = Form(1, top_k=1, experts=1, hidden=1, intermediate=1, input_group=1, rank_in=1, rank_out=1)
    for tokens in (1, 7):
        problem = make(replace(form, tokens=tokens, activation=Activation("relu2")))
        assert error(latent_experts(problem), gpu_reference.latent_experts(problem)) < 1e-5
