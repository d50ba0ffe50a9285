"""The Gauss-Newton step of the input side, against autograd on the objective written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from molae_compress.solver import newton
from molae_compress.solver.layer import layer_error, solve_layer
from molae_compress.solver.newton import InputSide, _Problem, refined
from molae_compress.solver.packing import branch_rows
from molae_compress.solver.population import Calibrated, Uninformed
from molae_compress.solver.spectra import Fit
from molae_compress.tensors import DenseExperts, ExpertsSpec, LatentShape
from tests.test_solver import OSS, PLAIN, UNGATED, H, grouped, layer, normal, tokens

RANK, LEVEL = 3, 0.7
CASES = [
    pytest.param(PLAIN, "joint", [1], id="one expert"),
    pytest.param(PLAIN, "joint", [0, 1, 3], id="three experts"),
    pytest.param(PLAIN, "separate", [2, 3], id="separate"),
    pytest.param(OSS, "separate", [0, 2], id="biases, interleaved, clamped"),
    pytest.param(UNGATED, "joint", [0, 1], id="no gate"),
]


def rows_of(spec: ExpertsSpec, gate_up: str) -> list[Tensor | slice]:
    return branch_rows(spec, LatentShape("grouped", RANK, RANK, 1, 1, gate_up=gate_up), "cpu")  # type: ignore[arg-type]


def near(dense: DenseExperts, group: list[int], rows: list[Tensor | slice], samples: Calibrated) -> InputSide:
    """Close to the closed form: the leading directions of the whitened rows, and cores that project on them."""
    root_HH = torch.linalg.cholesky(samples.covariance(group, 0.3))
    bases, cores = [], []
    for row in rows:
        stack_XH = torch.cat([dense.w_in_EJH[e][row] for e in group]) @ root_HH
        b_RH = torch.linalg.svd(stack_XH).Vh[:RANK] @ torch.linalg.inv(root_HH)
        bases.append(b_RH)
        cores.append([dense.w_in_EJH[e][row] @ root_HH @ torch.linalg.pinv(b_RH @ root_HH) for e in group])
    return InputSide(bases, cores)


def like(side: InputSide, parts: list[Tensor]) -> InputSide:
    count, experts = len(side.bases), len(side.cores[0])
    cores = parts[count:]
    return InputSide(parts[:count], [cores[branch * experts : (branch + 1) * experts] for branch in range(count)])


def residuals(problem: _Problem, side: InputSide, metric_EJ: Tensor) -> Tensor:
    """All errors of both terms in one vector whose square is the objective."""
    found = []
    for place, e in enumerate(problem.group):
        w_JH = torch.zeros_like(problem.dense.w_in_EJH[e])
        for b_RH, cores, rows in zip(side.bases, side.cores, problem.rows, strict=True):
            w_JH = w_JH.index_put((torch.arange(len(w_JH))[rows],), cores[place] @ b_RH)
        latent = replace(problem.dense, w_in_EJH=w_JH[None].expand_as(problem.dense.w_in_EJH))
        sample = problem.population.sample(e, problem.dense.spec.rows)
        assert sample is not None
        for x_NH, p_N in sample:
            error_NI = latent.intermediate(e, x_NH) - problem.dense.intermediate(e, x_NH)
            weight_N1 = (p_N * problem.population.weight(e)).sqrt()[:, None]
            found.append((weight_N1 * (error_NI @ problem.dense.w_out_EHI[e].T)).flatten())
        found.append(((problem.level * metric_EJ[place]).sqrt()[:, None] * (w_JH - problem.dense.w_in_EJH[e])).flatten())
    return torch.cat(found)


@pytest.mark.parametrize(("spec", "gate_up", "group"), CASES)
def test_gradient_and_curvature_are_those_of_the_objective(spec: ExpertsSpec, gate_up: str, group: list[int]) -> None:
    dense, rows = layer(spec), rows_of(spec, gate_up)
    samples = tokens(30)
    side = near(dense, group, rows, samples)
    problem = _Problem(dense, samples, group, rows, side, LEVEL)
    value, gradient, metric_EJ = problem.gradient()

    def all_residuals(*parts: Tensor) -> Tensor:
        return residuals(problem, like(side, list(parts)), metric_EJ)

    parts = tuple(side.parts())
    r_X = all_residuals(*parts)
    jacobian = torch.cat([j.flatten(1) for j in torch.autograd.functional.jacobian(all_residuals, parts)], dim=1)
    assert value == pytest.approx(float(r_X.square().sum()), rel=1e-9)
    assert problem.objective(side, metric_EJ) == pytest.approx(value, rel=1e-9)

    def flat(found: InputSide) -> Tensor:
        return torch.cat([part.flatten() for part in found.parts()])

    torch.testing.assert_close(flat(gradient), jacobian.T @ r_X, rtol=1e-8, atol=1e-10)
    change = like(side, [normal(*part.shape, seed=9 + number) for number, part in enumerate(parts)])
    curved = problem.curvature(metric_EJ, change)
    torch.testing.assert_close(flat(curved), jacobian.T @ (jacobian @ flat(change)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("spec", "gate_up", "group"), CASES)
def test_the_step_lowers_the_objective(spec: ExpertsSpec, gate_up: str, group: list[int]) -> None:
    dense, rows, samples = layer(spec), rows_of(spec, gate_up), tokens(60)
    side, covariance_HH = near(dense, group, rows, samples), samples.covariance(group, 0.3)
    problem = _Problem(dense, samples, group, rows, side, 0.3 / 0.7 * float(covariance_HH.diagonal().mean()))
    before, _, metric_EJ = problem.gradient()
    found = [
        problem.objective(refined(dense, samples, group, rows, side, covariance_HH, 0.3, count), metric_EJ)
        for count in (1, 3, 30)
    ]
    assert max(found) < 0.95 * before
    assert min(found[1:]) < found[0]


@pytest.mark.parametrize("gate_up", ["joint", "separate"])
@pytest.mark.parametrize("storage", ["orthonormal", "interpolative"])
def test_layers_end_up_nearer_to_the_dense_ones(gate_up: str, storage: str) -> None:
    dense, samples = layer(), tokens(400)
    shape = grouped(3, 4, 2, 1, gate_up=gate_up, storage=storage)
    errors = []
    for count in (0, 5):
        tensors = solve_layer(dense, samples, shape, Fit(newton=count, ridge_in=0.01), torch.float64)
        errors.append(layer_error(dense, tensors, shape, samples).relative)
    assert errors[1] < 0.95 * errors[0]


def test_a_full_rank_stays_exact() -> None:
    dense, samples, shape = layer(), tokens(), grouped(12, 6, 1, 1)
    tensors = solve_layer(dense, samples, shape, Fit(newton=5), torch.float64)
    assert layer_error(dense, tensors, shape, samples).relative < 1e-18


def test_nothing_known_leaves_the_closed_form() -> None:
    dense, shape = layer(), grouped(3, 4, 2, 1)
    plain, other = (solve_layer(dense, Uninformed(4, H), shape, Fit(newton=count), torch.float64) for count in (0, 5))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_an_expert_without_tokens_is_refined_on_those_of_the_layer() -> None:
    dense, seen, shape = layer(), tokens(400), grouped(3, 4, 1, 1)
    without = replace(seen, index_TK=seen.index_TK.masked_fill(seen.index_TK == 0, 1))
    fits = [solve_layer(dense, without, shape, Fit(newton=count), torch.float64) for count in (0, 5)]
    assert all(tensor.isfinite().all() for tensor in fits[1].values())
    assert not torch.equal(fits[0]["core.gate_up"][:3], fits[1]["core.gate_up"][:3])
    pool = Calibrated(seen.x_TH, torch.zeros_like(seen.index_TK[:, :1]), seen.gate_TK[:, :1], seen.token_T, 4)
    errors = [layer_error(dense, fit, shape, pool).relative for fit in fits]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kept", [0, 700])
def test_what_is_computed_again_is_the_same(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, rows, group = layer(), rows_of(layer().spec, "joint"), [0, 1, 2]
    samples = tokens(60)
    side, covariance_HH = near(dense, group, rows, samples), samples.covariance(group, 0.3)
    expected = refined(dense, samples, group, rows, side, covariance_HH, 0.3, 3)
    monkeypatch.setattr(newton, "KEPT", kept)
    found = refined(dense, samples, group, rows, side, covariance_HH, 0.3, 3)
    assert all(torch.equal(*pair) for pair in zip(found.parts(), expected.parts(), strict=True))


def test_only_some_tokens_of_a_busy_expert_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tokens(400)
    every, few = ([p_N for _, p_N in samples.sample(0, 12, most) or ()] for most in (None, 20))
    assert len(torch.cat(few)) < len(torch.cat(every))
    assert float(torch.cat(few).sum()) == pytest.approx(1.0)


def test_a_layer_that_no_token_reaches_is_left_at_the_closed_form() -> None:
    dense, seen, shape = layer(), tokens(), grouped(3, 4, 2, 1)
    nobody = replace(seen, index_TK=torch.full_like(seen.index_TK, 4))
    plain, other = (solve_layer(dense, nobody, shape, Fit(newton=count), torch.float64) for count in (0, 5))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_experts_of_a_large_group_are_refined_on_the_basis_of_the_group() -> None:
    spec = replace(PLAIN, num_experts=8)
    dense, samples, shape = layer(spec), tokens(800, spec=spec), grouped(6, 4, 8, 1)
    closed, found = (solve_layer(dense, samples, shape, Fit(newton=count), torch.float64) for count in (0, 5))
    assert torch.equal(closed["encode.weight"], found["encode.weight"])
    errors = [layer_error(dense, tensors, shape, samples).relative for tensors in (closed, found)]
    assert errors[1] < 0.95 * errors[0]
