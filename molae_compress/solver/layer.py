"""One layer, both phases: dense experts and what is known of their inputs in, latent tensors out.

`measure_spectra` is what allocation needs before any rank is fixed; `solve_layer` is the fit at given ranks;
`layer_error` measures the result on tokens that took no part in the fit. All pure: tensors in, tensors out.
Products run in float32 (float64 for float64 weights) and are summed in float64, where the small problems are solved.
Tokens come in parts of a fixed number of rows, so that their number does not matter for memory.
Shape suffixes: N rows of one sample, X rows of one input branch; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molae_compress.solver.basis import Spectrum, Stack
from molae_compress.solver.moments import cholesky, cross, ridged
from molae_compress.solver.newton import InputSide, refined, sloped
from molae_compress.solver.packing import Packed, branch_rows
from molae_compress.solver.population import Calibrated, Population
from molae_compress.solver.refit import output_metric, refit_core, refit_down, right_inverse
from molae_compress.tensors import AnyShape, DenseExperts, LatentShape

# Experts of a group whose basis is refined with their cores: so many cores are in memory several times in float32.
_TOGETHER = 4
_BLOCK = 1024  # rows of a matrix of moments that are added to at a time


@dataclass(frozen=True)
class Fit:
    """How to fit; the defaults are what measured best (docs/how-it-works.md).

    Attributes:
        metric: `two-sided` weighs errors of the first projection by their effect on the expert's output, `input` does not.
        output: basis of the second projection from each `expert`'s outputs, or from the `combined` routed output of the
            experts that share it (needs calibration; without it the same as `expert`).
        cores: refit each expert's input cores on its own moments (phase 2), else on those of its group.
        down: refit the second projection on the compressed intermediates.
        newton: conjugate gradients of the step that refines the input side (`newton.refined`); 0 keeps the closed form.
        ridge_in: share of the identity in moments of many inputs of a flat spectrum (`Population.white`, `flatness`).
        ridge_out: the same of many intermediates, whatever their spectrum.
        ridge_metric: the same for the output metric.
    """

    metric: Literal["two-sided", "input"] = "two-sided"
    output: Literal["expert", "combined"] = "expert"
    cores: bool = True
    down: bool = True
    newton: int = 0
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
        err_h: mean over tokens of |dy|^2 / |h|^2, h the residual stream after the layer, as far as nothing lies between.
        relative: sum of |dy|^2 over sum of |y|^2.
        tokens: how many tokens were measured.
    """

    err_h: float
    relative: float
    tokens: int


@torch.no_grad()
def measure_spectra(dense: DenseExperts, population: Population, shape: LatentShape, fit: Fit) -> LayerSpectra:
    """Spectra of every group of both sides; `shape` gives groups and branches, its ranks are not used.

    Args:
        dense: weights of any float dtype, on the device of `population`.
        population: what is known of the experts' inputs.
        shape: groups and branches; group sizes divide the experts.
        fit: metric and ridges.

    Returns:
        energies [G, min(rows of a group, H)], float64, on the device of the weights.
    """
    E = dense.spec.num_experts
    inputs = [
        _input_spectra(dense, population, range(start, start + shape.input_group), shape, fit)[0]
        for start in range(0, E, shape.input_group)
    ]
    input_GM = tuple(torch.stack([spectrum.energy_M for spectrum in each]) for each in zip(*inputs, strict=True))
    outputs = []
    for start in range(0, E, shape.output_group):
        stack = Stack(shape.output_group * dense.spec.intermediate, dense.spec.hidden, None)
        for expert in range(start, start + shape.output_group):
            w_HI, gram_II = _second(dense, population, expert, fit)
            stack.add(w_HI.T, gram_II * population.weight(expert))
        outputs.append(stack.spectrum().energy_M)
    return LayerSpectra(input_GM, torch.stack(outputs))


