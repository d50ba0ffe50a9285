"""What the routed experts of a model cost in training and in use: as dense ones, in the paper's form, and as planned.

All figures follow from shapes alone, by the counts of `operations`, and tests hold them against what torch counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from molae_compress.errors import RecipeError, human_bytes
from molae_compress.operations import backward_operations, kept_bytes, operations, sent_numbers
from molae_compress.ranks import Module, uniform
from molae_compress.recipe import Recipe
from molae_compress.tensors import AnyShape, ExpertsSpec

Shapes = Mapping[str, AnyShape | None]


@dataclass(frozen=True)
class Cost:
    """What all routed experts of a model cost in one form.

    Attributes:
        form: `dense`, `paper` or `planned`.
        parameters: numbers stored, column indices included.
        weight_bytes: the same in bytes, in the type of the weights.
        training_bytes: weights, gradients and the two moments of Adam in float32, as plain `Trainer` holds them with or
            without mixed precision; column indices, which are not trained, once.
        forward_flops, backward_flops: floating-point operations for one token, two per multiply-add.
        activation_bytes: what one token leaves behind for the backward pass, in the type of the weights; see `kept_bytes`.
        traffic_bytes: sent between devices for one token in a forward pass under expert parallelism, in that type; the
            backward pass sends as many.
    """

    form: str
    parameters: int
    weight_bytes: int
    training_bytes: int
    forward_flops: int
    backward_flops: int
    activation_bytes: int
    traffic_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def cost(form: str, specs: Sequence[ExpertsSpec], shapes: Shapes, dtypes: Mapping[str, torch.dtype]) -> Cost:
    """Adds up all modules.

    Args:
        form: what to call it.
        specs: all routed-experts modules of a model.
        shapes: of those that are latent, by name.
        dtypes: type of the weights, by name.
    """
    sums = dict.fromkeys(tuple(Cost.__dataclass_fields__)[1:], 0)
    for spec in specs:
        shape, dtype = shapes.get(spec.name), dtypes[spec.name]
        numbers = spec.dense_numel if shape is None else shape.numel(spec)
        sizes = {} if shape is None else shape.tensors(spec)
        pivots = sum(torch.Size(size).numel() for name, size in sizes.items() if name.endswith(".pivots"))
        found = {
            "parameters": numbers,
            "weight_bytes": numbers * dtype.itemsize if shape is None else shape.nbytes(spec, dtype),
            "training_bytes": 16 * (numbers - pivots) + 4 * pivots,
            "forward_flops": operations(spec, shape),
            "backward_flops": backward_operations(spec, shape),
            "activation_bytes": kept_bytes(spec, shape, dtype),
            "traffic_bytes": sent_numbers(spec, shape) * dtype.itemsize,
        }
        sums = {key: total + found[key] for key, total in sums.items()}
    return Cost(form, **sums)


def compare_costs(specs: Sequence[ExpertsSpec], shapes: Shapes, dtypes: Mapping[str, torch.dtype]) -> tuple[Cost, ...]:
    """Dense, the paper's form of as many parameters where it can be so small, and `shapes`."""
    planned = cost("planned", specs, shapes, dtypes)
    latent = [spec for spec in specs if shapes.get(spec.name) is not None]
    dense = cost("dense", specs, {}, dtypes)
    paper = paper_shapes(latent, sum(shape.numel(spec) for spec in latent if (shape := shapes.get(spec.name)) is not None))
    between = () if paper is None else (cost("paper", specs, paper, dtypes),)
    return (dense, *between, planned)


def paper_shapes(specs: Sequence[ExpertsSpec], numbers: int) -> dict[str, AnyShape | None] | None:
    """The paper's form of modules in at most so many numbers; None if it cannot be so small."""
    try:
        modules = [Module.of(Recipe.load({"molae": 1, "method": "paper"}), spec, None) for spec in specs]
    except RecipeError:
        return None
    found = uniform(modules, numbers - sum(module.fixed for module in modules))
    return None if found is None else {spec.name: shape for spec, shape in zip(specs, found, strict=True)}


def cost_lines(costs: Sequence[Cost]) -> list[str]:
    """A table for people, one column a form."""
    names = {"dense": "dense", "paper": "paper's form", "planned": "this plan"}
    rows = [("of all routed experts", [names[found.form] for found in costs])]
    for label, key, show in (
        ("parameters", "parameters", None),
        ("weights", "weight_bytes", human_bytes),
        ("training, with gradients and Adam", "training_bytes", human_bytes),
        ("operations per token, forward", "forward_flops", None),
        ("operations per token, backward", "backward_flops", None),
        ("activations kept per token", "activation_bytes", human_bytes),
        ("all-to-all per token", "traffic_bytes", human_bytes),
    ):
        values = [getattr(found, key) for found in costs]
        rows.append((label, [f"{value:,}" if show is None else show(value) for value in values]))
    return [f"{label:34}" + "".join(f" {value:>18}" for value in values) for label, values in rows]
