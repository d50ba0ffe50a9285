"""Ranks: what an experts module can be stored as, and which of it a budget buys.

Ranks are chosen by projection ("side"). Where there are spectra, `spectral` chooses them; `uniform` needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch

from molae_compress.errors import RecipeError
from molae_compress.operations import dense_multiply_adds, multiply_adds
from molae_compress.recipe import Recipe
from molae_compress.solver.allocate import Curve
from molae_compress.tensors import PIVOT_DTYPE, AnyShape, ExpertsSpec, Form, LatentShape

KERNEL_STEP = 8  # ranks of the layer form are rows of the stock grouped kernels, which take multiples of 16 bytes
ENGINE_STEP = 64  # engines pad ranks of the layer form with zeros to multiples of it
_BANKS = 4  # few enough for kernels, and most of what a rank for every expert would give
_STEPS = 32  # an automatic alignment leaves at least this many ranks to choose from
_FEW = 8  # but ranks that engines need not pad are worth coarser steps
_SHARE = 8  # of a price on operations: up to it the share that every side keeps rises with the price, so as to spend all


def tries_pairs(recipe: Recipe, spec: ExpertsSpec) -> tuple[bool, bool]:
    """Whether measured spectra are to say if two experts of a module share a basis, or each has its own: input, output.

    Output bases only where all experts have one rank: banks of experts that need about the same are worth more.
    """
    shape, basis = template(recipe, spec), recipe.basis
    alone = basis.experts_per_input_group == "auto" and shape.input_group == shape.output_group == 1
    inputs = recipe.budget.allocate == "spectrum" and alone and spec.num_experts % 2 == 0 and spec.num_experts > 2
    free = basis.experts_per_output_group == "auto" and shape.rank_out is not None
    return inputs, inputs and free and bank_count(recipe) == 1


def bank_count(recipe: Recipe) -> int:
    """Banks that a layer may have at most."""
    banks = recipe.budget.banks
    return _BANKS if banks == "auto" else int(banks)


def has_clusters(recipe: Recipe) -> bool:
    """Whether groups are of experts that are alike: those are found with the spectra, whatever the budget."""
    return recipe.basis.cluster and recipe.budget.allocate == "spectrum"


def template(recipe: Recipe, spec: ExpertsSpec, groups: tuple[int, int] | None = None) -> LatentShape:
    """Form, groups, branches and storage that a recipe means for a module; its ranks are placeholders.

    Args:
        groups: experts to an input and to an output basis, where measurement has chosen them.

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
    paper = max(size for size in range(1, 5) if spec.num_experts % size == 0)
    auto_in = spec.num_experts if serving else paper if recipe.method == "paper" else 1
    auto_out = spec.num_experts if serving or basis.output == "combined" else 1
    storage = basis.storage
    if storage == "auto":
        storage = "orthonormal" if serving or recipe.method == "paper" else "interpolative"
    return LatentShape(
        form="layer" if serving else "grouped",
        rank_in=1,
        rank_out=None if basis.down == "dense" else 1,
        input_group=groups[0] if groups else _group(basis.experts_per_input_group, auto_in, "input", spec),
        output_group=groups[1] if groups else _group(basis.experts_per_output_group, auto_out, "output", spec),
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


def _automatic(form: Form, hidden: int) -> int:
    """What ranks are multiples of with `budget.align: auto`."""
    if form == "grouped":
        return next((align for align in (8, 4, 2) if hidden >= _STEPS * align), 1)
    if hidden < _FEW * ENGINE_STEP:
        return KERNEL_STEP
    return 2 * ENGINE_STEP if hidden >= _STEPS * 2 * ENGINE_STEP else ENGINE_STEP


def _ranks(recipe: Recipe, spec: ExpertsSpec, shape: LatentShape) -> tuple[list[int], list[int]]:
    """Ranks that may be chosen on either side: multiples of the alignment, up to what holds any weights."""
    align, least = recipe.budget.align, KERNEL_STEP if shape.form == "layer" else 1
    if align == "auto":
        align = _automatic(shape.form, spec.hidden)
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


def _index_sizes(spec: ExpertsSpec, shape: LatentShape) -> tuple[int, int]:
    """Column indices of either side at the ranks that hold any weights."""
    sizes = [0, 0]
    for name, size in ranked(shape, *full_ranks(spec, shape)).tensors(spec).items():
        if name.endswith(".pivots"):
            sizes[name.startswith("decode.")] += torch.Size(size).numel()
    return sizes[0], sizes[1]


@dataclass(frozen=True)
class Side:
    """One projection (both of them in layer form) while its rank is being chosen.

    Attributes:
        ranks: to choose from, ascending.
        costs: of each of them, in numbers or in bytes.
        work: multiply-adds of each of them for one token.
        dense: what it costs uncompressed.
        dense_work: multiply-adds uncompressed, of the whole module's experts.
        slack: what the highest rank may cost beyond that.
    """

    ranks: tuple[int, ...]
    costs: tuple[int, ...]
    work: tuple[float, ...]
    dense: int
    dense_work: int
    slack: int = 0

    def at_share(self, share: float, price: float = 0.0) -> tuple[int, int] | None:
        """Highest rank within a share of the dense cost, and its cost; None if the lowest costs more already.

        To the share of the cost comes that of the operations, times `price`; with a price, the lowest rank is always
        affordable.
        """
        each = price * self.dense / self.dense_work
        triples = zip(self.ranks, self.costs, self.work, strict=True)
        affordable = [(rank, cost) for rank, cost, work in triples if cost + each * work <= share * self.dense]
        if price and not affordable:
            return self.ranks[0], self.costs[0]
        return affordable[-1] if affordable else None

    @cached_property
    def choices(self) -> tuple[int, ...]:
        """Indices of the ranks that cost less than the dense projection, and of the first in any case.

        The last may cost as much as that and its column indices: it holds any weights, so a projection that is worth its
        whole size keeps it.
        """
        count, last = max(1, sum(cost < self.dense for cost in self.costs)), len(self.costs) - 1
        whole = last >= count and self.costs[last] <= self.dense + self.slack
        return (*range(count), last) if whole else tuple(range(count))

    def curve(self, errors: Sequence[float]) -> Curve:
        """The ranks to choose from, with the error of each; `errors` has one for every rank."""
        ranks, costs = (tuple(each[k] for k in self.choices) for each in (self.ranks, self.costs))
        return Curve(ranks, costs, tuple(errors[k] for k in self.choices))


@dataclass(frozen=True)
class Module:
    """One experts module, or a bank of it, while ranks are being chosen.

    Attributes:
        spec: of the module; of a bank with as many experts as it has.
        shape: groups and storage.
        dtype: costs are bytes of tensors of this type; None counts numbers.
        fixed: what no rank changes.
        sides: input and output, or the one that stands for both.
        among: experts of the whole module.
    """

    spec: ExpertsSpec
    shape: LatentShape
    dtype: torch.dtype | None
    fixed: int
    sides: tuple[Side, ...]
    among: int

    @classmethod
    def of(
        cls, recipe: Recipe, spec: ExpertsSpec, dtype: torch.dtype | None, groups: tuple[int, int] | None = None
    ) -> Module:
        """A whole module; counts numbers, or bytes if `dtype` is given. `groups` as in `template`."""
        shape = template(recipe, spec, groups)
        return cls.with_ranks(spec, shape, dtype, *_ranks(recipe, spec, shape), spec.num_experts)

    def with_experts(self, count: int) -> Module:
        """A bank with some of the experts."""
        if count == self.spec.num_experts:
            return self
        spec = replace(self.spec, num_experts=count, name="", layer=0)  # so that layers share them
        return _bank(spec, self.shape, self.dtype, self.sides[0].ranks, self.sides[-1].ranks, self.among)

    @classmethod
    def with_ranks(
        cls,
        spec: ExpertsSpec,
        shape: LatentShape,
        dtype: torch.dtype | None,
        ranks_in: Sequence[int],
        ranks_out: Sequence[int],
        among: int,
    ) -> Module:
        """The same with ranks to choose from; a bank of a module with `among` experts."""
        costs = {rank: _sizes(spec, ranked(shape, rank, rank), dtype) for rank in {*ranks_in, *ranks_out}}
        work = {rank: [n / among for n in multiply_adds(spec, ranked(shape, rank, rank), among)] for rank in costs}
        dense_work = dense_multiply_adds(spec)
        stack = spec.num_experts * spec.hidden * (1 if dtype is None else dtype.itemsize)
        fixed, first, second = costs[ranks_in[0]][2], stack * spec.rows, stack * spec.intermediate
        if shape.form == "layer":
            sizes = tuple(sum(costs[rank][:2]) for rank in ranks_in)
            both = Side(tuple(ranks_in), sizes, tuple(sum(work[rank]) for rank in ranks_in), first + second, sum(dense_work))
            return cls(spec, shape, dtype, fixed, (both,), among)
        # Counted in bytes, a projection at its whole size may take more: the checkpoint may hold it in a wider type.
        indices, dense = _index_sizes(spec, shape) if dtype is None else (-1, -1), (first, second)
        sides = [
            Side(
                tuple(ranks),
                tuple(costs[rank][k] for rank in ranks),
                tuple(work[rank][k] for rank in ranks),
                dense[k],
                dense_work[k],
                indices[k],
            )
            for k, ranks in enumerate((ranks_in, ranks_out) if shape.rank_out is not None else (ranks_in,))
        ]
        return cls(spec, shape, dtype, fixed, tuple(sides), among)


@cache
def _bank(
    spec: ExpertsSpec,
    shape: LatentShape,
    dtype: torch.dtype | None,
    ranks_in: tuple[int, ...],
    ranks_out: tuple[int, ...],
    among: int,
) -> Module:
    return Module.with_ranks(spec, shape, dtype, ranks_in, ranks_out, among)


def ranked(shape: LatentShape, rank_in: int, rank_out: int | None = None) -> LatentShape:
    """The shape at these ranks; one rank is for both sides."""
    rank_out = rank_in if rank_out is None else rank_out
    return replace(shape, rank_in=rank_in, rank_out=None if shape.rank_out is None else rank_out)


def uniform(modules: Sequence[Module], amount: int, price: float = 0.0) -> list[AnyShape | None] | None:
    """The highest ranks at which every side keeps at most one common share of its dense size.

    Ranks come in steps, so the share that spends the budget lies a little above the budget's own; found by bisection.
    With a price on operations it is the share of size plus `price` times that of operations that is common to all sides.
    """
    low, high = 0.0, 1.0 + min(price, _SHARE)
    best: list[list[int]] | None = None
    for _ in range(30):
        share = (low + high) / 2
        pairs = [[side.at_share(share, price) for side in module.sides] for module in modules]
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


def smaller(spec: ExpertsSpec, shape: AnyShape) -> AnyShape | None:
    """The shape, or None where it would not be smaller than the dense module."""
    return shape if shape.numel(spec) < spec.dense_numel else None
