"""Ranks: what an experts module can be stored as, and which of it a budget buys.

Ranks are chosen by projection ("side"), and, where there are spectra, by bank: experts of a layer that need ranks of about
the same size share one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from molae_compress.errors import RecipeError
from molae_compress.recipe import Recipe
from molae_compress.solver.allocate import Curve, allocate, bought, partition, tail_errors, tails_at
from molae_compress.solver.layer import LayerSpectra
from molae_compress.tensors import PIVOT_DTYPE, AnyShape, BankedShape, ExpertsSpec, LatentShape

KERNEL_STEP = 8  # ranks of the layer form are rows of the stock grouped kernels, which take multiples of 16 bytes
_ALIGN = {"quality": 8, "serving": 64}
_STEPS = 32  # an automatic alignment leaves at least this many ranks to choose from
_BANKS = 4  # few enough for kernels, and most of what a rank for every expert would give


def template(recipe: Recipe, spec: ExpertsSpec) -> LatentShape:
    """Form, groups, branches and storage that a recipe means for a module; its ranks are placeholders.

    Raises:
        RecipeError: a group size that does not divide the experts, or a form the module cannot have.
    """
    basis = recipe.basis
    serving = basis.profile == "serving"
    if serving and spec.has_output_norm:
        raise RecipeError(
            f"`basis.profile: serving` is impossible for '{spec.name}': the model normalises the output of each expert.",
            why="The layer form sums experts before they are decoded.",
            remedy="Use `basis.profile: quality`.",
        )
    # with fewer rows than H, two experts can share a basis that costs hardly more than one of either alone
    few = 2 if spec.rows < spec.hidden and spec.num_experts % 2 == 0 else 1
    paper = max(size for size in range(1, 5) if spec.num_experts % size == 0)
    auto_in = spec.num_experts if serving else paper if recipe.method == "paper" else few
    auto_out = spec.num_experts if serving or basis.output == "combined" else 1
    storage = basis.storage
    if storage == "auto":
        storage = "orthonormal" if serving or recipe.method == "paper" else "interpolative"
    return LatentShape(
        form="layer" if serving else "grouped",
        rank_in=1,
        rank_out=None if basis.down == "dense" else 1,
        input_group=_group(basis.experts_per_input_group, auto_in, "input", spec),
        output_group=_group(basis.experts_per_output_group, auto_out, "output", spec),
        gate_up="joint" if not spec.has_gate else basis.gate_up,
        storage=storage,
    )


def _group(asked: int | str, auto: int, side: str, spec: ExpertsSpec) -> int:
    size = auto if asked == "auto" else spec.num_experts if asked == "all" else int(asked)
    if spec.num_experts % size:
        divisors = [str(d) for d in range(1, spec.num_experts + 1) if spec.num_experts % d == 0]
        raise RecipeError(
            f"`basis.experts_per_{side}_group: {size}` does not divide the {spec.num_experts} experts of '{spec.name}'.",
            remedy=f"Use one of {', '.join(divisors)}.",
        )
    return size


def full_ranks(spec: ExpertsSpec, shape: LatentShape) -> tuple[int, int]:
    """Smallest ranks (input, output) at which the shape can hold any weights exactly."""
    rows = spec.rows if shape.gate_up == "joint" else spec.intermediate
    full_in = min(shape.input_group * rows, spec.hidden)
    full_out = min(shape.output_group * spec.intermediate, spec.hidden)
    return (spec.hidden, spec.hidden) if shape.form == "layer" else (full_in, full_out)


def _ranks(recipe: Recipe, spec: ExpertsSpec, shape: LatentShape) -> tuple[list[int], list[int]]:
    """Ranks that may be chosen on either side: multiples of the alignment, up to what holds any weights."""
    align, least = recipe.budget.align, KERNEL_STEP if shape.form == "layer" else 1
    if align == "auto":
        align = _ALIGN[recipe.basis.profile]
        while align > least and spec.hidden < _STEPS * align:
            align //= 2
    if align % least:
        raise RecipeError(
            f"`budget.align: {align}` does not suit the layer form.",
            why=f"Its ranks must be multiples of {least} for the fused kernels that run it.",
            remedy=f"Use a multiple of {least}, or `auto`.",
        )
    full_in, full_out = full_ranks(spec, shape)
    return list(range(align, full_in + 1, align)) or [full_in], list(range(align, full_out + 1, align)) or [full_out]


def _sizes(spec: ExpertsSpec, shape: LatentShape, dtype: torch.dtype | None) -> tuple[int, int, int]:
    """Stored size of the input side, of the output side, and of what no rank changes; in numbers, or bytes of `dtype`."""
    sides = [0, 0, 0]
    for name, size in shape.tensors(spec).items():
        amount = torch.Size(size).numel()
        if dtype is not None:
            amount *= (PIVOT_DTYPE if name.endswith(".pivots") else dtype).itemsize
        output = name.startswith(("decode.", "core.down"))
        fixed = "bias" in name or (output and shape.rank_out is None)
        sides[2 if fixed else 1 if output else 0] += amount
    return sides[0], sides[1], sides[2]


def _index_sizes(spec: ExpertsSpec, shape: LatentShape, dtype: torch.dtype | None) -> tuple[int, int]:
    """Stored size of the column indices of either side at the ranks that hold any weights."""
    sizes = [0, 0]
    for name, size in ranked(shape, *full_ranks(spec, shape)).tensors(spec).items():
        if name.endswith(".pivots"):
            each = 1 if dtype is None else PIVOT_DTYPE.itemsize
            sizes[name.startswith("decode.")] += torch.Size(size).numel() * each
    return sizes[0], sizes[1]


@dataclass(frozen=True)
class Side:
    """One projection (both of them in layer form) while its rank is being chosen.

    Attributes:
        ranks: to choose from, ascending.
        costs: of each of them, in numbers or in bytes.
        dense: what it costs uncompressed.
        slack: what the highest rank may cost beyond that.
    """

    ranks: tuple[int, ...]
    costs: tuple[int, ...]
    dense: int
    slack: int = 0

    def at_share(self, share: float) -> tuple[int, int] | None:
        """Highest rank within a share of the dense cost, and its cost; None if the lowest costs more already."""
        affordable = [pair for pair in zip(self.ranks, self.costs, strict=True) if pair[1] <= share * self.dense]
        return affordable[-1] if affordable else None

    def curve(self, errors: Sequence[float]) -> Curve:
        """The ranks that cost less than the dense projection, and the first of them in any case.

        The last may cost as much as that and its column indices: it holds any weights, so a projection that is worth its
        whole size keeps it.
        """
        count = max(1, sum(cost < self.dense for cost in self.costs))
        count += count + 1 == len(self.costs) and self.costs[-1] <= self.dense + self.slack
        return Curve(self.ranks[:count], self.costs[:count], tuple(errors[:count]))


@dataclass(frozen=True)
class Module:
    """One experts module, or a bank of it, while ranks are being chosen.

    Attributes:
        spec: of the module; of a bank with as many experts as it has.
        shape: groups and storage.
        dtype: costs are bytes of tensors of this type; None counts numbers.
        fixed: what no rank changes.
        sides: input and output, or the one that stands for both.
    """

    spec: ExpertsSpec
    shape: LatentShape
    dtype: torch.dtype | None
    fixed: int
    sides: tuple[Side, ...]

    @classmethod
    def of(cls, recipe: Recipe, spec: ExpertsSpec, dtype: torch.dtype | None) -> Module:
        """A whole module; counts numbers, or bytes if `dtype` is given."""
        shape = template(recipe, spec)
        return cls.with_ranks(spec, shape, dtype, *_ranks(recipe, spec, shape))

    def with_experts(self, count: int) -> Module:
        """A bank with some of the experts."""
        if count == self.spec.num_experts:
            return self
        spec = replace(self.spec, num_experts=count, name="", layer=0)  # so that layers share them
        return _bank(spec, self.shape, self.dtype, self.sides[0].ranks, self.sides[-1].ranks)

    @classmethod
    def with_ranks(
        cls,
        spec: ExpertsSpec,
        shape: LatentShape,
        dtype: torch.dtype | None,
        ranks_in: Sequence[int],
        ranks_out: Sequence[int],
    ) -> Module:
        """The same with ranks to choose from."""
        costs = {rank: _sizes(spec, ranked(shape, rank, rank), dtype) for rank in {*ranks_in, *ranks_out}}
        stack = spec.num_experts * spec.hidden * (1 if dtype is None else dtype.itemsize)
        fixed, first, second = costs[ranks_in[0]][2], stack * spec.rows, stack * spec.intermediate
        if shape.form == "layer":
            both = Side(tuple(ranks_in), tuple(sum(costs[rank][:2]) for rank in ranks_in), first + second)
            return cls(spec, shape, dtype, fixed, (both,))
        indices = _index_sizes(spec, shape, dtype)
        sides = [Side(tuple(ranks_in), tuple(costs[rank][0] for rank in ranks_in), first, indices[0])]
        if shape.rank_out is not None:
            sides.append(Side(tuple(ranks_out), tuple(costs[rank][1] for rank in ranks_out), second, indices[1]))
        return cls(spec, shape, dtype, fixed, tuple(sides))


@cache
def _bank(
    spec: ExpertsSpec, shape: LatentShape, dtype: torch.dtype | None, ranks_in: tuple[int, ...], ranks_out: tuple[int, ...]
) -> Module:
    return Module.with_ranks(spec, shape, dtype, ranks_in, ranks_out)


def ranked(shape: LatentShape, rank_in: int, rank_out: int | None = None) -> LatentShape:
    """The shape at these ranks; one rank is for both sides."""
    rank_out = rank_in if rank_out is None else rank_out
    return replace(shape, rank_in=rank_in, rank_out=None if shape.rank_out is None else rank_out)


def uniform(modules: Sequence[Module], amount: int) -> list[AnyShape | None] | None:
    """The highest ranks at which every side keeps at most one common share of its dense size.

    Ranks come in steps, so the share that spends the budget lies a little above the budget's own; found by bisection.
    """
    low, high = 0.0, 1.0
    best: list[list[int]] | None = None
    for _ in range(30):
        share = (low + high) / 2
        pairs = [[side.at_share(share) for side in module.sides] for module in modules]
        found = [pair for sides in pairs for pair in sides if pair is not None]
        if sum(cost for _, cost in found) > amount:
            high = share
            continue
        low = share
        if len(found) == sum(len(sides) for sides in pairs):
            best = [[pair[0] for pair in sides if pair is not None] for sides in pairs]
    if best is None:
        return None
    return [smaller(module.spec, ranked(module.shape, *ranks)) for module, ranks in zip(modules, best, strict=True)]


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
    recipe: Recipe, modules: Sequence[Module], spectra: Sequence[LayerSpectra], amount: int
) -> list[AnyShape | None] | None:
    """Water-filling over all modules, banks and sides, every curve in one unit of error.

    Banks first: units of experts (as many as share a basis on either side) are put together with those of their layer that
    would get ranks of about the same cost if each had ranks of its own. A bank then is given ranks like a layer.
    """
    pairs = list(zip(modules, spectra, strict=True))
    layers = [[_part(recipe, module, found, range(module.spec.num_experts))] for module, found in pairs]
    if (banks := _bank_count(recipe)) > 1:
        tables = [table for module, found in pairs for table in _tables(recipe, module, found)]
        if (spent := bought(tables, amount)) is not None:
            per_layer = iter(spent)
            for place, (module, found) in enumerate(pairs):
                taken_U = sum((next(per_layer) for _ in module.sides), torch.zeros(()))
                units = _units(module)
                for_bank = partition(taken_U.tolist(), banks)
                together = [sorted(expert for unit in members for expert in units[unit]) for members in for_bank]
                layers[place] = [_part(recipe, module, found, experts) for experts in together]
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


def _tables(recipe: Recipe, module: Module, spectra: LayerSpectra) -> list[tuple[Tensor, Tensor]]:
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
    for side, error_UR in zip(own.sides, errors, strict=False):
        count = len(side.curve([0.0] * len(side.ranks)).costs)
        tables.append((error_UR[:, :count], torch.tensor(side.costs[:count], dtype=torch.float64)))
    return tables


def _part(recipe: Recipe, module: Module, spectra: LayerSpectra, experts: Sequence[int]) -> _Part:
    own = module.with_experts(len(experts))
    groups_in = sorted({expert // module.shape.input_group for expert in experts})
    groups_out = sorted({expert // module.shape.output_group for expert in experts})
    found = LayerSpectra(tuple(part[groups_in] for part in spectra.input_GM), spectra.output_GM[groups_out])
    scales = unit_scales(recipe, spectra)
    errors = _errors(found, scales, own.sides[0].ranks, own.sides[-1].ranks)
    if module.shape.form == "layer":
        curves: tuple[Curve, ...] = (own.sides[0].curve([a + b for a, b in zip(*errors, strict=True)]),)
    else:
        curves = tuple(side.curve(lost) for side, lost in zip(own.sides, errors, strict=False))
    return _Part(own, tuple(experts), curves)


def _joined(module: Module, parts: Sequence[tuple[_Part, LatentShape]]) -> AnyShape | None:
    """The shape of a whole module; banks of the same ranks become one."""
    members: dict[LatentShape, list[int]] = {}
    for part, shape in parts:
        members[shape] = sorted([*members.get(shape, ()), *part.experts])
    if len(members) == 1:
        return smaller(module.spec, next(iter(members)))
    return smaller(module.spec, BankedShape(tuple(tuple(experts) for experts in members.values()), tuple(members)))


def smaller(spec: ExpertsSpec, shape: AnyShape) -> AnyShape | None:
    """The shape, or None where it would not be smaller than the dense module."""
    return shape if shape.numel(spec) < spec.dense_numel else None


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
