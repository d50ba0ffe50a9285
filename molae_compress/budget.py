"""From a recipe's budget to a shape for every experts module: by measured spectra if there are any, else the same share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from molae_compress.errors import RecipeError, human_bytes
from molae_compress.recipe import Recipe
from molae_compress.recipe.files import format_size
from molae_compress.solver.allocate import Curve, allocate, tail_errors
from molae_compress.solver.layer import LayerSpectra
from molae_compress.tensors import PIVOT_DTYPE, ExpertsSpec, LatentShape

_ALIGN = {"quality": 8, "serving": 64}
_STEPS = 16  # an automatic alignment leaves at least this many ranks to choose from
_KERNEL_STEP = 8  # ranks of the layer form are rows of the stock grouped kernels, which take multiples of 16 bytes

Shapes = dict[str, LatentShape | None]  # module name -> shape, None where the layer stays dense


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
    even = 2 if spec.num_experts % 2 == 0 else 1
    paper = max(size for size in range(1, 5) if spec.num_experts % size == 0)
    auto_in = spec.num_experts if serving else paper if recipe.method == "paper" else even
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


@dataclass(frozen=True)
class _Side:
    """One projection (both of them in layer form) while its rank is being chosen.

    Attributes:
        ranks: to choose from, ascending.
        costs: of each of them, in numbers or in bytes.
        dense: what it costs uncompressed.
    """

    ranks: tuple[int, ...]
    costs: tuple[int, ...]
    dense: int

    def at_share(self, share: float) -> tuple[int, int] | None:
        """Highest rank within a share of the dense cost, and its cost; None if the lowest costs more already."""
        affordable = [pair for pair in zip(self.ranks, self.costs, strict=True) if pair[1] <= share * self.dense]
        return affordable[-1] if affordable else None

    def curve(self, errors: Sequence[float]) -> Curve:
        """The ranks that cost less than the dense projection, and the first of them in any case."""
        count = max(1, sum(cost < self.dense for cost in self.costs))
        return Curve(self.ranks[:count], self.costs[:count], tuple(errors[:count]))


@dataclass(frozen=True)
class _Module:
    """One experts module while ranks are being chosen: its sides (input and output, if they are chosen one by one)."""

    spec: ExpertsSpec
    shape: LatentShape
    fixed: int
    sides: tuple[_Side, ...]

    @classmethod
    def of(cls, recipe: Recipe, spec: ExpertsSpec, dtype: torch.dtype | None) -> _Module:
        """Counts numbers, or bytes if `dtype` is given."""
        shape = template(recipe, spec)
        ranks_in, ranks_out = _ranks(recipe, spec, shape)
        costs = {rank: _sizes(spec, _ranked(shape, rank, rank), dtype) for rank in {*ranks_in, *ranks_out}}
        stack = spec.num_experts * spec.hidden * (1 if dtype is None else dtype.itemsize)
        fixed, first, second = costs[ranks_in[0]][2], stack * spec.rows, stack * spec.intermediate
        if shape.form == "layer":
            both = _Side(tuple(ranks_in), tuple(sum(costs[rank][:2]) for rank in ranks_in), first + second)
            return cls(spec, shape, fixed, (both,))
        sides = [_Side(tuple(ranks_in), tuple(costs[rank][0] for rank in ranks_in), first)]
        if shape.rank_out is not None:
            sides.append(_Side(tuple(ranks_out), tuple(costs[rank][1] for rank in ranks_out), second))
        return cls(spec, shape, fixed, tuple(sides))

    def at(self, ranks: Sequence[int]) -> LatentShape | None:
        """The shape with one rank for each side; None where it would not be smaller than the dense module."""
        shape = _ranked(self.shape, ranks[0], ranks[-1])
        return shape if shape.numel(self.spec) < self.spec.dense_numel else None


def _ranked(shape: LatentShape, rank_in: int, rank_out: int) -> LatentShape:
    return replace(shape, rank_in=rank_in, rank_out=None if shape.rank_out is None else rank_out)


def shapes_for(
    recipe: Recipe,
    specs: Sequence[ExpertsSpec],
    *,
    dtypes: Mapping[str, torch.dtype],
    dense_bytes: Mapping[str, int],
    copied_bytes: int = 0,
    spectra: Mapping[str, LayerSpectra] | None = None,
) -> Shapes:
    """Ranks for every module under the recipe's budget.

    Args:
        specs: the modules to compress.
        dtypes: stored precision of the latent tensors, by module name.
        dense_bytes: what the modules take in the checkpoint, by name.
        copied_bytes: bytes of everything that is copied, for `budget.target_size`.
        spectra: measured energies by module; without them every module and side keeps the same share.

    Raises:
        RecipeError: a rank that does not fit or does not save anything, a budget too small for rank 1, or latent experts
            that take more bytes than the dense ones.
    """
    rank = recipe.budget.rank
    if rank is not None:
        shapes: Shapes = {spec.name: _fixed_rank(spec, template(recipe, spec), rank) for spec in specs}
    else:
        shapes = _within_budget(recipe, specs, dtypes, copied_bytes, spectra)
    latent = [spec for spec in specs if shapes[spec.name] is not None]
    before = sum(dense_bytes[spec.name] for spec in latent)
    after = sum(shape.nbytes(spec, dtypes[spec.name]) for spec in latent if (shape := shapes[spec.name]) is not None)
    if after > before and rank != "full":
        raise RecipeError(
            f"The compressed experts would take {human_bytes(after)}, more than the {human_bytes(before)} of the original.",
            why=f"`output.dtype: {recipe.output.dtype}` is wider than what the checkpoint holds."
            if recipe.output.dtype != "auto"
            else "The model shares weights between experts modules, which no latent form does.",
            remedy="Use `output.dtype: auto`, or a smaller budget.",
        )
    return shapes


def _within_budget(
    recipe: Recipe,
    specs: Sequence[ExpertsSpec],
    dtypes: Mapping[str, torch.dtype],
    copied_bytes: int,
    spectra: Mapping[str, LayerSpectra] | None,
) -> Shapes:
    """Ranks chosen under `budget.keep` or `budget.target_size`; see `shapes_for`."""
    budget = recipe.budget
    if budget.keep == 1.0:
        raise RecipeError(
            "`budget.keep: 1.0` leaves nothing to compress.",
            remedy="Give a share below 1, or `budget.rank: full` to change the form alone.",
        )
    in_bytes = budget.target_size is not None
    modules = [_Module.of(recipe, spec, dtypes[spec.name] if in_bytes else None) for spec in specs]
    dense = sum(spec.dense_numel for spec in specs)
    amount = budget.target_size - copied_bytes if budget.target_size is not None else int((budget.keep or 0.6) * dense)
    fixed = sum(module.fixed for module in modules)
    amount -= fixed
    if spectra is None or budget.allocate == "uniform":
        ranks = _uniform(modules, amount)
    else:
        ranks = _by_spectrum(recipe, modules, [spectra[spec.name] for spec in specs], amount)
    if ranks is None:
        sides = [side for module in modules for side in module.sides]
        least = fixed + sum(side.costs[0] for side in sides)
        asked = f"target_size: {format_size(budget.target_size)}" if budget.target_size else f"keep: {budget.keep}"
        needed = human_bytes(copied_bytes + least) if in_bytes else f"a share of {least / dense:.3f}"
        smaller = "lower `budget.align`, " if max(side.ranks[0] for side in sides) > 1 else ""
        raise RecipeError(
            f"`budget.{asked}` is too small: the lowest ranks need {needed}.",
            why="Copied tensors, biases and a down projection left dense count too." if amount <= 0 else "",
            remedy=f"Raise it, {smaller}or share bases over larger groups of experts.",
        )
    return {module.spec.name: module.at(chosen) for module, chosen in zip(modules, ranks, strict=True)}


def most_bytes(
    recipe: Recipe, specs: Sequence[ExpertsSpec], dtypes: Mapping[str, torch.dtype], copied_bytes: int
) -> int | None:
    """What latent experts may take under the budget, whatever their ranks; None if ranks are given."""
    budget = recipe.budget
    if budget.target_size is not None:
        return budget.target_size - copied_bytes
    if budget.keep is None:
        return None
    widths = [dtypes[spec.name].itemsize for spec in specs]
    pivots = 0
    for spec in specs:
        shape = template(recipe, spec)
        tensors = _ranked(shape, *full_ranks(spec, shape)).tensors(spec)
        pivots += sum(torch.Size(size).numel() for name, size in tensors.items() if name.endswith(".pivots"))
    numbers = int(budget.keep * sum(spec.dense_numel for spec in specs))
    return numbers * max(widths) + pivots * max(0, PIVOT_DTYPE.itemsize - min(widths))


def _fixed_rank(spec: ExpertsSpec, shape: LatentShape, rank: int | str) -> LatentShape:
    full_in, full_out = full_ranks(spec, shape)
    if rank == "full":
        return _ranked(shape, full_in, full_out)
    rank = int(rank)
    if shape.form == "layer" and rank % _KERNEL_STEP:
        raise RecipeError(
            f"`budget.rank: {rank}` does not suit the layer form.",
            why=f"Its ranks must be multiples of {_KERNEL_STEP} for the fused kernels that run it.",
            remedy=f"Use {rank - rank % _KERNEL_STEP or _KERNEL_STEP}, or `basis.profile: quality`.",
        )
    fixed = _ranked(shape, min(rank, full_in), min(rank, full_out))
    if rank > max(full_in, full_out) or fixed.numel(spec) >= spec.dense_numel:
        raise RecipeError(
            f"`budget.rank: {rank}` would make '{spec.name}' larger: {fixed.numel(spec):,} numbers instead of "
            f"{spec.dense_numel:,}, at most rank {full_in} on the input side and {full_out} on the output side.",
            remedy="Use a lower rank, or share bases over larger groups of experts.",
        )
    return fixed


def _ranks(recipe: Recipe, spec: ExpertsSpec, shape: LatentShape) -> tuple[list[int], list[int]]:
    """Ranks that may be chosen on either side: multiples of the alignment, up to what holds any weights."""
    align, least = recipe.budget.align, _KERNEL_STEP if shape.form == "layer" else 1
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


def _uniform(modules: Sequence[_Module], amount: int) -> list[list[int]] | None:
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
    return best


def _by_spectrum(
    recipe: Recipe, modules: Sequence[_Module], spectra: Sequence[LayerSpectra], amount: int
) -> list[list[int]] | None:
    """Water-filling over all modules and sides, every curve in one unit of error."""
    curves: list[Curve] = []
    for module, found in zip(modules, spectra, strict=True):
        errors = _errors(recipe, found, module.sides[0].ranks, module.sides[-1].ranks)
        if module.shape.form == "layer":
            curves.append(module.sides[0].curve([a + b for a, b in zip(*errors, strict=True)]))
        else:
            curves += [side.curve(lost) for side, lost in zip(module.sides, errors, strict=False)]
    picks = allocate(curves, amount)
    if picks is None:
        return None
    chosen = iter(curve.ranks[pick] for curve, pick in zip(curves, picks, strict=True))
    return [[next(chosen) for _ in module.sides] for module in modules]


def _errors(
    recipe: Recipe, spectra: LayerSpectra, ranks_in: Sequence[int], ranks_out: Sequence[int]
) -> tuple[Sequence[float], Sequence[float]]:
    """Error of each rank on both sides in one unit.

    Calibrated and two-sided, both already are the layer's err_h. An input-side error measured before the activation is
    not comparable, and without calibration neither are layers: then errors count relative to the layer's output.
    """
    output = float(spectra.output_GM.sum())
    scale_in = scale_out = 1.0
    if recipe.calibration is None:
        scale_in = scale_out = 1.0 / max(output, 1e-300)
    if recipe.basis.metric == "input":
        scale_in = scale_out * output / max(sum(float(part.sum()) for part in spectra.input_GM), 1e-300)
    parts = [tail_errors(part, ranks_in) for part in spectra.input_GM]
    return [scale_in * sum(each) for each in zip(*parts, strict=True)], [
        scale_out * error for error in tail_errors(spectra.output_GM, ranks_out)
    ]
