"""From a recipe's budget to a shape for every experts module: by measured spectra if there are any, else the same share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from molae_compress.errors import RecipeError, human_bytes
from molae_compress.operations import operations
from molae_compress.ranks import KERNEL_STEP, Module, full_ranks, ranked, template, uniform
from molae_compress.recipe import Recipe
from molae_compress.recipe.files import format_size
from molae_compress.solver.allocate import at_lowest_price
from molae_compress.solver.spectra import LayerSpectra
from molae_compress.spectral import by_spectrum
from molae_compress.tensors import PIVOT_DTYPE, AnyShape, ExpertsSpec, LatentShape

Shapes = dict[str, AnyShape | None]  # module name -> shape, None where the layer stays dense


def with_keep(recipe: Recipe, keep: float) -> Recipe:
    """The recipe with another budget, of which a share of the parameters remains."""
    changes = {"keep": keep, "rank": None, "target_size": None, "max_kl": None}
    return recipe.model_copy(update={"budget": recipe.budget.model_copy(update=changes)})


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
            that take more bytes than the dense ones, or more operations than `budget.max_flops` allows.
    """
    rank = recipe.budget.rank
    if rank is not None:
        shapes: Shapes = {spec.name: _fixed_rank(spec, template(recipe, spec), rank) for spec in specs}
        taken = _operations(specs, shapes)
        if not _within_cap(recipe, specs, shapes):
            raise RecipeError(
                f"`budget.rank: {rank}` takes {taken / _operations(specs):.3f} times the operations of the dense experts, "
                f"more than `budget.max_flops: {recipe.budget.max_flops}` allows.",
                why="Every expert of a token goes through the whole basis of its group.",
                remedy="Use a lower rank or smaller groups of experts, or leave `budget.max_flops` at `auto`, which only "
                "warns of it.",
            )
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
    modules = [Module.of(recipe, spec, dtypes[spec.name] if in_bytes else None) for spec in specs]
    dense = sum(spec.dense_numel for spec in specs)
    amount = budget.target_size - copied_bytes if budget.target_size is not None else int((budget.keep or 1.0) * dense)
    fixed = sum(module.fixed for module in modules)
    amount -= fixed

    def at_price(price: float) -> Shapes | None:
        """Shapes under the budget if operations have a price."""
        if spectra is None or budget.allocate == "uniform":
            found = uniform(modules, amount, price)
        else:
            found = by_spectrum(recipe, modules, [spectra[spec.name] for spec in specs], amount, price)
        return None if found is None else {spec.name: shape for spec, shape in zip(specs, found, strict=True)}

    shapes = at_price(0.0)
    if shapes is None:
        sides = [side for module in modules for side in module.sides]
        least = fixed + sum(side.costs[0] for side in sides)
        asked = f"target_size: {format_size(budget.target_size)}" if budget.target_size else f"keep: {budget.keep}"
        needed = human_bytes(copied_bytes + least) if in_bytes else f"a share of {least / dense:.3f}"
        step = max(side.ranks[0] for side in sides)
        smaller = f"set `budget.align` below {step}, " if step > 1 else ""
        raise RecipeError(
            f"`budget.{asked}` is too small: the lowest ranks need {needed}.",
            why="Copied tensors, biases and a down projection left dense count too." if amount <= 0 else "",
            remedy=f"Raise it, {smaller}or share bases over larger groups of experts.",
        )
    if _within_cap(recipe, specs, shapes):
        return shapes
    cheaper = at_lowest_price(at_price, lambda found: found is not None and _within_cap(recipe, specs, found))
    if cheaper is None:
        lowest = {module.spec.name: ranked(module.shape, *(side.ranks[0] for side in module.sides)) for module in modules}
        raise RecipeError(
            f"`budget.max_flops: {budget.max_flops}` is too small: the lowest ranks need a share of "
            f"{_operations(specs, lowest) / _operations(specs):.4f}.",
            why="A down projection left dense counts too." if recipe.basis.down == "dense" else "",
            remedy="Raise it, lower `budget.align`, or share bases over other groups of experts.",
        )
    return cheaper


