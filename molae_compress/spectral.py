"""Ranks by measured spectra: one budget spent over all layers, sides and banks of experts, where the error falls most."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molae_compress.operations import dense_multiply_adds
from molae_compress.ranks import Module, ranked, smaller
from molae_compress.recipe import Recipe
from molae_compress.solver.allocate import Curve, allocate, bought, partition, tail_errors, tails_at
from molae_compress.solver.layer import LayerSpectra
from molae_compress.tensors import AnyShape, BankedShape, LatentShape

_BANKS = 4  # few enough for kernels, and most of what a rank for every expert would give


@dataclass(frozen=True)
class _Part:
    """Experts of one module that are to have the same ranks, and what each rank costs and loses on each side."""

    module: Module
    experts: tuple[int, ...]
    curves: tuple[Curve, ...]

    def shape(self, picks: Sequence[int]) -> LatentShape:
        """The shape at the picked rank of every curve."""
        return ranked(self.module.shape, *(curve.ranks[pick] for curve, pick in zip(self.curves, picks, strict=True)))


def by_spectrum(
    recipe: Recipe, modules: Sequence[Module], spectra: Sequence[LayerSpectra], amount: int, price: float = 0.0
) -> list[AnyShape | None] | None:
    """Water-filling over all modules, banks and sides, every curve in one unit of error.

    Banks first: units of experts (as many as share a basis on either side) are put together with those of their layer that
    would get ranks of about the same cost if each had ranks of its own. A bank then is given ranks like a layer.
    With a price, operations count as errors do: all those of the dense experts as `price` times the whole energy.
    """
    pairs = list(zip(modules, spectra, strict=True))
    rate = price and price * _energy(recipe, spectra) / sum(sum(dense_multiply_adds(module.spec)) for module in modules)
    layers = [[_part(recipe, module, found, range(module.spec.num_experts), rate)] for module, found in pairs]
    if (banks := _bank_count(recipe)) > 1:
        tables = [table for module, found in pairs for table in _tables(recipe, module, found, rate)]
        if (spent := bought(tables, amount)) is not None:
            per_layer = iter(spent)
            for place, (module, found) in enumerate(pairs):
                taken_U = sum((next(per_layer) for _ in module.sides), torch.zeros(()))
                units = _units(module)
                for_bank = partition(taken_U.tolist(), banks)
                together = [sorted(expert for unit in members for expert in units[unit]) for members in for_bank]
                layers[place] = [_part(recipe, module, found, experts, rate) for experts in together]
    curves = [curve for parts in layers for part in parts for curve in part.curves]
    picks = allocate(curves, amount)
    if picks is None:
        return None
    chosen = iter(picks)
    return [
        _joined(module, [(part, part.shape([next(chosen) for _ in part.curves])) for part in parts])
        for module, parts in zip(modules, layers, strict=True)
    ]


def _bank_count(recipe: Recipe) -> int:
    """Banks that a layer may have at most."""
    banks = recipe.budget.banks
    return (_BANKS if recipe.calibration is not None else 1) if banks == "auto" else int(banks)


def _units(module: Module) -> list[range]:
    size = math.lcm(module.shape.input_group, module.shape.output_group if module.shape.rank_out is not None else 1)
    return [range(start, start + size) for start in range(0, module.spec.num_experts, size)]


def _energy(recipe: Recipe, spectra: Sequence[LayerSpectra]) -> float:
    """The error that nothing kept would leave."""
    scaled = [(found, unit_scales(recipe, found)) for found in spectra]
    return sum(
        scales[0] * sum(float(part.sum()) for part in found.input_GM) + scales[1] * float(found.output_GM.sum())
        for found, scales in scaled
    )


def _tables(recipe: Recipe, module: Module, spectra: LayerSpectra, rate: float) -> list[tuple[Tensor, Tensor]]:
    """For each side of a module, errors [U,R] of its units at each rank, and costs [R]."""
    units, scales = _units(module), unit_scales(recipe, spectra)
    own = module.with_experts(len(units[0]))
    sides: list[tuple[float, tuple[Tensor, ...]]] = [(scales[0], spectra.input_GM), (scales[1], (spectra.output_GM,))]
    parts = [
        [scale * tails_at(part, side.ranks).unflatten(0, (len(units), -1)).sum(1) for part in energies]
        for (scale, energies), side in zip(sides, (own.sides[0], own.sides[-1]), strict=True)
    ]
    errors = [torch.stack(part).sum(0) for part in parts]
    if module.shape.form == "layer":
        errors = [errors[0] + errors[1]]
    tables = []
    for side, all_of, error_UR in zip(own.sides, module.sides, errors, strict=False):
        # as in the module: that a unit alone might be a bank, whose basis every token reads, is not known yet
        error_UR = error_UR + rate / len(units) * torch.tensor(all_of.work, dtype=error_UR.dtype)
        choices = torch.tensor(side.choices)
        tables.append((error_UR[:, choices], torch.tensor(side.costs, dtype=torch.float64)[choices]))
    return tables


def _part(recipe: Recipe, module: Module, spectra: LayerSpectra, experts: Sequence[int], rate: float) -> _Part:
    own = module.with_experts(len(experts))
    groups_in = sorted({expert // module.shape.input_group for expert in experts})
    groups_out = sorted({expert // module.shape.output_group for expert in experts})
    found = LayerSpectra(tuple(part[groups_in] for part in spectra.input_GM), spectra.output_GM[groups_out])
    scales = unit_scales(recipe, spectra)
    errors = _errors(found, scales, own.sides[0].ranks, own.sides[-1].ranks)
    sides = [[a + b for a, b in zip(*errors, strict=True)]] if module.shape.form == "layer" else list(errors)
    curves = tuple(
        side.curve([error + rate * work for error, work in zip(lost, side.work, strict=True)])
        for side, lost in zip(own.sides, sides, strict=False)
    )
    return _Part(own, tuple(experts), curves)


def _joined(module: Module, parts: Sequence[tuple[_Part, LatentShape]]) -> AnyShape | None:
    """The shape of a whole module; banks of the same ranks become one."""
    members: dict[LatentShape, list[int]] = {}
    for part, shape in parts:
        members[shape] = sorted([*members.get(shape, ()), *part.experts])
    if len(members) == 1:
        return smaller(module.spec, next(iter(members)))
    return smaller(module.spec, BankedShape(tuple(tuple(experts) for experts in members.values()), tuple(members)))


def scaled(found: LayerSpectra, factor: float) -> LayerSpectra:
    """Spectra with every energy multiplied."""
    return LayerSpectra(tuple(part * factor for part in found.input_GM), found.output_GM * factor)


def comparable(spectra: Mapping[str, LayerSpectra], unseen: Collection[str]) -> dict[str, LayerSpectra]:
    """Spectra in one unit: a module measured without data, in a run with data, counts as much as the average one."""

    def total(found: LayerSpectra) -> float:
        return float(sum(part.sum() for part in found.input_GM) + found.output_GM.sum())

    measured = [total(found) for name, found in spectra.items() if name not in unseen]
    scales = {name: sum(measured) / len(measured) / total(spectra[name]) for name in unseen if measured}
    return {name: scaled(found, scales[name]) if name in scales else found for name, found in spectra.items()}


def unit_scales(recipe: Recipe, spectra: LayerSpectra) -> tuple[float, float]:
    """What turns the errors of both sides into one unit.

    Calibrated and two-sided, both already are the layer's err_h. An input-side error measured before the activation is
    not comparable, and without calibration neither are layers: then errors count relative to the layer's output.
    """
    output = float(spectra.output_GM.sum())
    scale = 1.0 if recipe.calibration is not None else 1.0 / max(output, 1e-300)
    if recipe.basis.metric == "input":
        return scale * output / max(sum(float(part.sum()) for part in spectra.input_GM), 1e-300), scale
    return scale, scale


def _errors(
    spectra: LayerSpectra, scales: tuple[float, float], ranks_in: Sequence[int], ranks_out: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Error of each rank on both sides."""
    parts = [tail_errors(part, ranks_in) for part in spectra.input_GM]
    return [scales[0] * sum(each) for each in zip(*parts, strict=True)], [
        scales[1] * error for error in tail_errors(spectra.output_GM, ranks_out)
    ]
