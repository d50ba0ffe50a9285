"""Phase 1 of one layer: how the error of each side falls with rank, before any rank is fixed.

`measure_spectra` is what allocation needs; `input_spectra` and `second` are the two sides of it, which the fit uses too.
All pure: tensors in, tensors out. Products run in float32 (float64 for float64 weights) and are summed in float64, where
the small problems are solved. Shape suffixes: N rows of one sample, X rows of one input branch; the rest as in
`molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from molae_compress.solver.basis import Spectrum, Stack
from molae_compress.solver.grouping import alike
from molae_compress.solver.moments import cholesky, cross, ridged
from molae_compress.solver.newton import sloped
from molae_compress.solver.packing import Packed, branch_rows
from molae_compress.solver.population import Population
from molae_compress.solver.refit import output_metric, refit_down
from molae_compress.tensors import DenseExperts, LatentShape

_METRIC_TOKENS = 16  # of an expert, in multiples of the sizes of its metric: more hardly change it
BLOCK = 1024  # rows of a matrix of moments that are added to at a time


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

    Attributes:
        input_GM: of each branch.
        output_GM: of the second projection.
        order_E: int64 experts in the order in which groups take them.
        paired_GM: of each branch with two experts to a basis; empty if nobody asked.
        paired_E: the order of experts in which pairs are neighbours.
        paired_output_GM: of the second projection with the same pairs to a basis; None if nobody asked.
    """

    input_GM: tuple[Tensor, ...]
    output_GM: Tensor
    order_E: Tensor
    paired_GM: tuple[Tensor, ...] = ()
    paired_E: Tensor | None = None
    paired_output_GM: Tensor | None = None

    @property
    def groups(self) -> tuple[int, int]:
        """Experts to an input basis, and to an output basis."""
        return len(self.order_E) // len(self.input_GM[0]), len(self.order_E) // len(self.output_GM)

    def scaled(self, factor: float) -> LayerSpectra:
        """With every energy multiplied."""
        single, pairs = (tuple(part * factor for part in parts) for parts in (self.input_GM, self.paired_GM))
        outputs = None if self.paired_output_GM is None else self.paired_output_GM * factor
        return LayerSpectra(single, self.output_GM * factor, self.order_E, pairs, self.paired_E, outputs)

    def in_pairs(self, inputs: bool, outputs: bool) -> LayerSpectra:
        """Those of pairs on some sides; the others follow their order."""
        assert self.paired_E is not None
        assert self.paired_output_GM is not None or not outputs
        input_GM = self.paired_GM if inputs else tuple(part_EM[self.paired_E] for part_EM in self.input_GM)
        output_GM = self.paired_output_GM if outputs else self.output_GM[self.paired_E]
        assert output_GM is not None
        return LayerSpectra(input_GM, output_GM, self.paired_E)

    def on_cpu(self) -> LayerSpectra:
        """The same where ranks are chosen."""
        return LayerSpectra.of_tensors(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, on the CPU."""
        branches = {
            f"{name}.{k}": part for name in ("input", "paired") for k, part in enumerate(getattr(self, f"{name}_GM"))
        }
        others = {
            "order": self.order_E,
            "pairs": self.paired_E,
            "output": self.output_GM,
            "paired_output": self.paired_output_GM,
        }
        return {name: part.cpu() for name, part in {**branches, **others}.items() if part is not None}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerSpectra:
        """The inverse of `tensors`."""
        single, pairs = (
            tuple(tensors[f"{side}.{k}"] for k in range(sum(name.startswith(f"{side}.") for name in tensors)))
            for side in ("input", "paired")
        )
        paired_E, outputs = tensors.get("pairs"), tensors.get("paired_output")
        return cls(single, tensors["output"], tensors["order"], pairs, paired_E, outputs)


@torch.no_grad()
def measure_spectra(
    dense: DenseExperts,
    population: Population,
    shape: LatentShape,
    fit: Fit,
    *,
    cluster: bool = False,
    pairs: bool = False,
    output_pairs: bool = False,
) -> LayerSpectra:
    """Spectra of every group of both sides; `shape` gives groups and branches, its ranks are not used.

    Args:
        dense: weights of any float dtype, on the device of `population`.
        population: what is known of the experts' inputs.
        shape: groups and branches; group sizes divide the experts.
        fit: metric and ridges.
        cluster: groups are of experts that are alike, instead of neighbours.
        pairs: measure the input side also with two experts to a basis; both groups of `shape` have one expert.
        output_pairs: with `pairs`, the output side too.

    Returns:
        energies [G, min(rows of a group, H)], float64, on the device of the weights.
    """
    E = dense.spec.num_experts

    def order_of(size: int) -> Sequence[int]:
        return alike(dense, population, size, fit.ridge_in) if cluster and 1 < size < E else range(E)

    # output groups follow the order of input groups, unless those are of one expert or of all
    order = order_of(shape.input_group if 1 < shape.input_group < E else shape.output_group)
    paired: Sequence[int] = order_of(2) if pairs else ()
    pairs_GM: tuple[Tensor, ...] = ()
    if pairs:
        input_GM, pairs_GM = _spectra_of_pairs(dense, population, paired, shape, fit)
    else:
        groups = _groups(order, shape.input_group)
        input_GM = _by_branch([input_spectra(dense, population, group, shape, fit)[0] for group in groups])
    output_GM = _output_spectra(dense, population, _groups(order, shape.output_group), fit)
    paired_E = torch.tensor(paired) if pairs else None
    paired_GM = _output_spectra(dense, population, _groups(paired, 2), fit) if pairs and output_pairs else None
    return LayerSpectra(input_GM, output_GM, torch.tensor(order), pairs_GM, paired_E, paired_GM)


def _output_spectra(dense: DenseExperts, population: Population, groups: Sequence[Sequence[int]], fit: Fit) -> Tensor:
    """[G,M]: of the second projections of each group of experts, all groups of one size."""
    spectra = []
    for group in groups:
        stack = Stack(len(group) * dense.spec.intermediate, dense.spec.hidden, None)
        for expert in group:
            w_HI, gram_II = second(dense, population, expert, fit)
            stack.add(w_HI.T, gram_II * population.weight(expert))
        spectra.append(stack.spectrum().energy_M)
    return torch.stack(spectra)


def _groups(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def _by_branch(found: Sequence[Sequence[Spectrum]]) -> tuple[Tensor, ...]:
    """[G,M] of each branch."""
    return tuple(torch.stack([spectrum.energy_M for spectrum in each]) for each in zip(*found, strict=True))


def _spectra_of_pairs(
    dense: DenseExperts, population: Population, order: Sequence[int], shape: LatentShape, fit: Fit
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Input spectra [G,M] of each branch, of single experts and of pairs that are neighbours in `order`.

    Together, because the metrics of a pair are those of its experts.
    """
    singles: dict[int, list[Spectrum]] = {}
    pairs = []
    for pair in _groups(order, 2):
        metrics = {expert: _metric(dense, population, expert, fit) for expert in pair if fit.metric == "two-sided"}
        for expert in pair:
            singles[expert] = input_spectra(dense, population, [expert], shape, fit, metrics=metrics)[0]
        pairs.append(input_spectra(dense, population, pair, shape, fit, metrics=metrics)[0])
    return _by_branch([singles[expert] for expert in range(len(singles))]), _by_branch(pairs)


def work_type(dense: DenseExperts) -> torch.dtype:
    """Of products."""
    return torch.float64 if dense.w_in_EJH.dtype == torch.float64 else torch.float32


def bias_of(dense: DenseExperts, expert: int) -> Tensor | None:
    """[J] of the first projection."""
    return None if dense.bias_in_EJ is None else dense.bias_in_EJ[expert]


def _add_cross(sum_DF: Tensor, a_ND: Tensor, b_NF: Tensor, w_N: Tensor) -> None:
    """Adds `cross` in place, a block of rows at a time: next to wide moments there is no room for another such matrix."""
    for start in range(0, len(sum_DF), BLOCK):
        rows = slice(start, start + BLOCK)
        sum_DF[rows] += cross(a_ND[:, rows], b_NF, w_N)


def _metric(dense: DenseExperts, population: Population, expert: int, fit: Fit) -> Tensor:
    """[J,J]: `output_metric` of one expert; its slopes count as uncorrelated if nothing is known of the inputs."""
    spec, w_HI = dense.spec, dense.w_out_EHI[expert].to(work_type(dense))
    sample = population.sample(expert, spec.rows, _METRIC_TOKENS * spec.rows)
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


def input_spectra(
    dense: DenseExperts,
    population: Population,
    group: Sequence[int],
    shape: LatentShape,
    fit: Fit,
    rank: int | None = None,
    metrics: Mapping[int, Tensor] = MappingProxyType({}),
) -> tuple[list[Spectrum], Tensor]:
    """For each branch of one input group the spectrum, with basis columns [H,R] if a rank is given; its covariance.

    `metrics` are those of experts for which they are known.
    """
    spec = dense.spec
    covariance_HH = population.covariance(group, fit.ridge_in)
    root_HH = cholesky(covariance_HH).to(work_type(dense))
    branches = branch_rows(spec, shape, root_HH.device)
    stacked = len(group) * spec.rows // len(branches)
    stacks = [Stack(stacked, spec.hidden, rank) for _ in branches]
    late = stacked > 2 * spec.hidden  # one product with the root at the end costs less than one per expert
    for expert in group:
        w_JH = dense.w_in_EJH[expert].to(work_type(dense))
        w_JH = w_JH if late else w_JH @ root_HH
        metric_JJ = metrics.get(expert)
        if metric_JJ is None and fit.metric == "two-sided":
            metric_JJ = _metric(dense, population, expert, fit)
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


def second(
    dense: DenseExperts, population: Population, expert: int, fit: Fit, packed: Packed | None = None
) -> tuple[Tensor, Tensor]:
    """Second projection [H,I] of one expert and the moments [I,I] float64 of what it reads, shrunk by `ridge_out` and noise.

    With `packed` (its input side fitted) it reads the compressed intermediates, and is refitted to them.
    """
    w_HI = dense.w_out_EHI[expert].to(work_type(dense))
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
            own_NI = dense.activate(packed.intermediate(expert, x_NH, bias_of(dense, expert)))
        _add_cross(gram_II, own_NI, own_NI, p_N)
        if target_II is not None:
            _add_cross(target_II, dense.intermediate(expert, x_NH), own_NI, p_N)
    ridge = population.white_inside(expert, len(gram_II), fit.ridge_out)
    if target_II is not None:
        w_HI = refit_down(w_HI, target_II, gram_II, ridge)
    return w_HI, ridged(gram_II, ridge)
