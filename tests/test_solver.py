"""The solver against its slow reference, and the properties that make its result worth trusting.

Weights and moments are float64 and tiny, so that equalities hold to rounding. Shape suffixes: N rows of one sample,
X rows of one input branch; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molae_compress.solver import layer as solver_layer
from molae_compress.solver import population as solver_population
from molae_compress.solver import reference
from molae_compress.solver import spectra as solver_spectra
from molae_compress.solver.allocate import Curve, allocate, at_lowest_price, bought, partition, tail_errors, tails_at
from molae_compress.solver.basis import Stack, interpolated, interpolative, orthonormal_rows
from molae_compress.solver.layer import layer_error, solve_layer
from molae_compress.solver.moments import Moments, cholesky, ridged
from molae_compress.solver.packing import Packed
from molae_compress.solver.population import Calibrated, Population, Uninformed
from molae_compress.solver.refit import refit_core, refit_down, right_inverse
from molae_compress.solver.spectra import Fit, measure_spectra
from molae_compress.tensors import AnyShape, BankedShape, DenseExperts, ExpertsSpec, LatentShape

E, H, I, K = 4, 16, 6, 2
seeds = st.integers(0, 2**32 - 1)
few_examples = settings(max_examples=25, deadline=None, derandomize=True)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# Layers and tokens


def swiglu(h_NJ: Tensor) -> Tensor:
    gate_NI, up_NI = h_NJ.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_NI) * up_NI


def clamped_interleaved(h_NJ: Tensor) -> Tensor:
    gate_NI, up_NI = h_NJ[..., ::2].clamp(max=0.7), h_NJ[..., 1::2].clamp(-0.7, 0.7)
    return (up_NI + 1) * gate_NI * torch.sigmoid(1.702 * gate_NI)


PLAIN = ExpertsSpec("experts", 0, E, H, I, top_k=K)
OSS = dataclasses.replace(PLAIN, has_bias=True, is_transposed=True, interleaved=True)
UNGATED = dataclasses.replace(PLAIN, has_gate=False)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gate": swiglu, "oss": clamped_interleaved, "none": torch.tanh}


def layer(spec: ExpertsSpec = PLAIN, seed: int = 0) -> DenseExperts:
    kind = "oss" if spec.interleaved else "gate" if spec.has_gate else "none"
    count = spec.num_experts
    return DenseExperts(
        spec,
        normal(count, spec.rows, spec.hidden, seed=seed + 1) / spec.hidden**0.5,
        normal(count, spec.hidden, spec.intermediate, seed=seed + 2),
        ACTIVATIONS[kind],
        normal(count, spec.rows, seed=seed + 3) if spec.has_bias else None,
        normal(count, spec.hidden, seed=seed + 4) if spec.has_bias else None,
    )


def tokens(count: int = 40, seed: int = 0, spec: ExpertsSpec = PLAIN) -> Calibrated:
    """Correlated inputs of falling spectrum that depend on the expert they are routed to."""
    hidden, experts = spec.hidden, spec.num_experts
    scores_TE = torch.rand(count, experts, generator=generator(seed), dtype=torch.float64)
    gate_TK, index_TK = scores_TE.softmax(-1).topk(spec.top_k)
    scale_H = torch.logspace(0.3, -1.2, hidden, dtype=torch.float64)
    mix_EHH = normal(experts, hidden, hidden, seed=7) / hidden**0.5
    x_TH = normal(count, hidden, seed=seed + 1) * scale_H @ mix_EHH[0]
    x_TH = x_TH + torch.einsum("th,thd->td", normal(count, hidden, seed=seed + 2) * scale_H, mix_EHH[index_TK[:, 0]])
    token_T = 0.5 + torch.rand(count, generator=generator(seed + 3), dtype=torch.float64)
    return Calibrated(x_TH, index_TK, gate_TK, token_T, experts)


def grouped(rank_in: int, rank_out: int | None, input_group: int, output_group: int, **options: str) -> LatentShape:
    return LatentShape("grouped", rank_in, rank_out, input_group, output_group, **options)  # type: ignore[arg-type]


def rows_of(spec: ExpertsSpec, shape: LatentShape) -> tuple[Tensor, ...]:
    return spec.gate_rows() if shape.gate_up == "separate" else (torch.arange(spec.rows),)


def effective(spec: ExpertsSpec, shape: AnyShape, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """[E,J,H] and [E,H,I]: the dense weights that the latent tensors stand for."""
    w_in_EJH = torch.zeros(spec.num_experts, spec.rows, spec.hidden, dtype=torch.float64)
    w_out_EHI = torch.zeros(spec.num_experts, spec.hidden, spec.intermediate, dtype=torch.float64)
    for e, packed in Packed.all_of(spec, shape, tensors).items():
        bank, place = packed.shape, packed.experts.index(e)
        for (basis, core), rows_X in zip(bank.branches(), rows_of(spec, bank), strict=True):
            b_RH = packed.basis(basis, place // bank.input_group, bank.rank_in).double()
            w_in_EJH[e, rows_X] = packed.core(core, e).double() @ b_RH
        if bank.rank_out is None:
            w_out_EHI[e] = packed.core("down", e).double()[: spec.hidden]
        else:
            d_RH = packed.basis("decode", place // bank.output_group, bank.rank_out).double()
            w_out_EHI[e] = d_RH.T @ packed.core("down", e).double()
    return w_in_EJH, w_out_EHI


def solved(dense: DenseExperts, population: Population, shape: AnyShape, fit: Fit | None = None) -> tuple[Tensor, Tensor]:
    """Effective weights of the solution in float64."""
    tensors = solve_layer(dense, population, shape, fit or Fit(), torch.float64)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shape.tensors(dense.spec)
    return effective(dense.spec, shape, tensors)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).abs().max() <= tolerance * (1 + b.abs().max()))


def squared(w_NH: Tensor, c_HH: Tensor, h_NN: Tensor | None = None) -> float:
    """tr(H W C W^T)."""
    return float(torch.trace(w_NH @ c_HH @ w_NH.T if h_NN is None else h_NN @ w_NH @ c_HH @ w_NH.T))


# Moments


@few_examples
@given(seed=seeds, counts=st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_moments_merge_in_any_order_and_any_split(seed: int, counts: list[int]) -> None:
    x_ND, w_N = normal(sum(counts), 5, seed=seed), torch.rand(sum(counts), generator=generator(seed)).double()
    a, b, c = (Moments.of(x, w) for x, w in zip(x_ND.split(counts), w_N.split(counts), strict=True))
    whole = Moments.of(x_ND, w_N)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b), Moments.zeros(5).merge(whole)):
        assert torch.allclose(merged.gram_DD, whole.gram_DD, rtol=1e-12, atol=1e-12)
        assert merged.weight == pytest.approx(whole.weight, rel=1e-12)
        assert merged.count == sum(counts)
    if whole.weight > 0:
        assert torch.allclose(whole.mean(), reference.moments(x_ND, w_N.tolist()), rtol=1e-12, atol=1e-12)


def test_moments_of_16_bit_rows_are_summed_in_float64() -> None:
    x_ND = torch.full((20000, 1), 1.0, dtype=torch.bfloat16)
    assert float(Moments.of(x_ND, torch.full((20000,), 0.1, dtype=torch.float64)).gram_DD) == pytest.approx(2000, rel=1e-4)


def test_factors_of_singular_matrices_are_finite_and_true() -> None:
    for c_DD in (torch.zeros(5, 5).double(), normal(5, 2) @ normal(5, 2).T, -1e-17 * torch.eye(5).double()):
        factor_DD = cholesky(c_DD)
        assert close(factor_DD @ factor_DD.T, c_DD, 1e-7)
    assert torch.equal(ridged(torch.zeros(3, 3), 0.5), torch.eye(3))


# Phase 1: bases


@few_examples
@given(
    seed=seeds,
    rows=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    width=st.integers(2, 14),
    deficiency=st.integers(0, 2),
    with_metric=st.booleans(),
    data=st.data(),
)
def test_basis_is_the_singular_subspace_of_the_stack(
    seed: int, rows: list[int], width: int, deficiency: int, with_metric: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, width), label="rank")
    stack, whole = Stack(sum(rows), width, rank), []
    for i, count in enumerate(rows):
        m_XH = normal(count, width, seed=seed + i)
        metric_XX = None
        if with_metric:
            g_XX = normal(count, max(1, count - deficiency), seed=seed + i + 100)
            metric_XX = g_XX @ g_XX.T
        stack.add(m_XH, metric_XX)
        whole.append(m_XH if metric_XX is None else reference.root(metric_XX) @ m_XH)
    m_NH, spectrum = torch.cat(whole), stack.spectrum()
    energy_M = torch.linalg.svdvals(m_NH).square()
    shared = min(len(energy_M), len(spectrum.energy_M))
    rounding = (1e-7 if with_metric and deficiency else 1e-10) * float(energy_M[0])  # a singular metric is lifted
    assert float((spectrum.energy_M[:shared] - energy_M[:shared]).abs().max()) <= rounding
    assert float(spectrum.energy_M[shared:].sum()) <= rounding
    assert spectrum.vectors_HR is not None
    assert spectrum.vectors_HR.shape == (width, rank)
    q_RH = orthonormal_rows(spectrum.vectors_HR.T)
    assert close(q_RH @ q_RH.T, torch.eye(rank, dtype=torch.float64))
    left = float((m_NH - m_NH @ q_RH.T @ q_RH).square().sum())
    assert left == pytest.approx(spectrum.error(rank), abs=width * rounding)
    assert left == pytest.approx(float(energy_M[rank:].sum()), abs=width * rounding)


@few_examples
@given(seed=seeds, width=st.integers(2, 40), decay=st.floats(0, 6), data=st.data())
def test_interpolative_storage_is_the_same_subspace_with_small_coefficients(
    seed: int, width: int, decay: float, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, width), label="rank")
    b_RH = normal(rank, width, seed=seed) * torch.logspace(0, -decay, width, dtype=torch.float64)
    pivots_R, rest_RX = interpolative(b_RH)
    basis_RH = interpolated(pivots_R, rest_RX)
    assert torch.equal(pivots_R, pivots_R.sort().values)
    assert torch.equal(basis_RH[:, pivots_R], torch.eye(rank, dtype=torch.float64))
    q_RH = orthonormal_rows(b_RH)
    assert close(basis_RH @ q_RH.T @ q_RH, basis_RH, 1e-10)
    assert not rest_RX.numel() or float(rest_RX.abs().max()) < 1.03


Problem = list[list[tuple[int, Tensor, Tensor, Tensor]]]  # per input group: expert, branch rows, covariance, metric


def pooled_problem(dense: DenseExperts, samples: Calibrated, shape: LatentShape, fit: Fit) -> Problem:
    """What phase 1 minimises, from definitions: the sum over experts and branches of tr(H (W - A B) C (W - A B)^T)."""
    groups = []
    for start in range(0, E, shape.input_group):
        group, parts = range(start, start + shape.input_group), []
        c_HH = reference.covariance(samples, group, fit.ridge_in)
        for e in group:
            weight = reference.importance(samples)[e]
            metric_JJ = torch.eye(dense.spec.rows, dtype=torch.float64)
            if fit.metric == "two-sided":
                x_NH, p_N = reference.sample(samples, e, dense.spec.rows)
                metric_JJ = reference.output_metric(dense, e, x_NH, p_N, fit.ridge_metric)
            rows = rows_of(dense.spec, shape)
            parts += [(e, rows_X, c_HH, weight * metric_JJ[rows_X][:, rows_X]) for rows_X in rows]
        groups.append(parts)
    return groups


def pooled_errors(problem: Problem, dense: DenseExperts, w_in_EJH: Tensor) -> list[float]:
    """Per input group, for given effective weights."""
    left_EJH = dense.w_in_EJH - w_in_EJH
    return [sum(squared(left_EJH[e, rows], c_HH, h_XX) for e, rows, c_HH, h_XX in parts) for parts in problem]


@pytest.mark.parametrize("metric", ["two-sided", "input"])
@pytest.mark.parametrize(("group", "gate_up"), [(1, "joint"), (2, "separate"), (4, "joint")])
def test_input_error_is_exactly_the_discarded_energy(metric: str, group: int, gate_up: str) -> None:
    dense, samples, rank = layer(), tokens(24), 5
    fit = Fit(metric=metric, cores=False)  # type: ignore[arg-type]
    shape = grouped(rank, 6, group, 1, gate_up=gate_up)
    problem = pooled_problem(dense, samples, shape, fit)
    errors = pooled_errors(problem, dense, solved(dense, samples, shape, fit)[0])
    spectra = measure_spectra(dense, samples, shape, fit).input_GM
    tails_G = sum((energy_GM[:, rank:].sum(1) for energy_GM in spectra), torch.zeros(1, dtype=torch.float64))
    assert errors == pytest.approx(tails_G.tolist(), rel=1e-9)
    # a shared basis cannot do what a basis for every expert and branch does (Eckart-Young)
    for error, parts in zip(errors, problem, strict=True):
        whitened = [reference.root(h_XX) @ dense.w_in_EJH[e, rows] @ reference.root(c_HH) for e, rows, c_HH, h_XX in parts]
        bound = sum(float(torch.linalg.svdvals(m_XH).square()[rank:].sum()) for m_XH in whitened)
        assert error >= bound * (1 - 1e-9)


@few_examples
@given(seed=seeds, size=st.floats(1e-4, 1.0))
def test_no_other_basis_is_better(seed: int, size: float) -> None:
    dense, samples, shape = layer(), tokens(24), grouped(5, 6, 4, 1)
    fit = Fit(metric="input", cores=False)
    problem = pooled_problem(dense, samples, shape, fit)
    tensors = solve_layer(dense, samples, shape, fit, torch.float64)
    (best,) = pooled_errors(problem, dense, effective(PLAIN, shape, tensors)[0])
    b_RH = tensors["encode.weight"] + size * normal(5, H, seed=seed)
    c_HH = problem[0][0][2]
    other_EJH = torch.stack([reference.refit_core(w_JH, b_RH, c_HH) @ b_RH for w_JH in dense.w_in_EJH])
    assert pooled_errors(problem, dense, other_EJH)[0] >= best * (1 - 1e-12)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_output_error_is_exactly_the_discarded_energy(group: int) -> None:
    dense, samples, fit = layer(), tokens(), Fit()
    energies = measure_spectra(dense, samples, grouped(1, 1, 4, group), fit).output_GM
    for rank in (2, 5):
        # full rank on the input side: the intermediates are the dense ones
        _, w_out_EHI = solved(dense, samples, grouped(H, rank, 4, group), fit)
        errors = torch.zeros(E, dtype=torch.float64)
        for e in range(E):
            x_NH, p_N = reference.sample(samples, e, I)
            z_NI = dense.intermediate(e, x_NH)
            ridge = reference.output_noise(samples, e, I, fit.ridge_out)
            q_II = reference.shrunk(reference.moments(z_NI, p_N.tolist()), ridge)
            errors[e] = samples.weight(e) * squared(dense.w_out_EHI[e] - w_out_EHI[e], q_II)
        assert close(errors.view(-1, group).sum(1), energies[:, rank:].sum(1), 1e-9)


@pytest.mark.parametrize(("input_group", "output_group"), [(4, 4), (2, 1)])
def test_error_falls_with_rank(input_group: int, output_group: int) -> None:
    dense, samples = layer(), tokens()
    fit = Fit(metric="input", cores=False, down=False)
    errors = []
    for rank in range(1, H + 1):
        shape = grouped(rank, min(rank, output_group * I), input_group, output_group)
        w_in_EJH, w_out_EHI = solved(dense, samples, shape, fit)
        errors.append(sum(pooled_errors(pooled_problem(dense, samples, shape, fit), dense, w_in_EJH)))
        if rank == H:
            assert close(w_out_EHI, dense.w_out_EHI)
    assert all(after <= before * (1 + 1e-9) + 1e-12 for before, after in pairwise(errors))
    assert errors[0] > 1e3 * errors[-1]


# Both phases


CASES = {
    "all, default": (PLAIN, grouped(5, 4, 4, 4), Fit()),
    "2/1 interpolative": (PLAIN, grouped(5, 3, 2, 1, storage="interpolative"), Fit()),
    "1/2 separate": (PLAIN, grouped(3, 5, 1, 2, gate_up="separate"), Fit(ridge_in=0.01)),
    "layer form, oss": (OSS, LatentShape("layer", 6, 6, 4, 4), Fit()),
    "separate, oss, combined": (OSS, grouped(4, 5, 2, 4, gate_up="separate"), Fit(output="combined")),
    "combined in two groups": (PLAIN, grouped(6, 4, 4, 2), Fit(metric="input", output="combined")),
    "dense down, no gate": (UNGATED, grouped(3, None, 2, 1), Fit()),
    "no refit": (PLAIN, grouped(5, 4, 2, 2), Fit(cores=False, down=False)),
}


@pytest.mark.parametrize("weighting", ["squared", "none"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_slow_reference(case: str, weighting: str) -> None:
    spec, shape, fit = CASES[case]
    dense = layer(spec)
    samples = dataclasses.replace(tokens(16), weighting=weighting, shrinkage=0.5)  # type: ignore[arg-type]
    pairs = zip(solved(dense, samples, shape, fit), reference.solve_layer(dense, samples, shape, fit), strict=True)
    assert all(close(found, expected, 1e-7) for found, expected in pairs)


def unrouted(samples: Calibrated, slots: Tensor | slice) -> Calibrated:
    index_TK = samples.index_TK.clone()
    index_TK[slots] = E
    return dataclasses.replace(samples, index_TK=index_TK)


def all_to_first() -> Calibrated:
    samples = tokens()
    index_TK = torch.full_like(samples.index_TK, E)
    index_TK[:, 0] = 0
    return dataclasses.replace(samples, index_TK=index_TK)


POPULATIONS: dict[str, Callable[[], Population]] = {
    "no data": lambda: Uninformed(E, H),
    "plenty": lambda: tokens(100),
    "three tokens": lambda: tokens(3),
    "no tokens": lambda: tokens(0),
    "one expert": all_to_first,
    "nothing routed": lambda: unrouted(tokens(), slice(None)),
    "zero inputs": lambda: dataclasses.replace(tokens(), x_TH=torch.zeros(40, H, dtype=torch.float64)),
    "zero gates": lambda: dataclasses.replace(tokens(), gate_TK=torch.zeros(40, K)),
}
FULL = {
    "layer": (PLAIN, LatentShape("layer", H, H, E, E)),
    "layer, oss": (OSS, LatentShape("layer", H, H, E, E)),
    "layer, no gate": (UNGATED, LatentShape("layer", H, H, E, E)),
    "all/all": (PLAIN, grouped(H, H, 4, 4)),
    "2/1 interpolative, least rank": (PLAIN, grouped(H, I, 2, 1, storage="interpolative")),
    "1/1 oss, least rank": (OSS, grouped(2 * I, I, 1, 1, storage="interpolative")),
    "2/1 interpolative, more than rows": (PLAIN, grouped(H, H, 2, 1, storage="interpolative")),
    "separate, oss": (OSS, grouped(2 * I, 2 * I, 2, 2, gate_up="separate")),
    "separate, dense down": (PLAIN, grouped(I, None, 1, 1, gate_up="separate", storage="interpolative")),
    "no gate, dense down": (UNGATED, grouped(H, None, 4, 1)),
}


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("case", FULL)
def test_full_rank_is_the_identity_whatever_the_data(case: str, population: str) -> None:
    spec, shape = FULL[case]
    dense = layer(spec)
    fits = (Fit(), Fit(metric="input", output="combined"), Fit(ridge_in=0, ridge_out=0, ridge_metric=0))
    for fit, tolerance in zip(fits, (1e-9, 1e-9, 1e-5), strict=True):
        if fit.output == "combined" and shape.rank_out != H:
            continue  # the routed sum of few tokens does not span the outputs of experts they do not reach
        tensors = solve_layer(dense, POPULATIONS[population](), shape, fit, torch.float64)
        for found, expected in zip(effective(spec, shape, tensors), (dense.w_in_EJH, dense.w_out_EHI), strict=True):
            assert close(found, expected, tolerance)
        if spec.has_bias:
            assert dense.bias_out_EH is not None
            assert torch.equal(tensors["decode_bias"], dense.bias_out_EH)


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("case", ["2/1 interpolative", "layer form, oss", "combined in two groups"])
def test_results_are_finite_whatever_the_data(case: str, population: str) -> None:
    spec, shape, fit = CASES[case]
    tensors = solve_layer(layer(spec), POPULATIONS[population](), shape, fit, torch.bfloat16)
    spectra = measure_spectra(layer(spec), POPULATIONS[population](), shape, fit)
    assert all(torch.isfinite(tensor).all() for tensor in (*tensors.values(), *spectra.input_GM, spectra.output_GM))


def test_dead_weights_are_no_trouble() -> None:
    dense = layer()
    dense.w_in_EJH[0] = 0
    dense.w_out_EHI[1] = 0
    for shape in (grouped(5, 3, 1, 1, storage="interpolative"), grouped(5, 3, 4, 4)):
        w_in_EJH, w_out_EHI = solved(dense, tokens(), shape)
        assert close(w_in_EJH[0], dense.w_in_EJH[0])
        assert close(w_out_EHI[1], dense.w_out_EHI[1])


def test_two_runs_are_equal_bit_for_bit() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        first, second = (
            solve_layer(layer(), tokens(), grouped(5, 3, 2, 1, storage="interpolative"), Fit(), dtype) for _ in "ab"
        )
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_may_be_parameters() -> None:
    dense, shape = layer(OSS), grouped(5, 3, 2, 1)
    for name in ("w_in_EJH", "w_out_EHI", "bias_in_EJ", "bias_out_EH"):
        setattr(dense, name, torch.nn.Parameter(getattr(dense, name)))
    tensors = solve_layer(dense, tokens(), shape, Fit(), torch.float64)
    spectra = measure_spectra(dense, tokens(), shape, Fit())
    assert not any(tensor.requires_grad for tensor in (*tensors.values(), *spectra.input_GM, spectra.output_GM))
    assert layer_error(dense, tensors, shape, tokens()).err_h > 0


def test_neither_the_order_of_tokens_nor_their_split_into_slots_matters() -> None:
    dense, samples, shape = layer(), tokens(), grouped(5, 3, 2, 1)
    order_T = torch.randperm(40, generator=generator(3))
    shuffled = Calibrated(
        samples.x_TH[order_T], samples.index_TK[order_T], samples.gate_TK[order_T], samples.token_T[order_T], E
    )
    by_slot = Calibrated(
        samples.x_TH.repeat_interleave(K, 0),
        samples.index_TK.view(-1, 1),
        samples.gate_TK.view(-1, 1),
        samples.token_T.repeat_interleave(K),
        E,
    )
    expected = solved(dense, samples, shape)
    for other in (shuffled, by_slot):
        assert all(close(a, b, 1e-9) for a, b in zip(solved(dense, other, shape), expected, strict=True))


def test_slots_without_an_expert_are_as_if_they_were_not_there() -> None:
    samples = tokens()
    marked = unrouted(samples, (slice(None), 1))  # type: ignore[arg-type]
    single = dataclasses.replace(samples, index_TK=samples.index_TK[:, :1], gate_TK=samples.gate_TK[:, :1])
    assert marked.counts_E.tolist() == single.counts_E.tolist()
    shape = grouped(5, 3, 2, 1)
    for fit in (Fit(), Fit(output="combined")):
        pairs = zip(solved(layer(), marked, shape, fit), solved(layer(), single, shape, fit), strict=True)
        assert all(close(a, b, 1e-10) for a, b in pairs)


def test_calibration_without_any_routing_leaves_the_first_projection_to_the_weights() -> None:
    shape, fit = grouped(5, 3, 2, 1), Fit(metric="input")
    expected = solved(layer(), Uninformed(E, H), shape, fit)[0]
    for name in ("nothing routed", "zero gates", "no tokens"):
        assert close(solved(layer(), POPULATIONS[name](), shape, fit)[0], expected)


def test_an_unseen_expert_is_fitted_on_the_layers_tokens() -> None:
    dense, samples = layer(), tokens()
    samples = unrouted(samples, samples.index_TK == 2)
    assert samples.counts_E[2] == 0
    shape, fit = grouped(5, None, 2, 1), Fit()
    tensors = solve_layer(dense, samples, shape, fit, torch.float64)
    w_in_EJH, w_out_EHI = effective(PLAIN, shape, tensors)
    b_RH = Packed(shape.banks(PLAIN)[0], tensors).basis("encode", 1, 5)
    layer_HH = reference.covariance(samples, range(E), fit.ridge_in)
    assert close(w_in_EJH[2], reference.refit_core(dense.w_in_EJH[2], b_RH, layer_HH) @ b_RH, 1e-8)
    p_T = samples.slot_weight_TK.sum(1) / samples.slot_weight_TK.sum()
    z_TI, own_TI = (reference.intermediate(dense, w, 2, samples.x_TH) for w in (dense.w_in_EJH[2], w_in_EJH[2]))
    ridge = reference.output_noise(samples, 2, I, fit.ridge_out)
    assert close(w_out_EHI[2], reference.refit_down(dense.w_out_EHI[2], z_TI, own_TI, p_T, ridge), 1e-8)


def test_the_pool_covers_all_of_the_calibration() -> None:
    samples = tokens(1500)
    samples = unrouted(samples, samples.index_TK == 0)
    x_NH, p_N = (torch.cat(parts) for parts in zip(*(samples.sample(0, I) or ()), strict=True))
    assert len(x_NH) == 1024
    assert float(p_N.sum()) == pytest.approx(1)
    positions = [int((samples.x_TH == x_H).all(1).nonzero()[0]) for x_H in x_NH[[0, 512, 1023]]]
    assert positions == [0, 750, 1498]


@pytest.mark.parametrize("weighting", ["squared", "linear", "none"])
def test_routing_weights_enter_as_asked(weighting: str) -> None:
    samples = dataclasses.replace(tokens(20), gate_TK=tokens(20).gate_TK * 3)
    samples = dataclasses.replace(samples, weighting=weighting)  # type: ignore[arg-type]
    power = {"squared": 2, "linear": 1, "none": 0}[weighting]
    expected_TK = samples.gate_TK**power * samples.token_T[:, None] / 20
    assert close(samples.slot_weight_TK, expected_TK, 1e-14)
    mean = float(expected_TK.sum()) / E
    assert samples.weight(1) == pytest.approx(0.8 * float(expected_TK[samples.index_TK == 1].sum()) + 0.2 * mean)
    for group in (range(2, 4), range(E)):
        assert close(samples.covariance(group, 0.1), reference.covariance(samples, group, 0.1), 1e-12)
    b_RH = normal(5, H)
    found = samples.projected(1, b_RH, reference.covariance(samples, range(E), 0.1) @ b_RH.T, 0.1)
    assert close(found, reference.covariance(samples, [1], 0.1) @ b_RH.T, 1e-12)


# The data-free limit


@pytest.mark.parametrize("output_group", [1, 4])
def test_without_data_it_is_the_truncated_svd_of_the_stacks(output_group: int) -> None:
    dense, shape = layer(), grouped(5, 4, 2, output_group)
    w_in_EJH, w_out_EHI = solved(dense, Uninformed(E, H), shape, Fit(metric="input"))
    for start in range(0, E, 2):
        left, sigma, right = torch.linalg.svd(dense.w_in_EJH[start : start + 2].reshape(-1, H), full_matrices=False)
        assert close(w_in_EJH[start : start + 2].reshape(-1, H), left[:, :5] * sigma[:5] @ right[:5])
    for start in range(0, E, output_group):
        beside_HN = torch.cat(list(dense.w_out_EHI[start : start + output_group]), dim=1)
        left, sigma, right = torch.linalg.svd(beside_HN, full_matrices=False)
        found = torch.cat(list(w_out_EHI[start : start + output_group]), dim=1)
        assert close(found, left[:, :4] * sigma[:4] @ right[:4])


def test_without_data_it_is_the_limit_of_identity_moments() -> None:
    every = torch.arange(E).expand(H, E)
    x_TH = H**0.5 * torch.eye(H, dtype=torch.float64)
    alike = Calibrated(x_TH, every, torch.full((H, E), 0.25), torch.ones(H), E)
    shape, fit = grouped(5, None, 2, 1), Fit(metric="input", down=False)
    for found, expected in zip(
        solved(layer(), alike, shape, fit), solved(layer(), Uninformed(E, H), shape, fit), strict=True
    ):
        assert close(found, expected)


# Phase 2: refit


@few_examples
@given(seed=seeds, rank=st.integers(1, 8), rows=st.integers(1, 12))
def test_cores_are_the_least_squares_solution(seed: int, rank: int, rows: int) -> None:
    w_XH, b_RH, x_NH = normal(5, 8, seed=seed), normal(rank, 8, seed=seed + 1), normal(rows, 8, seed=seed + 2)
    c_HH = reference.shrunk(x_NH.T @ x_NH, 0.01)
    a_XR = refit_core(w_XH, b_RH, right_inverse(b_RH), c_HH @ b_RH.T)
    left_XH = w_XH - a_XR @ b_RH
    assert close(left_XH @ c_HH @ b_RH.T, torch.zeros(5, rank), 1e-8 * float(c_HH.diagonal().sum()))
    other_XR = a_XR + 0.1 * normal(5, rank, seed=seed + 3)
    assert squared(left_XH, c_HH) <= squared(w_XH - other_XR @ b_RH, c_HH)
    assert close(a_XR @ b_RH, reference.refit_core(w_XH, b_RH, c_HH) @ b_RH, 1e-7)


@few_examples
@given(seed=seeds, rows=st.integers(1, 20), ridge=st.floats(1e-3, 1.0))
def test_the_second_projection_is_the_least_squares_solution(seed: int, rows: int, ridge: float) -> None:
    w_HI, z_NI = normal(7, 4, seed=seed), normal(rows, 4, seed=seed + 1)
    own_NI = z_NI + 0.3 * normal(rows, 4, seed=seed + 2)
    p_N = torch.rand(rows, generator=generator(seed)).double() + 0.1
    gram_II, target_II = (own_NI.T * p_N) @ own_NI, (z_NI.T * p_N) @ own_NI
    found_HI = refit_down(w_HI, target_II, gram_II, ridge)
    assert close(found_HI, reference.refit_down(w_HI, z_NI, own_NI, p_N, ridge), 1e-8)

    def objective(down_HI: Tensor) -> float:
        left_NH = z_NI @ w_HI.T - own_NI @ down_HI.T
        damping = ridge * float(gram_II.diagonal().mean()) * float((down_HI - w_HI).square().sum())
        return float((p_N[:, None] * left_NH.square()).sum()) + damping

    assert objective(found_HI) <= min(objective(w_HI), objective(found_HI + 0.01 * normal(7, 4, seed=seed + 3)))


@pytest.mark.parametrize("held_out", [False, True])
def test_each_refit_lowers_the_error(held_out: bool) -> None:
    dense, samples, shape = layer(), tokens(3000), grouped(6, None, 4, 1)
    measured = tokens(3000, seed=50) if held_out else samples
    errors = {
        (cores, down): layer_error(
            dense,
            solve_layer(dense, samples, shape, Fit(cores=cores, down=down, ridge_in=0.01), torch.float64),
            shape,
            measured,
        ).err_h
        for cores in (False, True)
        for down in (False, True)
    }
    assert errors[True, False] < errors[False, False]
    assert errors[False, True] < errors[False, False]
    assert errors[True, True] < min(errors[True, False], errors[False, True])


def test_the_two_sided_metric_lowers_the_error() -> None:
    dense, samples, shape = layer(), tokens(600), grouped(6, None, 4, 1)
    dense.w_out_EHI.mul_(torch.logspace(0, -2, I, dtype=torch.float64))
    two_sided, one_sided = (
        layer_error(dense, solve_layer(dense, samples, shape, fit, torch.float64), shape, samples).err_h
        for fit in (Fit(), Fit(metric="input"))
    )
    assert two_sided < 0.8 * one_sided


@pytest.mark.parametrize("rank", [3, 6])
def test_the_combined_basis_is_the_principal_subspace_of_the_routed_sum(rank: int) -> None:
    dense, samples = layer(), tokens()
    shape = grouped(H, rank, 4, 4)
    errors = {}
    for output in ("combined", "expert"):
        tensors = solve_layer(dense, samples, shape, Fit(output=output), torch.float64)
        errors[output] = layer_error(dense, tensors, shape, samples)
    y_TH = reference.routed_sum(dense, samples, dense.w_in_EJH, dense.w_out_EHI, range(E))
    energy_H = torch.linalg.svdvals(y_TH).square() / len(y_TH)
    assert errors["combined"].err_h == pytest.approx(float(energy_H[rank:].sum()), rel=1e-9)
    assert errors["combined"].err_h < errors["expert"].err_h


@pytest.mark.parametrize("case", ["layer form, oss", "2/1 interpolative"])
def test_layer_error_is_the_difference_of_routed_sums(case: str) -> None:
    spec, shape, fit = CASES[case]
    dense, samples, measured = layer(spec), tokens(), unrouted(tokens(12, seed=9), torch.arange(3))
    tensors = solve_layer(dense, samples, shape, fit, torch.float64)
    exact_TH, found_TH = (
        reference.routed_sum(dense, measured, w_in_EJH, w_out_EHI, range(E))
        for w_in_EJH, w_out_EHI in ((dense.w_in_EJH, dense.w_out_EHI), effective(spec, shape, tensors))
    )
    error = layer_error(dense, tensors, shape, measured)
    assert error.err_h == pytest.approx(float((exact_TH - found_TH).square().sum(1).mean()), rel=1e-9)
    assert error.tokens == 12
    if not spec.has_bias:
        plain = dataclasses.replace(measured, token_T=torch.ones(12))
        y_TH = reference.routed_sum(dense, plain, dense.w_in_EJH, dense.w_out_EHI, range(E))
        change = layer_error(dense, tensors, shape, plain).err_h * 12
        assert error.relative == pytest.approx(change / float(y_TH.square().sum()), rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_tokens_in_parts_give_what_they_give_at_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape, fit = CASES[case]
    dense, samples = layer(spec), tokens(100)
    assert int(samples.counts_E.min()) > 7

    def results() -> list[Tensor]:
        fresh = dataclasses.replace(samples)  # nothing remembered
        spectra, tensors = measure_spectra(dense, fresh, shape, fit), solve_layer(dense, fresh, shape, fit, torch.float64)
        error = layer_error(dense, tensors, shape, fresh)
        measured = torch.tensor([error.err_h, error.relative], dtype=torch.float64)
        return [*spectra.input_GM, spectra.output_GM, *effective(spec, shape, tensors), measured]

    whole = results()
    monkeypatch.setattr(solver_population, "ROWS", 7)
    for module in (solver_layer, solver_spectra):
        monkeypatch.setattr(module, "BLOCK", 5)
    parts, again = results(), results()
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert all(close(a, b, 1e-9) for a, b in zip(parts, whole, strict=True))


def test_no_more_rows_than_one_part_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver_population, "ROWS", 7)
    dense, samples, shape = layer(), tokens(100), grouped(5, 4, 2, 2)
    activate, seen = dense.activate, set()

    def watched(h_NJ: Tensor) -> Tensor:
        seen.add(len(h_NJ))
        return activate(h_NJ)

    dense.activate = watched
    for output in ("expert", "combined"):
        tensors = solve_layer(dense, samples, shape, Fit(output=output), torch.float64)
        layer_error(dense, tensors, shape, samples)
    assert max(seen) == 7


# Precision


@pytest.mark.parametrize("storage", ["orthonormal", "interpolative"])
def test_cores_make_up_for_the_rounding_of_bases(storage: str) -> None:
    dense, samples, fit = layer(), tokens(200), Fit(metric="input", cores=False, down=False)
    shape = grouped(10, 10, 4, 4, storage=storage)
    exact = solve_layer(dense, samples, shape, fit, torch.float64)
    rounded = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in exact.items()}
    found = solve_layer(dense, samples, shape, fit, torch.bfloat16)
    assert torch.equal(found["encode.weight"], rounded["encode.weight"])
    # each core is the best one for the basis as stored, rounded itself
    packed, c_HH = Packed(shape.banks(PLAIN)[0], found), reference.covariance(samples, range(E), fit.ridge_in)
    b_RH, d_RH = packed.basis("encode", 0, 10).double(), packed.basis("decode", 0, 10).double()
    for e in range(E):
        best_JR = reference.refit_core(dense.w_in_EJH[e], b_RH, c_HH)
        assert torch.allclose(packed.core("gate_up", e).double(), best_JR, rtol=2**-8, atol=1e-6)
        best_RI = torch.linalg.lstsq(d_RH.T, dense.w_out_EHI[e]).solution
        assert torch.allclose(packed.core("down", e).double(), best_RI, rtol=2**-8, atol=1e-6)
    problem = pooled_problem(dense, samples, shape, fit)
    best, error, naive = (
        sum(pooled_errors(problem, dense, effective(PLAIN, shape, tensors)[0])) for tensors in (exact, found, rounded)
    )
    assert error - best < 0.97 * (naive - best)


@pytest.mark.parametrize("shape", [grouped(8, 6, 4, 4), grouped(8, 3, 1, 1, storage="interpolative")], ids=str)
def test_float32_is_as_good_as_float64(shape: LatentShape) -> None:
    dense, samples, fit = layer(), tokens(200), Fit(ridge_in=1e-5)
    samples.x_TH[:, 3] += 1000  # a massive activation
    narrow = DenseExperts(PLAIN, dense.w_in_EJH.float(), dense.w_out_EHI.float(), dense.activate)
    narrow_samples = dataclasses.replace(samples, x_TH=samples.x_TH.float())
    wide = DenseExperts(PLAIN, narrow.w_in_EJH.double(), narrow.w_out_EHI.double(), dense.activate)
    found = solve_layer(narrow, narrow_samples, shape, fit, torch.float32)
    expected = solve_layer(wide, samples, shape, fit, torch.float64)
    error, best = (layer_error(wide, tensors, shape, samples).err_h for tensors in (found, expected))
    assert error == pytest.approx(best, rel=1e-3)


# Allocation


def banked(**options: str) -> BankedShape:
    return BankedShape(((3, 0), (2, 1)), (grouped(5, 4, 2, 1, storage="interpolative"), grouped(7, 6, 1, 2, **options)))


@pytest.mark.parametrize("spec", [PLAIN, OSS], ids=["plain", "oss"])
def test_a_bank_is_solved_as_the_same_experts_are_in_a_layer(spec: ExpertsSpec) -> None:
    """In groups of one, nothing but its ranks depends on the bank an expert is in."""
    dense, samples = layer(spec), tokens()
    shape = BankedShape(((3, 0), (2, 1)), (grouped(5, 4, 1, 1), grouped(7, 6, 1, 1)))
    found = solved(dense, samples, shape)
    for bank in shape.banks(spec):
        alone = solved(dense, samples, bank.shape)
        for expert in bank.experts:
            assert all(close(ours[expert], theirs[expert]) for ours, theirs in zip(found, alone, strict=True))


def test_groups_are_neighbours_in_the_order_of_their_bank() -> None:
    dense, samples = layer(), tokens()
    w_in_EJH, w_out_EHI = solved(dense, samples, banked())
    assert torch.linalg.matrix_rank(w_in_EJH[[3, 0]].flatten(0, 1), rtol=1e-9) == 5
    assert torch.linalg.matrix_rank(w_in_EJH[[2, 1]].flatten(0, 1), rtol=1e-9) > 7
    assert torch.linalg.matrix_rank(torch.cat([w_out_EHI[2], w_out_EHI[1]], dim=1), rtol=1e-9) == 6
    assert torch.linalg.matrix_rank(torch.cat([w_out_EHI[3], w_out_EHI[0]], dim=1), rtol=1e-9) > 4


@pytest.mark.parametrize("output", ["expert", "combined"])
def test_layer_error_adds_up_all_banks(output: str) -> None:
    dense, samples, measured = layer(OSS), tokens(), tokens(12, seed=9)
    shape = banked(gate_up="separate")
    tensors = solve_layer(dense, samples, shape, Fit(output=output), torch.float64)  # type: ignore[arg-type]
    exact_TH, found_TH = (
        reference.routed_sum(dense, measured, *weights, range(E))
        for weights in ((dense.w_in_EJH, dense.w_out_EHI), effective(OSS, shape, tensors))
    )
    expected = float((exact_TH - found_TH).square().sum(1).mean())
    assert layer_error(dense, tensors, shape, measured).err_h == pytest.approx(expected, rel=1e-9)
    assert torch.equal(tensors["bank_1.core.bias"], dense.bias_in_EJ[[2, 1]])  # type: ignore[index]


@st.composite
def curves(draw: st.DrawFn, convex: bool = False) -> list[Curve]:
    out = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 5))
        steps = [1] * count if convex else draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
        falls = draw(st.lists(st.integers(0, 50), min_size=count - 1, max_size=count - 1))
        falls = sorted(falls, reverse=True) if convex else falls
        costs = [sum(steps[: k + 1]) for k in range(count)]
        errors = [float(sum(falls[k:])) for k in range(count)]
        out.append(Curve(tuple(range(1, count + 1)), tuple(costs), tuple(errors)))
    return out


def spent(chosen: list[int], found: list[Curve]) -> tuple[int, float]:
    pairs = list(zip(chosen, found, strict=True))
    return sum(curve.costs[k] for k, curve in pairs), sum(curve.errors[k] for k, curve in pairs)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(found=curves(), budget=st.integers(0, 90))
def test_allocation_keeps_the_budget_and_beats_the_same_rank_everywhere(found: list[Curve], budget: int) -> None:
    chosen = allocate(found, budget)
    best = reference.allocate(found, budget)
    if chosen is None:
        assert best is None
        return
    cost, error = spent(chosen, found)
    assert cost <= budget
    assert best is not None
    assert error >= best
    # nothing that still fits would lower the error
    for i, curve in enumerate(found):
        for k in range(chosen[i] + 1, len(curve.costs)):
            assert curve.costs[k] - curve.costs[chosen[i]] > budget - cost or curve.errors[k] >= curve.errors[chosen[i]]
    for index in range(5):
        same = [min(index, len(curve.costs) - 1) for curve in found]
        if spent(same, found)[0] <= budget:
            assert error <= spent(same, found)[1]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(found=curves(convex=True), budget=st.integers(0, 20))
def test_allocation_is_optimal_on_convex_curves(found: list[Curve], budget: int) -> None:
    chosen = allocate(found, budget)
    best = reference.allocate(found, budget)
    assert best == (None if chosen is None else spent(chosen, found)[1])


def test_allocation_skips_the_bump_of_a_non_convex_curve_and_spends_what_is_left() -> None:
    flat_then_steep = Curve((1, 2, 3), (1, 2, 3), (10.0, 10.0, 0.0))
    gentle = Curve((1, 2, 3), (1, 2, 3), (4.0, 2.0, 1.0))
    assert allocate([flat_then_steep, gentle], 4) == [2, 0]
    assert allocate([flat_then_steep, gentle], 5) == [2, 1]
    assert allocate([flat_then_steep, gentle], 3) == [0, 1]  # the long step does not fit
    rising = Curve((1, 2), (1, 2), (1.0, 3.0))
    assert allocate([rising, gentle], 99) == [0, 2]
    assert allocate([gentle], 0) is None
    steep_later = Curve((1, 2, 3), (1, 2, 3), (10.0, 9.0, 0.0))
    assert allocate([steep_later, Curve((1, 2), (1, 50), (5.0, 0.0))], 3) == [1, 0]  # part of a step of the hull


def test_allocation_prefers_the_same_rank_everywhere_where_greed_ends_worse() -> None:
    first, second = Curve((1, 2, 3), (2, 4, 6), (9.0, 6.0, 0.0)), Curve((1, 2), (2, 6), (9.0, 0.0))
    assert allocate([first, second], 10) == [1, 1]  # the best gain per cost is the first curve's 9 for 4


@given(seed=seeds)
@few_examples
def test_tail_errors_are_sums_of_discarded_energies(seed: int) -> None:
    energy_GM = normal(3, 6, seed=seed).square()
    found = tail_errors(energy_GM, range(1, 9))
    assert found == pytest.approx([float(energy_GM[:, rank:].sum()) for rank in range(1, 9)], abs=1e-12)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=7), st.integers(1, 4))
@few_examples
def test_partition_is_the_best_of_all_partitions(values: list[int], count: int) -> None:
    def spread(sets: list[list[int]]) -> float:
        means = [sum(values[i] for i in part) / len(part) for part in sets]
        return sum((values[i] - mean) ** 2 for part, mean in zip(sets, means, strict=True) for i in part)

    sets = partition(values, count)
    assert sorted(i for part in sets for i in part) == list(range(len(values)))
    assert 1 <= len(sets) <= count
    labels = product(range(count), repeat=len(values))
    ways = ([[i for i, own in enumerate(each) if own == k] for k in set(each)] for each in labels)
    assert spread(sets) == pytest.approx(min(spread(way) for way in ways), abs=1e-9)


@given(curves(convex=True), st.integers(0, 60))
def test_what_is_bought_of_convex_curves_is_what_steps_along_them_buy(found: list[Curve], budget: int) -> None:
    tables = [(torch.tensor([curve.errors], dtype=torch.float64), torch.tensor(curve.costs).double()) for curve in found]
    spent = bought(tables, budget)
    if sum(curve.costs[0] for curve in found) > budget:
        assert spent is None
        return
    assert spent is not None
    costs = [int(cost_U) for cost_U in spent]
    assert sum(costs) <= budget
    error = sum(curve.errors[curve.costs.index(cost)] for curve, cost in zip(found, costs, strict=True))
    # no other choice of at most this cost is better: the choice is optimal for what it spends
    assert error <= (reference.allocate(found, sum(costs)) or 0.0) + 1e-9


def test_the_lowest_price_that_fits_is_found() -> None:
    for least in (1e-9, 0.3, 7.0):
        assert at_lowest_price(lambda price: price, lambda price, least=least: price >= least) == pytest.approx(
            least, rel=1e-3
        )
    assert at_lowest_price(lambda price: price, lambda _: False) is None


def test_tails_of_groups_add_up_to_the_tail_of_all() -> None:
    energy_GM = torch.rand(3, 5, generator=generator(0), dtype=torch.float64)
    ranks = (0, 2, 5, 9)
    assert tails_at(energy_GM, ranks).sum(0).tolist() == pytest.approx(list(tail_errors(energy_GM, ranks)))
