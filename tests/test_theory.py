"""The conditions of theory.py against brute force: factorisations built where they hold, and bounds where they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molae_compress.modeling.expand import dense_weights
from molae_compress.tensors import BankedShape, DenseExperts, ExpertsSpec, LatentShape
from molae_compress.theory import break_even, common_null_space, is_lossless, least_error, requirements, stack_rank

E, H, I = 4, 12, 5
fast = settings(max_examples=60, deadline=None, derandomize=True)
seeds, groups = st.integers(0, 10**6), st.sampled_from([1, 2, 4])


def low_rank(generator: torch.Generator, rows: int, columns: int, rank: int) -> Tensor:
    left, right = (torch.randn(*size, generator=generator) for size in ((rows, rank), (rank, columns)))
    return left @ right


def experts(seed: int, rank_in: int, rank_out: int, shared: int, *, bias: bool = False) -> DenseExperts:
    """Experts of which every `shared` neighbours lie in one subspace of that rank, on either side; float32."""
    generator = torch.Generator().manual_seed(seed)
    w_in = [low_rank(generator, shared * 2 * I, H, rank_in).view(shared, 2 * I, H) for _ in range(E // shared)]
    w_out = [low_rank(generator, H, shared * I, rank_out).view(H, shared, I).transpose(0, 1) for _ in range(E // shared)]
    biases = (torch.randn(E, 2 * I, generator=generator), torch.randn(E, H, generator=generator)) if bias else (None, None)
    spec = ExpertsSpec("experts", 0, E, H, I, has_bias=bias, interleaved=bool(seed % 2))

    def activate(h_NJ: Tensor) -> Tensor:
        gate, up = (h_NJ[:, rows] for rows in spec.gate_rows())
        return torch.nn.functional.silu(gate) * up

    return DenseExperts(spec, torch.cat(w_in), torch.cat(w_out), activate, *biases)


def factorised(dense: DenseExperts, shape: LatentShape) -> dict[str, Tensor]:
    """The best latent tensors of a shape, group by group, by the singular value decomposition of the stack."""
    tensors: dict[str, Tensor] = {}
    row_sets = dense.spec.gate_rows() if shape.gate_up == "separate" else (torch.arange(2 * I),)
    for (basis, core), rows in zip(shape.branches(), row_sets, strict=True):
        bases, cores = [], []
        for w_gNH in dense.w_in_EJH[:, rows].double().split(shape.input_group):
            v_HR = torch.linalg.svd(w_gNH.reshape(-1, H), full_matrices=True).Vh[: shape.rank_in].T
            bases.append(v_HR.T)
            cores += [(w_NH @ v_HR).T for w_NH in w_gNH]
        tensors |= {f"{basis}.weight": torch.cat(bases), f"core.{core}": torch.cat(cores)}
    bases, cores = [], []
    for w_gHI in dense.w_out_EHI.double().split(shape.output_group):
        u_HR = torch.linalg.svd(torch.cat(list(w_gHI), dim=1), full_matrices=True).U[:, : shape.rank_out]
        bases.append(u_HR.T)
        cores += [u_HR.T @ w_HI for w_HI in w_gHI]
    tensors |= {"decode.weight": torch.cat(bases), "core.down": torch.cat(cores)}
    if dense.bias_in_EJ is not None:
        tensors |= {"core.bias": dense.bias_in_EJ, "decode_bias": dense.bias_out_EH}
    return tensors


def error(dense: DenseExperts, shape: LatentShape) -> float:
    """Of the best factorisation, relative to the weights."""
    w_in, w_out, *_ = dense_weights(dense.spec, shape, factorised(dense, shape))
    lost = (w_in - dense.w_in_EJH).square().sum() + (w_out - dense.w_out_EHI).square().sum()
    return float(lost / (dense.w_in_EJH.square().sum() + dense.w_out_EHI.square().sum())) ** 0.5


@fast
@given(seeds, groups, groups, st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_lossless_is_what_can_be_factorised(
    seed: int, made: int, asked: int, in_had: int, out_had: int, rank_in: int, rank_out: int, separate: bool
) -> None:
    dense = experts(seed, in_had, out_had, made)
    shape = LatentShape("grouped", rank_in, rank_out, asked, asked, gate_up="separate" if separate else "joint")
    assert is_lossless(dense, shape) == (error(dense, shape) < 1e-5)


@fast
@given(seeds, groups, st.integers(1, 12), st.integers(1, 12))
def test_the_least_error_is_reached_and_never_beaten(seed: int, shared: int, had: int, rank: int) -> None:
    weights = experts(seed, had, had, shared).w_in_EJH.double()
    least = least_error(weights, rank)
    stack = weights.reshape(-1, H)
    u, s, vh = torch.linalg.svd(stack, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert float((stack - best).square().sum()) == pytest.approx(least, abs=1e-9 * float(stack.square().sum()))
    generator = torch.Generator().manual_seed(seed + 1)
    for spread in (1.0, 0.01):  # other bases: at random, and near the best
        basis = (torch.randn(rank, H, generator=generator, dtype=torch.float64) * spread) + (spread < 1) * vh[:rank]
        cores = torch.linalg.lstsq(basis.T, stack.T).solution.T
        assert float((stack - cores @ basis).square().sum()) >= least * (1 - 1e-9) - 1e-9


@fast
@given(seeds, groups, st.integers(1, 12))
def test_the_common_null_space_is_what_the_rank_leaves(seed: int, shared: int, had: int) -> None:
    weights = experts(seed, had, 3, shared).w_in_EJH
    null = common_null_space(weights)
    assert len(null) == H - stack_rank(weights)
    assert torch.allclose(null @ null.T, torch.eye(len(null), dtype=null.dtype), atol=1e-9)
    assert float((weights.double() @ null.T).abs().sum()) < 1e-2
    # no direction outside of it is mapped to zero by all: what they map to zero together is no larger
    brute = torch.linalg.matrix_rank(weights.reshape(-1, H), rtol=1e-4)
    assert stack_rank(weights) == int(brute)


@fast
@given(seeds, st.integers(1, 8), st.integers(1, 8))
def test_joint_and_separate_bases(seed: int, gate: int, up: int) -> None:
    """max(gate, up) <= joint <= gate + up, and at most H."""
    generator = torch.Generator().manual_seed(seed)
    dense = experts(seed, 12, 12, 1)
    rows_gate, rows_up = dense.spec.gate_rows()
    for e in range(E):
        dense.w_in_EJH[e, rows_gate] = low_rank(generator, I, H, min(gate, I))
        dense.w_in_EJH[e, rows_up] = low_rank(generator, I, H, min(up, I))
    joint = LatentShape("grouped", 1, None, 2, 1)
    both = {found.experts: found.rank for found in requirements(dense, joint)}
    apart = [(found.core, found.experts, found.rank) for found in requirements(dense, replace(joint, gate_up="separate"))]
    for experts_, rank in both.items():
        ranks = [own for _, members, own in apart if members == experts_]
        assert max(ranks) <= rank <= min(H, sum(ranks))


@fast
@given(seeds, st.integers(1, 12))
def test_larger_groups_need_more_and_banks_need_what_their_groups_need(seed: int, had: int) -> None:
    dense = experts(seed, had, had, 1)
    needed = {
        size: {found.side: found.rank for found in requirements(dense, LatentShape("grouped", 1, 1, size, size))}
        for size in (1, 2, 4)
    }
    for side in ("input", "output"):
        assert needed[1][side] <= needed[2][side] <= needed[4][side] <= H
    part = LatentShape("grouped", 3, 3, 2, 1)
    shape = BankedShape(((2, 0), (1, 3)), (part, part))
    found = {(f.side, f.experts): f.rank for f in requirements(dense, shape)}
    assert set(found) == {
        ("input", (2, 0)), ("input", (1, 3)), *(("output", (e,)) for e in range(E)),
    }  # fmt: skip
    assert found["input", (2, 0)] == stack_rank([dense.w_in_EJH[2], dense.w_in_EJH[0]])


def test_biases_ask_for_nothing_and_are_exact() -> None:
    shape = LatentShape("grouped", 3, 2, 2, 2)
    dense = experts(3, 3, 2, 2, bias=True)
    bare = replace_biases(dense)
    assert requirements(dense, shape) == requirements(bare, shape)
    _, _, bias_in, bias_out = dense_weights(dense.spec, shape, factorised(dense, shape))
    assert torch.equal(bias_in, dense.bias_in_EJ)
    assert torch.equal(bias_out, dense.bias_out_EH)
    assert is_lossless(dense, shape)


def test_inputs_of_a_subspace_ask_for_no_more_than_its_dimension() -> None:
    dense = experts(0, 12, 12, 1)
    inputs = low_rank(torch.Generator().manual_seed(1), 40, H, 3)
    shape = LatentShape("grouped", 3, None, 4, 1)
    assert not is_lossless(dense, shape)
    assert is_lossless(dense, shape, inputs_TH=inputs)
    assert not is_lossless(dense, replace(shape, rank_in=2), inputs_TH=inputs)
    # a basis of that subspace is exact on it
    basis = torch.linalg.svd(inputs.double()).Vh[:3]
    through = dense.w_in_EJH.double() @ basis.T @ basis @ inputs.double().T
    assert torch.allclose(through, dense.w_in_EJH.double() @ inputs.double().T, atol=1e-5)


def test_the_condition_is_of_weights_and_a_dead_channel_needs_none_of_its_rows() -> None:
    """The condition is enough for the function, and not necessary where rows feed a channel that nothing reads."""
    dense = experts(2, 12, 12, 1)
    dense.w_out_EHI[:, :, 0] = 0
    shape = LatentShape("grouped", 9, None, 1, 1)
    assert not is_lossless(dense, shape)
    lighter = replace(dense, w_in_EJH=dense.w_in_EJH.clone())
    lighter.w_in_EJH[:, [int(rows[0]) for rows in dense.spec.gate_rows()]] = 0
    x = torch.randn(7, H)
    for e in range(E):
        same = (d.output(e, d.intermediate(e, x)) for d in (dense, lighter))
        assert torch.allclose(*same)
    assert is_lossless(lighter, replace(shape, rank_in=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_the_stored_type_does_not_count_as_rank(dtype: torch.dtype) -> None:
    stack = low_rank(torch.Generator().manual_seed(0), 64, 48, 5).to(dtype)
    assert stack_rank([stack[:32], stack[32:]]) == 5
    assert stack_rank([torch.zeros(4, 6, dtype=dtype)]) == 0
    assert len(common_null_space([torch.zeros(4, 6, dtype=dtype)])) == 6


@pytest.mark.parametrize("storage", ["orthonormal", "interpolative"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("gate_up", ["joint", "separate"])
@pytest.mark.parametrize("width", [3, 8, 16])
def test_break_even_is_where_the_count_says(storage: Any, group: int, gate_up: Any, width: int) -> None:
    spec = ExpertsSpec("experts", 0, 4, 16, width)

    def smaller(rank: int, side: int) -> bool:
        shape = LatentShape("grouped", rank if side == 0 else 1, rank if side else 1, group, group, gate_up, storage)
        stems = ("decode.", "core.down")
        sizes = shape.tensors(spec).items()
        numbers = sum(torch.Size(size).numel() for name, size in sizes if name.startswith(stems) == bool(side))
        dense = 4 * 16 * (spec.rows, width)[side]
        return numbers < dense

    found = break_even(spec, LatentShape("grouped", 1, 1, group, group, gate_up, storage))
    for side in (0, 1):
        brute = 0
        while brute < 16 and smaller(brute + 1, side):
            brute += 1
        assert found[side] == brute
    assert break_even(spec, LatentShape("grouped", 1, None, group, 1, gate_up, storage))[1] is None


def replace_biases(dense: DenseExperts) -> DenseExperts:
    return replace(dense, spec=replace(dense.spec, has_bias=False), bias_in_EJ=None, bias_out_EH=None)