@torch.no_grad()
def solve_layer(
    dense: DenseExperts, population: Population, shape: AnyShape, fit: Fit, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Fits one experts module in the given shape: phase 1 (bases) and phase 2 (cores) of both sides.

    Args:
        dense: weights of any float dtype, on the device of `population`.
        population: what is known of the experts' inputs.
        shape: form, ranks and groups, of one bank or several; group sizes divide the experts of a bank, ranks are at most H.
        fit: options of the fit.
        dtype: of the result; the closed form of cores is fitted to bases already rounded to it.

    Returns:
        tensors named and shaped as `shape.tensors(dense.spec)`, floats in `dtype`, on the device of the weights.
    """
    layer_HH = population.covariance(range(dense.spec.num_experts), fit.ridge_in).to(_work(dense))
    tensors: dict[str, Tensor] = {}
    for bank in shape.banks(dense.spec):
        packed = Packed.empty(bank, dtype, dense.w_in_EJH.device)
        for number, group in packed.groups(bank.shape.input_group):
            _fit_input(dense, population, packed, number, group, layer_HH, fit)
        for number, group in packed.groups(bank.shape.output_group):
            _fit_output(dense, population, packed, number, group, fit)
        if dense.bias_in_EJ is not None and dense.bias_out_EH is not None:
            packed.set_biases(dense.bias_in_EJ, dense.bias_out_EH)
        tensors |= {f"{bank.prefix}{name}": tensor for name, tensor in packed.tensors.items()}
    return tensors


def _work(dense: DenseExperts) -> torch.dtype:
    return torch.float64 if dense.w_in_EJH.dtype == torch.float64 else torch.float32


def _bias(dense: DenseExperts, expert: int) -> Tensor | None:
    return None if dense.bias_in_EJ is None else dense.bias_in_EJ[expert]


def _add_cross(sum_DF: Tensor, a_ND: Tensor, b_NF: Tensor, w_N: Tensor) -> None:
    """Adds `cross` in place, a block of rows at a time: next to wide moments there is no room for another such matrix."""
    for start in range(0, len(sum_DF), _BLOCK):
        rows = slice(start, start + _BLOCK)
        sum_DF[rows] += cross(a_ND[:, rows], b_NF, w_N)


def _metric(dense: DenseExperts, population: Population, expert: int, fit: Fit) -> Tensor:
    """[J,J]: `output_metric` of one expert; its slopes count as uncorrelated if nothing is known of the inputs."""
    spec, w_HI = dense.spec, dense.w_out_EHI[expert].to(_work(dense))
    sample = population.sample(expert, spec.rows)
    if sample is None:
        slope_JJ = torch.eye(spec.rows, dtype=w_HI.dtype, device=w_HI.device)
    else:
        sum_JJ = torch.zeros(spec.rows, spec.rows, dtype=torch.float64, device=w_HI.device)
        for x_NH, p_N in sample:
            slope_NJ = _slopes(dense, expert, x_NH.to(w_HI.dtype))
            _add_cross(sum_JJ, slope_NJ, slope_NJ, p_N)
        slope_JJ = sum_JJ.to(w_HI.dtype)
        del sum_JJ  # the largest matrix of all
    return output_metric(w_HI, slope_JJ, spec.channel_of_row().to(w_HI.device), fit.ridge_metric)


def _slopes(dense: DenseExperts, expert: int, x_NH: Tensor) -> Tensor:
    """[N,J] in the dtype of `x_NH`: slopes of the activation at one expert's first projection of some rows."""
    h_NJ = x_NH @ dense.w_in_EJH[expert].to(x_NH.dtype).T
    if dense.bias_in_EJ is not None:
        h_NJ += dense.bias_in_EJ[expert].to(x_NH.dtype)
    return sloped(dense, h_NJ)[1]


def _input_spectra(
    dense: DenseExperts, population: Population, group: Sequence[int], shape: LatentShape, fit: Fit, rank: int | None = None
) -> tuple[list[Spectrum], Tensor]:
    """For each branch of one input group the spectrum, with basis columns [H,R] if a rank is given; its covariance."""
    spec = dense.spec
    covariance_HH = population.covariance(group, fit.ridge_in)
    root_HH = cholesky(covariance_HH).to(_work(dense))
    branches = branch_rows(spec, shape, root_HH.device)
    stacked = len(group) * spec.rows // len(branches)
    stacks = [Stack(stacked, spec.hidden, rank) for _ in branches]
    late = stacked > 2 * spec.hidden  # one product with the root at the end costs less than one per expert
    for expert in group:
        w_JH = dense.w_in_EJH[expert].to(_work(dense))
        w_JH = w_JH if late else w_JH @ root_HH
        metric_JJ = _metric(dense, population, expert, fit) if fit.metric == "two-sided" else None
        weight = population.weight(expert)
        for stack, rows in zip(stacks, branches, strict=True):
            if metric_JJ is None:
                stack.add(w_JH[rows] * weight**0.5)
            else:
                stack.add(w_JH[rows], metric_JJ[rows][:, rows] * weight)
    spectra = []
    for stack in stacks:
        if late:
            stack.multiply(root_HH)
        spectrum = stack.spectrum()
        if spectrum.vectors_HR is not None:
            basis_HR = torch.linalg.solve_triangular(root_HH.double().T, spectrum.vectors_HR, upper=True)
            spectrum = Spectrum(spectrum.energy_M, basis_HR)
        spectra.append(spectrum)
    return spectra, covariance_HH


def _fit_input(
    dense: DenseExperts,
    population: Population,
    packed: Packed,
    number: int,
    group: Sequence[int],
    layer_HH: Tensor,
    fit: Fit,
) -> None:
    """Bases of one input group, then the cores of its experts; `layer_HH` is the layer's covariance."""
    shape, work = packed.shape, _work(dense)
    spectra, group_HH = _input_spectra(dense, population, group, shape, fit, shape.rank_in)
    branches, rows = shape.branches(), branch_rows(dense.spec, shape, layer_HH.device)
    bases, fixed = [], []  # what the cores of all experts are solved with
    for (stem, _), spectrum in zip(branches, spectra, strict=True):
        assert spectrum.vectors_HR is not None
        b_RH = packed.set_basis(stem, number, spectrum.vectors_HR.T).to(work)
        bases.append(b_RH)
        fixed.append((right_inverse(b_RH), (layer_HH if fit.cores else group_HH.to(work)) @ b_RH.T))

    def closed(expert: int) -> list[Tensor]:
        """The cores of an expert, for each branch."""
        found = []
        for rows_X, b_RH, (inverse_HR, prior_HR) in zip(rows, bases, fixed, strict=True):
            cb_HR = population.projected(expert, b_RH, prior_HR, fit.ridge_in) if fit.cores else prior_HR
            found.append(refit_core(dense.w_in_EJH[expert].to(work)[rows_X], b_RH, inverse_HR, cb_HR))
        return found

    white = population.white(group, dense.spec.hidden, fit.ridge_in * population.flatness)
    together = fit.newton > 0 and len(group) <= _TOGETHER
    for experts in [group] if together else [[expert] for expert in group]:
        side = InputSide(bases, [list(each) for each in zip(*(closed(expert) for expert in experts), strict=True)])
        if fit.newton:
            start, keep = side, not together
            side = refined(dense, population, experts, rows, start, group_HH, white, fit.newton, keep_bases=keep)
            side = side if side is start or keep else _stored(packed, number, side)
        for (_, core), each in zip(branches, side.cores, strict=True):
            for expert, a_XR in zip(experts, each, strict=True):
                packed.core(core, expert).copy_(a_XR)


def _stored(packed: Packed, number: int, side: InputSide) -> InputSide:
    """Stores the bases of a group; cores for them as they are stored."""
    bases, cores = [], []
    for (stem, _), b_RH, each in zip(packed.shape.branches(), side.bases, side.cores, strict=True):
        stored_RH = packed.set_basis(stem, number, b_RH).to(b_RH.dtype)
        back_RR = b_RH @ right_inverse(stored_RH)
        bases.append(stored_RH)
        cores.append([a_XR @ back_RR for a_XR in each])
    return InputSide(bases, cores)


def _second(
    dense: DenseExperts, population: Population, expert: int, fit: Fit, packed: Packed | None = None
) -> tuple[Tensor, Tensor]:
    """Second projection [H,I] of one expert and the moments [I,I] float64 of what it reads, shrunk by `ridge_out` and noise.

    With `packed` (its input side fitted) it reads the compressed intermediates, and is refitted to them.
    """
    w_HI = dense.w_out_EHI[expert].to(_work(dense))
    sample = population.sample(expert, dense.spec.intermediate)
    if sample is None:
        return w_HI, torch.eye(dense.spec.intermediate, dtype=torch.float64, device=w_HI.device)
    gram_II = torch.zeros(w_HI.shape[1], w_HI.shape[1], dtype=torch.float64, device=w_HI.device)
    target_II = torch.zeros_like(gram_II) if packed is not None and fit.down else None
    for rows_NH, p_N in sample:
        x_NH = rows_NH.to(w_HI.dtype)
        if packed is None:
            own_NI = dense.intermediate(expert, x_NH)
        else:
            own_NI = dense.activate(packed.intermediate(expert, x_NH, _bias(dense, expert)))
        _add_cross(gram_II, own_NI, own_NI, p_N)
        if target_II is not None:
            _add_cross(target_II, dense.intermediate(expert, x_NH), own_NI, p_N)
    ridge = population.white([expert], len(gram_II), fit.ridge_out)
    if target_II is not None:
        w_HI = refit_down(w_HI, target_II, gram_II, ridge)
    return w_HI, ridged(gram_II, ridge)


def _fit_output(
    dense: DenseExperts, population: Population, packed: Packed, number: int, group: Sequence[int], fit: Fit
) -> None:
    """Second projections refitted to the compressed intermediates, then one output group's basis and cores."""
    spec, rank = dense.spec, packed.shape.rank_out
    if rank is None:
        for expert in group:
            packed.core("down", expert).copy_(_second(dense, population, expert, fit, packed)[0])
        return
    second = {}
    if fit.output == "combined" and isinstance(population, Calibrated):
        second = {expert: _second(dense, population, expert, fit, packed)[0] for expert in group}
        stack = Stack(len(population.x_TH), spec.hidden, rank)
        stack.add(_routed_sum(dense, population, packed, second))
    else:
        stack = Stack(len(group) * spec.intermediate, spec.hidden, rank)
        for expert in group:
            second[expert], gram_II = _second(dense, population, expert, fit, packed)
            stack.add(second[expert].T, gram_II * population.weight(expert))
    vectors_HR = stack.spectrum().vectors_HR
    assert vectors_HR is not None
    b_RH = packed.set_basis("decode", number, vectors_HR.T).to(_work(dense))
    inverse_HR = right_inverse(b_RH)
    for expert in group:
        packed.core("down", expert).copy_(inverse_HR.T @ second[expert])


def _routed_sum(dense: DenseExperts, population: Calibrated, packed: Packed, second: dict[int, Tensor]) -> Tensor:
    """[T,H]: summed routed outputs of the experts in `second` from compressed intermediates, over |h| and sqrt(T).

    Cross terms between experts included: for any orthonormal output basis D the error of the whole group is then
    exactly E|(I - D D^T) sum_k g_k y_k|^2 / |h|^2.
    """
    y_TH = torch.zeros(population.x_TH.shape, dtype=_work(dense), device=dense.w_in_EJH.device)
    for expert, w_HI in second.items():
        for tokens_N, x_NH, gate_N in population.routed(expert):
            z_NI = dense.activate(packed.intermediate(expert, x_NH.to(w_HI.dtype), _bias(dense, expert)))
            y_TH.index_add_(0, tokens_N, (z_NI @ w_HI.T) * gate_N[:, None].to(y_TH))
    return y_TH.mul_((population.token_T.to(y_TH) / max(1, len(y_TH))).sqrt()[:, None])


@torch.no_grad()
def layer_error(dense: DenseExperts, tensors: dict[str, Tensor], shape: AnyShape, samples: Calibrated) -> LayerError:
    """Difference of the routed outputs, dense against latent, on `samples`; biases and `dense.after` included.

    Args:
        dense: weights, on the device of `samples`.
        tensors: the latent module, as `solve_layer` returns it.
        shape: the shape it was solved in.
        samples: tokens with their routing, best ones that took no part in the fit.
    """
    banks, work = Packed.all_of(dense.spec, shape, tensors), _work(dense)
    exact_TH = torch.zeros(samples.x_TH.shape, dtype=work, device=dense.w_in_EJH.device)
    change_TH = torch.zeros_like(exact_TH)
    for expert, packed in sorted(banks.items()):
        for tokens_N, rows_NH, gate_N in samples.routed(expert):
            x_NH, gate_N1 = rows_NH.to(work), gate_N[:, None].to(work)
            y_NH = dense.output(expert, dense.intermediate(expert, x_NH))
            latent_NH = packed.output(expert, dense.activate(packed.intermediate(expert, x_NH, _bias(dense, expert))))
            if dense.bias_out_EH is not None:
                latent_NH = latent_NH + dense.bias_out_EH[expert].to(work)
            if dense.after is not None:
                y_NH, latent_NH = dense.after(y_NH), dense.after(latent_NH)
            change_TH.index_add_(0, tokens_N, (latent_NH - y_NH) * gate_N1)
            exact_TH.index_add_(0, tokens_N, y_NH * gate_N1)
    change_T, exact_T = (
        torch.cat([part_NH.double().square().sum(1) for part_NH in y_TH.split(_BLOCK)]) for y_TH in (change_TH, exact_TH)
    )
    relative = float(change_T.sum() / exact_T.sum().clamp_min(1e-300))
    return LayerError(float((change_T * samples.token_T.to(change_T)).mean()), relative, len(change_T))
