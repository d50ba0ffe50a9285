"""One layer, both phases: dense experts and what is known of their inputs in, latent tensors out.

`solve_layer` is the fit at given ranks; `layer_error` measures the result on tokens that took no part in the fit.
All pure: tensors in, tensors out. Products run in float32 (float64 for float64 weights) and are summed in float64, where
the small problems are solved. Tokens come in parts of a fixed number of rows, so that their number does not matter for
memory. Shape suffixes: N rows of one sample, X rows of one input branch; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molae_compress.solver.basis import Stack
from molae_compress.solver.newton import InputSide, refined
from molae_compress.solver.packing import Packed, branch_rows
from molae_compress.solver.population import Calibrated, Population
from molae_compress.solver.refit import refit_core, right_inverse
from molae_compress.solver.spectra import BLOCK, Fit, bias_of, input_spectra, second, work_type
from molae_compress.tensors import AnyShape, DenseExperts

# Experts of a group whose basis is refined with their cores: so many cores are in memory several times in float32.
_TOGETHER = 4


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
    layer_HH = population.covariance(range(dense.spec.num_experts), fit.ridge_in).to(work_type(dense))
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
    shape, work = packed.shape, work_type(dense)
    spectra, group_HH = input_spectra(dense, population, group, shape, fit, shape.rank_in)
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

    white = population.white(group, fit.ridge_in)
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


def _fit_output(
    dense: DenseExperts, population: Population, packed: Packed, number: int, group: Sequence[int], fit: Fit
) -> None:
    """Second projections refitted to the compressed intermediates, then one output group's basis and cores."""
    spec, rank = dense.spec, packed.shape.rank_out
    if rank is None:
        for expert in group:
            packed.core("down", expert).copy_(second(dense, population, expert, fit, packed)[0])
        return
    refitted = {}
    if fit.output == "combined" and isinstance(population, Calibrated):
        refitted = {expert: second(dense, population, expert, fit, packed)[0] for expert in group}
        stack = Stack(len(population.x_TH), spec.hidden, rank)
        stack.add(_routed_sum(dense, population, packed, refitted))
    else:
        stack = Stack(len(group) * spec.intermediate, spec.hidden, rank)
        for expert in group:
            refitted[expert], gram_II = second(dense, population, expert, fit, packed)
            stack.add(refitted[expert].T, gram_II * population.weight(expert))
    vectors_HR = stack.spectrum().vectors_HR
    assert vectors_HR is not None
    b_RH = packed.set_basis("decode", number, vectors_HR.T).to(work_type(dense))
    inverse_HR = right_inverse(b_RH)
    for expert in group:
        packed.core("down", expert).copy_(inverse_HR.T @ refitted[expert])


def _routed_sum(dense: DenseExperts, population: Calibrated, packed: Packed, refitted: dict[int, Tensor]) -> Tensor:
    """[T,H]: summed routed outputs of the experts in `refitted` from compressed intermediates, over |h| and sqrt(T).

    Cross terms between experts included: for any orthonormal output basis D the error of the whole group is then
    exactly E|(I - D D^T) sum_k g_k y_k|^2 / |h|^2.
    """
    y_TH = torch.zeros(population.x_TH.shape, dtype=work_type(dense), device=dense.w_in_EJH.device)
    for expert, w_HI in refitted.items():
        for tokens_N, x_NH, gate_N in population.routed(expert):
            z_NI = dense.activate(packed.intermediate(expert, x_NH.to(w_HI.dtype), bias_of(dense, expert)))
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
    banks, work = Packed.all_of(dense.spec, shape, tensors), work_type(dense)
    exact_TH = torch.zeros(samples.x_TH.shape, dtype=work, device=dense.w_in_EJH.device)
    change_TH = torch.zeros_like(exact_TH)
    for expert, packed in sorted(banks.items()):
        for tokens_N, rows_NH, gate_N in samples.routed(expert):
            x_NH, gate_N1 = rows_NH.to(work), gate_N[:, None].to(work)
            y_NH = dense.output(expert, dense.intermediate(expert, x_NH))
            latent_NH = packed.output(expert, dense.activate(packed.intermediate(expert, x_NH, bias_of(dense, expert))))
            if dense.bias_out_EH is not None:
                latent_NH = latent_NH + dense.bias_out_EH[expert].to(work)
            if dense.after is not None:
                y_NH, latent_NH = dense.after(y_NH), dense.after(latent_NH)
            change_TH.index_add_(0, tokens_N, (latent_NH - y_NH) * gate_N1)
            exact_TH.index_add_(0, tokens_N, y_NH * gate_N1)
    change_T, exact_T = (
        torch.cat([part_NH.double().square().sum(1) for part_NH in y_TH.split(BLOCK)]) for y_TH in (change_TH, exact_TH)
    )
    relative = float(change_T.sum() / exact_T.sum().clamp_min(1e-300))
    return LayerError(float((change_T * samples.token_T.to(change_T)).mean()), relative, len(change_T))
