"""Prediction: the quality of a compressed model from spectra and probes, before anything is solved at its ranks.

Spectra tell how the error of a layer falls with rank. How large it really is (a refit lowers it, other text raises it), and
what the errors of all layers do to the predictions of the whole model, are measured at a few budgets and interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from molae_compress.budget import Shapes
from molae_compress.recipe import Recipe
from molae_compress.solver.allocate import tail_errors
from molae_compress.solver.spectra import LayerSpectra
from molae_compress.spectral import unit_scales
from molae_compress.tensors import AnyShape, ExpertsSpec

Point = tuple[float, float]
_STEEPEST = 1.5  # log perplexity for a unit of KL; more than that is the noise of few tokens
_LOG_MOST = 100.0


@dataclass(frozen=True)
class Prediction:
    """Quality that is expected of a compressed model on text like its calibration text.

    Attributes:
        err_h: sum over layers, as in a report.
        kl: mean divergence from the original's predictions, in nats per token.
        perplexity_ratio: perplexity, divided by that of the original.
        layers: err_h by module; none for modules that the model does not call for text.
    """

    err_h: float
    kl: float
    perplexity_ratio: float
    layers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A budget that could be asked for, and what it is expected to give.

    Attributes:
        keep: the budget.
        parameters: numbers in the routed experts after.
        artifact_bytes: tensor bytes of the result.
        prediction: its quality.
    """

    keep: float
    parameters: int
    artifact_bytes: int
    prediction: Prediction


@dataclass(frozen=True)
class Probe:
    """What was measured at one budget, on held-out calibration tokens.

    Attributes:
        spectral: error of each module by its spectra.
        err_h: as measured, of the modules that the model calls.
        kl: of the whole model with all modules compressed.
        log_perplexity: increase of the mean negative log likelihood.
    """

    spectral: Mapping[str, float]
    err_h: Mapping[str, float]
    kl: float
    log_perplexity: float


@dataclass(frozen=True)
class Forecast:
    """Predicts the quality at any ranks.

    Attributes:
        recipe: whose fit it is.
        specs: modules to compress.
        spectra: of all of them.
        probes: at two or more budgets.
    """

    recipe: Recipe
    specs: Sequence[ExpertsSpec]
    spectra: Mapping[str, LayerSpectra]
    probes: Sequence[Probe]

    def of(self, shapes: Shapes) -> Prediction:
        """What is expected of these shapes; modules that stay dense have no error."""
        layers = {spec.name: self._err_h(spec, shapes[spec.name]) for spec in self.specs if spec.name in self._seen}
        total = sum(layers.values())
        kl = power_law([(sum(probe.err_h.values()), probe.kl) for probe in self.probes], total)
        return Prediction(total, kl, math.exp(min(self._log_perplexity * kl, _LOG_MOST)), layers)

    def _err_h(self, spec: ExpertsSpec, shape: AnyShape | None) -> float:
        spectral = spectral_error(self.recipe, spec, self.spectra[spec.name], shape)
        return power_law([(probe.spectral[spec.name], probe.err_h[spec.name]) for probe in self.probes], spectral)

    @property
    def _seen(self) -> set[str]:
        return set.intersection(*(set(probe.err_h) for probe in self.probes))

    @property
    def _log_perplexity(self) -> float:
        """Increase of the negative log likelihood for each unit of KL, by least squares: a small one is lost in noise."""
        squares = sum(probe.kl**2 for probe in self.probes)
        slope = sum(probe.kl * probe.log_perplexity for probe in self.probes) / squares if squares else 0.0
        return min(max(slope, 0.0), _STEEPEST)


def spectral_error(recipe: Recipe, spec: ExpertsSpec, spectra: LayerSpectra, shape: AnyShape | None) -> float:
    """The energies that the ranks of a shape leave out on both sides, summed; what water-filling counts."""
    if shape is None:
        return 0.0
    first = shape.banks(spec)[0].shape
    if (first.input_group, first.output_group) != spectra.groups:
        spectra = spectra.in_pairs(first.input_group == 2, first.output_group == 2)
    scales, total, place_E = unit_scales(recipe, spectra), 0.0, spectra.order_E.argsort().tolist()
    for bank in shape.banks(spec):
        groups_in = sorted({place_E[expert] // bank.shape.input_group for expert in bank.experts})
        groups_out = sorted({place_E[expert] // bank.shape.output_group for expert in bank.experts})
        total += scales[0] * sum(tail_errors(part[groups_in], [bank.shape.rank_in])[0] for part in spectra.input_GM)
        if bank.shape.rank_out is not None:
            total += scales[1] * tail_errors(spectra.output_GM[groups_out], [bank.shape.rank_out])[0]
    return total


def power_law(points: Sequence[Point], x: float) -> float:
    """The y at x on the lines through neighbouring points (x, y) in logarithms, the outer ones going on.

    Proportional to the largest point where points do not tell a slope: a figure is not positive, or all lie at one x.
    """
    if x <= 0:
        return 0.0
    known = sorted(point for point in points if all(0 < figure < math.inf for figure in point))
    if not known:
        return 0.0
    steps = [pair for pair in pairwise(known) if pair[0][0] < pair[1][0]]
    if not steps:
        return known[-1][1] / known[-1][0] * x
    (x0, y0), (x1, y1) = next((step for step in steps if x <= step[1][0]), steps[-1])
    return y0 * math.exp(math.log(y1 / y0) * math.log(x / x0) / math.log(x1 / x0))
