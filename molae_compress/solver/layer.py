"""One layer, both phases: dense experts and what is known of their inputs in, latent tensors out.

`measure_spectra` is what allocation needs before any rank is fixed; `solve_layer` is the fit at given ranks;
`layer_error` measures the result on tokens that took no part in the fit. All pure: tensors in, tensors out.
Shape suffixes: N rows of one sample, X rows of one input branch; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molae_compress.solver.basis import Spectrum, principal
from molae_compress.solver.moments import cross, ridged
from molae_compress.solver.packing import Packed, branch_rows
from molae_compress.solver.population import Calibrated, Population
from molae_compress.solver.refit import output_metric, project, refit_core, refit_down
from molae_compress.tensors import DenseExperts, LatentShape


@dataclass(frozen=True)
class Fit:
    """How to fit; the defaults are what measured best (docs/how-it-works.md).

    Attributes:
        metric: `two-sided` weighs errors of the first projection by their effect on the expert's output, `input` does not.
        output: basis of the second projection from each `expert`'s outputs, or from the layer's `combined` routed output.
        cores: refit each expert's input cores on its own moments (phase 2).
        down: refit the second projection on the compressed intermediates.
        ridge_in, ridge_out: share of the identity in input and intermediate moments.
        ridge_metric: the same for the output metric.
    """

    metric: Literal["two-sided", "input"] = "two-sided"
    output: Literal["expert", "combined"] = "expert"
    cores: bool = True
    down: bool = True
    ridge_in: float = 0.3
    ridge_out: float = 0.01
    ridge_metric: float = 0.001


@dataclass(frozen=True)
class LayerSpectra:
    """Energies of one layer by group: `input_GM` (one entry per branch) and `output_GM`, float64, largest first.

    With calibration the unit is the layer's output error relative to the residual stream per token (err_h).
    """

    input_GM: tuple[Tensor, ...]
    output_GM: Tensor


@dataclass(frozen=True)
class LayerError:
    """Errors of one compressed layer on given tokens.

    Attributes:
        err_h: mean over tokens of |dy|^2 / |h|^2, h the residual stream after the layer.
        relative: sum of |dy|^2 over sum of |y|^2.
        tokens: how many tokens were measured.
    """

    err_h: float
    relative: float
    tokens: int


def measure_spectra(dense: DenseExperts, population: Population, shape: LatentShape, fit: Fit) -> LayerSpectra:
    """Spectra of every group of both sides; `shape` gives groups and branches, its ranks are not used."""
    spec = dense.spec
    input_GM = tuple(
        torch.stack(
            [
                _input_spectrum(dense, population, group, rows_X, fit).energy_M
                for group in _groups(dense, shape.input_group)
            ]
        )
        for rows_X in branch_rows(spec, shape)
    )
    outputs = []
    for group in _groups(dense, shape.output_group):
        stack = (_output_factor(dense, population, expert, fit)[1] for expert in group)
        outputs.append(principal(stack, len(group) * spec.intermediate, spec.hidden).energy_M)
    return LayerSpectra(input_GM, torch.stack(outputs))


def solve_layer(
    dense: DenseExperts, population: Population, shape: LatentShape, fit: Fit, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Fits one experts module in the given shape.

    Returns:
        tensors named and shaped as `shape.tensors(dense.spec)`, floats in `dtype`, on the device of the weights.
    """
    packed = Packed.empty(dense.spec, shape, dtype, dense.w_in_EJH.device)
    for group in _groups(dense, shape.input_group):
        for (stem, core), rows_X in zip(shape.branches(), branch_rows(dense.spec, shape), strict=True):
            _fit_input(dense, population, packed, group, rows_X, (stem, core), fit)
    if fit.output == "combined" and isinstance(population, Calibrated) and shape.rank_out is not None:
        _fit_combined_output(dense, population, packed, fit)
    else:
        for group in _groups(dense, shape.output_group):
            _fit_output(dense, population, packed, group, fit)
    if dense.bias_in_EJ is not None and dense.bias_out_EH is not None:
        packed.set_biases(dense.bias_in_EJ, dense.bias_out_EH)
    return packed.tensors


def _groups(dense: DenseExperts, size: int) -> Iterator[range]:
    return (range(start, start + size) for start in range(0, dense.spec.num_experts, size))


def _work(dense: DenseExperts) -> torch.dtype:
    return torch.float64 if dense.w_in_EJH.dtype == torch.float64 else torch.float32


