"""Ranks by measured spectra: one budget spent over all layers, sides and banks of experts, where the error falls most."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from molae_compress.operations import dense_multiply_adds
from molae_compress.ranks import Module, bank_count, ranked, smaller
from molae_compress.recipe import Recipe
from molae_compress.solver.allocate import Curve, allocate, bought, partition, tail_errors, tails_at
from molae_compress.solver.spectra import LayerSpectra
from molae_compress.tensors import AnyShape, BankedShape, LatentShape

# Of the input rank that all experts of a layer would share: for text that calibration did not hold, the more where the model
# writes none.
_LEAST = {True: 0.6, False: 0.75}


@dataclass(frozen=True)
class _Part:
    """Experts of one module that are to have the same ranks, and what each rank costs and loses on each side.

    Its experts are told by their places in the order of the spectra, in which groups are neighbours.
    """

    module: Module
    places: tuple[int, ...]
    curves: tuple[Curve, ...]

    def shape(self, picks: Sequence[int]) -> LatentShape:
        """The shape at the picked rank of every curve."""
        return ranked(self.module.shape, *(curve.ranks[pick] for curve, pick in zip(self.curves, picks, strict=True)))


@dataclass(frozen=True)
class _Allocation:
    """Shapes of some modules, and what the ranks of each cost and lose in all."""

    shapes: list[AnyShape | None]
    costs: list[int]
    errors: list[float]


def by_spectrum(
    recipe: Recipe, modules: Sequence[Module], spectra: Sequence[LayerSpectra], amount: int, price: float = 0.0
) -> list[AnyShape | None] | None:
    """Water-filling over all modules, banks and sides, every curve in one unit of error.

    Where spectra of pairs are known, the experts of a module share bases in pairs, on the side or sides where this would
    lose least for what the module gets without.
    With a price, operations count as errors do: all those of the dense experts as `price` times the whole energy.
    """
    rate = price and price * _energy(recipe, spectra) / sum(sum(dense_multiply_adds(module.spec)) for module in modules)
    as_they_are = list(zip(modules, spectra, strict=True))
    single = _allocated(recipe, as_they_are, amount, rate)
    if all(found.paired_E is None for found in spectra):
        return single.shapes if single is not None else None
    if single is None:  # bases of pairs are fewer
        shared = _allocated(recipe, [_in_pairs(recipe, *each)[-1] for each in as_they_are], amount, rate)
        return shared.shapes if shared is not None else None
    chosen: list[tuple[Module, LayerSpectra]] = []
    for each, cost, error in zip(as_they_are, single.costs, single.errors, strict=True):
        best, least = each, error
        for pairs in _in_pairs(recipe, *each)[1:]:
            shared = _allocated(recipe, [pairs], cost, rate)
            if shared is not None and shared.errors[0] < least:
                best, least = pairs, shared.errors[0]
        chosen.append(best)
    mixed = _allocated(recipe, chosen, amount, rate)
    return mixed.shapes if mixed is not None and sum(mixed.errors) < sum(single.errors) else single.shapes


def _in_pairs(recipe: Recipe, module: Module, spectra: LayerSpectra) -> list[tuple[Module, LayerSpectra]]:
    """The module as it is, and with two experts to a basis wherever spectra of pairs are known, on most sides last."""
    found = [(module, spectra)]
    if spectra.paired_E is not None:
        for inputs, outputs in ((True, False), (False, True), (True, True)):
            if not outputs or (spectra.paired_output_GM is not None and bank_count(recipe) == 1):
                sizes = (1 + inputs, 1 + outputs)
                paired = Module.of(recipe, module.spec, module.dtype, sizes)
                found.append((paired, spectra.in_pairs(inputs, outputs)))
    return found


def _allocated(
    recipe: Recipe, modules: Sequence[tuple[Module, LayerSpectra]], amount: int, rate: float
) -> _Allocation | None:
    """Ranks for modules with their groups and banks; None if the lowest cost too much."""
    layers = [[_part(recipe, module, found, range(module.spec.num_experts), rate)] for module, found in modules]
    if (banks := bank_count(recipe)) > 1:
        layers = _in_banks(recipe, modules, [part for (part,) in layers], banks, amount, rate)
    curves = [curve for parts in layers for part in parts for curve in part.curves]
    picks = allocate(curves, amount)
    if picks is None:
        return None
    chosen, shapes, costs, errors = iter(picks), [], [], []
    for (module, found), parts in zip(modules, layers, strict=True):
        taken = [[next(chosen) for _ in part.curves] for part in parts]
        shaped = [(part, part.shape(each)) for part, each in zip(parts, taken, strict=True)]
        shapes.append(_joined(module, shaped, found))
        flat = list(zip((curve for part in parts for curve in part.curves), chain(*taken), strict=True))
        costs.append(sum(curve.costs[k] for curve, k in flat))
        errors.append(sum(curve.errors[k] for curve, k in flat))
    return _Allocation(shapes, costs, errors)


def _in_banks(
    recipe: Recipe,
    modules: Sequence[tuple[Module, LayerSpectra]],
    whole: Sequence[_Part],
    banks: int,
    amount: int,
    rate: float,
) -> list[list[_Part]]:
    """The parts of every layer that are given ranks of their own: its banks, or the whole layer if the budget is too small.

    Units of experts (as many as share a basis on either side) are put together with those of their layer that would get
    ranks of about the same cost if each had ranks of its own. Input ranks stay near the one that the layer would have in
    one piece: an expert whose inputs look simple may be one for words that the calibration text does not hold.
    """
    shared = allocate([curve for part in whole for curve in part.curves], amount)
    if shared is None:
        return [[part] for part in whole]
    picks = iter(shared)
    taken = [[next(picks) for _ in part.curves] for part in whole]
    share = _LEAST[recipe.calibration is not None and recipe.calibration.writes]
    least = [share * part.curves[0].ranks[each[0]] for part, each in zip(whole, taken, strict=True)]
    tables = [table for each, low in zip(modules, least, strict=True) for table in _tables(recipe, *each, rate, low)]
    spent = bought(tables, amount)
    if spent is None:
        return [[part] for part in whole]
    per_side, layers = iter(spent), []
    for (module, found), low in zip(modules, least, strict=True):
        taken_U = sum((next(per_side) for _ in module.sides), torch.zeros(()))
        units = _units(module)
        together = [
            sorted(expert for unit in members for expert in units[unit]) for members in partition(taken_U.tolist(), banks)
        ]
        layers.append([_part(recipe, module, found, places, rate, low) for places in together])
    return layers


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


def _tables(recipe: Recipe, module: Module, spectra: LayerSpectra, rate: float, least: float) -> list[tuple[Tensor, Tensor]]:
    """For each side of a module, errors [U,R] of its units at each rank, and costs [R]; input ranks from `least` on."""
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
    for side, all_of, error_UR, low in zip(own.sides, module.sides, errors, (least, 0.0), strict=False):
        # as in the module: that a unit alone might be a bank, whose basis every token reads, is not known yet
        error_UR = error_UR + rate / len(units) * torch.tensor(all_of.work, dtype=error_UR.dtype)
        choices = torch.tensor([k for k in side.choices if side.ranks[k] >= low] or side.choices[-1:])
        tables.append((error_UR[:, choices], torch.tensor(side.costs, dtype=torch.float64)[choices]))
    return tables


def _part(
    recipe: Recipe,
    module: Module,
    spectra: LayerSpectra,
    places: Sequence[int],
    rate: float,
    least: float = 0.0,
) -> _Part:
    own = module.with_experts(len(places))
    groups_in = sorted({place // module.shape.input_group for place in places})
    groups_out = sorted({place // module.shape.output_group for place in places})
    found = LayerSpectra(
        tuple(part[groups_in] for part in spectra.input_GM), spectra.output_GM[groups_out], spectra.order_E[list(places)]
    )
    scales = unit_scales(recipe, spectra)
    errors = _errors(found, scales, own.sides[0].ranks, own.sides[-1].ranks)
    sides = [[a + b for a, b in zip(*errors, strict=True)]] if module.shape.form == "layer" else list(errors)
    curves = tuple(
        side.curve([error + rate * work for error, work in zip(lost, side.work, strict=True)]).from_rank(low)
        for side, lost, low in zip(own.sides, sides, (least, 0.0), strict=False)
    )
    return _Part(own, tuple(places), curves)


def _joined(module: Module, parts: Sequence[tuple[_Part, LatentShape]], spectra: LayerSpectra) -> AnyShape | None:
    """The shape of a whole module; banks of the same ranks become one."""
    members: dict[LatentShape, list[int]] = {}
    for part, shape in parts:
        members[shape] = sorted([*members.get(shape, ()), *part.places])
    order = spectra.order_E.tolist()
    if len(members) == 1 and order == sorted(order):
        return smaller(module.spec, next(iter(members)))
    banks = tuple(tuple(order[place] for place in places) for places in members.values())
    return smaller(module.spec, BankedShape(banks, tuple(members)))


def comparable(spectra: Mapping[str, LayerSpectra], unseen: Collection[str]) -> dict[str, LayerSpectra]:
    """Spectra in one unit: a module measured without data, in a run with data, counts as much as the average one."""

    def total(found: LayerSpectra) -> float:
        return float(sum(part.sum() for part in found.input_GM) + found.output_GM.sum())

    measured = [total(found) for name, found in spectra.items() if name not in unseen]
    scales = {name: sum(measured) / len(measured) / total(spectra[name]) for name in unseen if measured}
    return {name: found.scaled(scales[name]) if name in scales else found for name, found in spectra.items()}


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