def _operations(specs: Sequence[ExpertsSpec], shapes: Mapping[str, AnyShape | None] | None = None) -> int:
    """Of all modules for one token; dense without shapes."""
    return sum(operations(spec, (shapes or {}).get(spec.name)) for spec in specs)


def _within_cap(recipe: Recipe, specs: Sequence[ExpertsSpec], shapes: Shapes) -> bool:
    """Whether the shapes take no more operations than `budget.max_flops` allows."""
    cap = recipe.budget.max_flops
    if cap == "auto":
        cap = None if recipe.budget.rank is not None or recipe.method == "paper" else 1.0
    return cap is None or _operations(specs, shapes) <= cap * _operations(specs)


def most_bytes(
    recipe: Recipe, specs: Sequence[ExpertsSpec], dtypes: Mapping[str, torch.dtype], copied_bytes: int
) -> int | None:
    """What latent experts may take under the budget, whatever their ranks; None if ranks are given."""
    budget = recipe.budget
    if budget.target_size is not None:
        return budget.target_size - copied_bytes
    if budget.rank is not None:
        return None
    keep = budget.keep if budget.keep is not None else 1.0  # of `max_kl`, known only once it is measured
    widths = [dtypes[spec.name].itemsize for spec in specs]
    pivots = 0
    for spec in specs:
        shape = template(recipe, spec)
        tensors = ranked(shape, *full_ranks(spec, shape)).tensors(spec)
        pivots += sum(torch.Size(size).numel() for name, size in tensors.items() if name.endswith(".pivots"))
    numbers = int(keep * sum(spec.dense_numel for spec in specs))
    return numbers * max(widths) + pivots * max(0, PIVOT_DTYPE.itemsize - min(widths))


def ranks_of(recipe: Recipe, spec: ExpertsSpec, ranks: tuple[int, int]) -> LatentShape:
    """The shape at ranks (input, output) that are given for one module; raises `RecipeError` if they do not fit it."""
    shape = template(recipe, spec)
    full_in, full_out = full_ranks(spec, shape)
    fixed = ranked(shape, *ranks)
    if ranks[0] > full_in or (shape.rank_out is not None and ranks[1] > full_out) or fixed.numel(spec) >= spec.dense_numel:
        raise RecipeError(
            f"The ranks {ranks[0]} and {ranks[1]} would make '{spec.name}' larger: {fixed.numel(spec):,} numbers instead of "
            f"{spec.dense_numel:,}, at most rank {full_in} on the input side and {full_out} on the output side.",
            remedy="Use lower ranks, or share bases over larger groups of experts.",
        )
    return fixed


def _fixed_rank(spec: ExpertsSpec, shape: LatentShape, rank: int | str) -> LatentShape:
    full_in, full_out = full_ranks(spec, shape)
    if rank == "full":
        return ranked(shape, full_in, full_out)
    rank = int(rank)
    if shape.form == "layer" and rank % KERNEL_STEP:
        raise RecipeError(
            f"`budget.rank: {rank}` does not suit the layer form.",
            why=f"Its ranks must be multiples of {KERNEL_STEP} for the fused kernels that run it.",
            remedy=f"Use {rank - rank % KERNEL_STEP or KERNEL_STEP}, or `basis.profile: quality`.",
        )
    fixed = ranked(shape, min(rank, full_in), min(rank, full_out))
    if rank > max(full_in, full_out) or fixed.numel(spec) >= spec.dense_numel:
        raise RecipeError(
            f"`budget.rank: {rank}` would make '{spec.name}' larger: {fixed.numel(spec):,} numbers instead of "
            f"{spec.dense_numel:,}, at most rank {full_in} on the input side and {full_out} on the output side.",
            remedy="Use a lower rank, or share bases over larger groups of experts.",
        )
    return fixed