def _slopes(dense: DenseExperts, population: Population, expert: int) -> Tensor:
    """[J,J] float64: E[v v^T] of the activation's slopes; identity if nothing is known of the inputs."""
    sample = population.sample(expert, dense.spec.rows)
    if sample is None:
        return torch.eye(dense.spec.rows, dtype=torch.float64, device=dense.w_in_EJH.device)
    x_NH, p_N = sample
    h_NJ = x_NH.to(_work(dense)) @ dense.w_in_EJH[expert].to(_work(dense)).T
    if dense.bias_in_EJ is not None:
        h_NJ = h_NJ + dense.bias_in_EJ[expert].to(h_NJ.dtype)
    with torch.enable_grad():
        # every row of the first projection feeds one channel, so the gradient of the sum is each row's own slope
        leaf_NJ = h_NJ.detach().requires_grad_()
        (slope_NJ,) = torch.autograd.grad(dense.activate(leaf_NJ).sum(), leaf_NJ)
    return cross(slope_NJ, slope_NJ, p_N)


def _input_factor(
    dense: DenseExperts, population: Population, expert: int, rows_X: Tensor, root_HH: Tensor, fit: Fit
) -> Tensor:
    """[X,H]: M_i of `basis`, the whitened weights of one expert's branch in the metric of its output."""
    w_XH = dense.w_in_EJH[expert].to(root_HH.dtype)[rows_X.to(root_HH.device)]
    m_XH = w_XH @ root_HH * population.weight(expert) ** 0.5
    if fit.metric == "input":
        return m_XH
    channels_J = dense.spec.channel_of_row().to(root_HH.device)
    metric_JJ = output_metric(dense.w_out_EHI[expert], _slopes(dense, population, expert), channels_J, fit.ridge_metric)
    root_XX = torch.linalg.cholesky(metric_JJ[rows_X][:, rows_X])
    return root_XX.T.to(m_XH.dtype) @ m_XH


def _input_spectrum(
    dense: DenseExperts, population: Population, group: range, rows_X: Tensor, fit: Fit, rank: int | None = None
) -> Spectrum:
    root_HH = torch.linalg.cholesky(population.covariance(group, fit.ridge_in)).to(_work(dense))
    stack = (_input_factor(dense, population, expert, rows_X, root_HH, fit) for expert in group)
    spectrum = principal(stack, len(group) * len(rows_X), dense.spec.hidden, rank=rank)
    if spectrum.vectors_HR is None:
        return spectrum
    basis_HR = torch.linalg.solve_triangular(root_HH.double().T, spectrum.vectors_HR, upper=True)
    return Spectrum(spectrum.energy_M, basis_HR)


def _fit_input(
    dense: DenseExperts,
    population: Population,
    packed: Packed,
    group: range,
    rows_X: Tensor,
    names: tuple[str, str],
    fit: Fit,
) -> None:
    """Basis of one input group, then the cores of its experts."""
    shape = packed.shape
    spectrum = _input_spectrum(dense, population, group, rows_X, fit, rank=shape.rank_in)
    assert spectrum.vectors_HR is not None
    b_RH = packed.set_basis(names[0], group.start // shape.input_group, spectrum.vectors_HR.T)
    prior_HR = population.covariance(range(dense.spec.num_experts), fit.ridge_in).to(b_RH.dtype) @ b_RH.T
    for expert in group:
        w_XH = dense.w_in_EJH[expert].to(_work(dense))[rows_X.to(b_RH.device)]
        own_HR = population.projected(expert, b_RH, prior_HR, fit.ridge_in) if fit.cores else prior_HR
        packed.core(names[1], expert).copy_(refit_core(w_XH, b_RH, own_HR))


def _output_factor(
    dense: DenseExperts, population: Population, expert: int, fit: Fit, packed: Packed | None = None
) -> tuple[Tensor, Tensor]:
    """Second projection [H,I] of one expert, and its outputs' factor [I,H]: rows W Q^{1/2} of `basis`, transposed.

    With `packed` (its input side fitted) the projection is refitted to the compressed intermediates, whose moments are Q.
    """
    w_HI = dense.w_out_EHI[expert].to(_work(dense))
    sample = population.sample(expert, dense.spec.intermediate)
    if sample is None:
        gram_II = torch.eye(dense.spec.intermediate, dtype=torch.float64, device=w_HI.device)
    else:
        x_NH, p_N = sample[0].to(w_HI.dtype), sample[1]
        z_NI = dense.intermediate(expert, x_NH)
        if packed is not None:
            bias_J = None if dense.bias_in_EJ is None else dense.bias_in_EJ[expert]
            own_NI = dense.activate(packed.intermediate(expert, x_NH, bias_J))
            gram_II = cross(own_NI, own_NI, p_N)
            if fit.down:
                w_HI = refit_down(w_HI, cross(z_NI, own_NI, p_N), gram_II, fit.ridge_out).to(w_HI.dtype)
        else:
            gram_II = cross(z_NI, z_NI, p_N)
    root_II = torch.linalg.cholesky(ridged(gram_II, fit.ridge_out)).to(w_HI.dtype)
    return w_HI, (w_HI @ root_II).T * population.weight(expert) ** 0.5


def _fit_output(dense: DenseExperts, population: Population, packed: Packed, group: range, fit: Fit) -> None:
    """Second projections refitted to the compressed intermediates, then one output group's basis and cores."""
    spec, rank = dense.spec, packed.shape.rank_out
    refitted: dict[int, Tensor] = {}

    def factors() -> Iterator[Tensor]:
        for expert in group:
            refitted[expert], factor_IH = _output_factor(dense, population, expert, fit, packed)
            yield factor_IH

    if rank is None:
        for _, expert in zip(factors(), group, strict=True):
            packed.core("down", expert).copy_(refitted[expert])
        return
    spectrum = principal(factors(), len(group) * spec.intermediate, spec.hidden, rank=rank)
    assert spectrum.vectors_HR is not None
    b_RH = packed.set_basis("decode", group.start // packed.shape.output_group, spectrum.vectors_HR.T)
    for expert in group:
        packed.core("down", expert).copy_(project(refitted[expert].T, b_RH).T)


def _fit_combined_output(dense: DenseExperts, population: Calibrated, packed: Packed, fit: Fit) -> None:
    """One output basis for the layer: principal subspace of the routed, summed outputs, cross terms between experts included.

    For any orthonormal basis D the error of the whole block is then exactly E|(I - D D^T) sum_k g_k y_k|^2 / |h|^2.
    """
    spec, rank = dense.spec, packed.shape.rank_out
    assert rank is not None
    y_TH = torch.zeros(population.x_TH.shape, dtype=_work(dense), device=dense.w_in_EJH.device)
    refitted: list[Tensor] = []
    for expert in range(spec.num_experts):
        w_HI, _ = _output_factor(dense, population, expert, fit, packed)
        refitted.append(w_HI)
        tokens_N, slots_N = population.slots(expert)
        bias_J = None if dense.bias_in_EJ is None else dense.bias_in_EJ[expert]
        z_NI = dense.activate(packed.intermediate(expert, population.inputs(tokens_N).to(w_HI.dtype), bias_J))
        gate_N1 = population.gate_TK.reshape(-1)[slots_N, None].to(y_TH)
        y_TH.index_add_(0, tokens_N.to(y_TH.device), (z_NI @ w_HI.T) * gate_N1)
    y_TH *= (population.token_T.to(y_TH) / len(y_TH)).sqrt()[:, None]
    spectrum = principal([y_TH], len(y_TH), spec.hidden, rank=rank)
    assert spectrum.vectors_HR is not None
    b_RH = packed.set_basis("decode", 0, spectrum.vectors_HR.T)
    for expert in range(spec.num_experts):
        packed.core("down", expert).copy_(project(refitted[expert].T, b_RH).T)


def layer_error(dense: DenseExperts, tensors: dict[str, Tensor], shape: LatentShape, samples: Calibrated) -> LayerError:
    """Difference of the routed outputs, dense against latent, on `samples`."""
    packed = Packed(dense.spec, shape, tensors)
    work = _work(dense)
    exact_TH = torch.zeros(samples.x_TH.shape, dtype=work, device=dense.w_in_EJH.device)
    change_TH = torch.zeros_like(exact_TH)
    for expert in range(dense.spec.num_experts):
        tokens_N, slots_N = samples.slots(expert)
        x_NH = samples.inputs(tokens_N).to(work)
        gate_N1 = samples.gate_TK.reshape(-1)[slots_N, None].to(x_NH)
        tokens_N = tokens_N.to(x_NH.device)
        bias_J = None if dense.bias_in_EJ is None else dense.bias_in_EJ[expert]
        y_NH = dense.intermediate(expert, x_NH) @ dense.w_out_EHI[expert].to(work).T
        latent_NH = packed.output(expert, dense.activate(packed.intermediate(expert, x_NH, bias_J)))
        change_TH.index_add_(0, tokens_N, (latent_NH - y_NH) * gate_N1)
        if dense.bias_out_EH is not None:
            y_NH = y_NH + dense.bias_out_EH[expert].to(work)
        exact_TH.index_add_(0, tokens_N, y_NH * gate_N1)
    change_T, exact_T = change_TH.double().square().sum(1), exact_TH.double().square().sum(1)
    relative = float(change_T.sum() / exact_T.sum().clamp_min(1e-300))
    return LayerError(float((change_T * samples.token_T.to(change_T)).mean()), relative, len(change_T))
