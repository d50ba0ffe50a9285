"""Which experts share a basis: those whose first projections read alike, in groups of one size.

Two experts can share a basis as far as the subspaces agree in which inputs matter to them. How much the whitened Gram
matrices G_i of their first projections have in common is <G_i, G_j> / |G_i| |G_j|, which a few random directions tell well
enough: <G_i P, G_j P> for a Gaussian P has <G_i, G_j> as its mean. Shape suffixes: P directions; the rest as in
`molae_compress.tensors`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molae_compress.solver.moments import cholesky
from molae_compress.solver.population import Population
from molae_compress.tensors import DenseExperts

_DIRECTIONS = 64


@torch.no_grad()
def alike(dense: DenseExperts, population: Population, size: int, ridge: float) -> tuple[int, ...]:
    """All experts in an order in which those of a group, `size` of them, are neighbours.

    Args:
        dense: weights of any float dtype, on the device of `population`.
        population: what is known of the experts' inputs.
        size: of a group; divides the experts.
        ridge: of the moments of inputs.
    """
    return grouped(_likeness(dense, population, ridge), size)


def _likeness(dense: DenseExperts, population: Population, ridge: float) -> Tensor:
    """[E,E], at most 1: how much two experts have in common; rows count by what the second projection makes of them."""
    spec = dense.spec
    work = torch.float64 if dense.w_in_EJH.dtype == torch.float64 else torch.float32
    root_HH = cholesky(population.covariance(range(spec.num_experts), ridge)).to(work)
    directions_HP = torch.randn(spec.hidden, _DIRECTIONS, generator=torch.Generator().manual_seed(0)).to(root_HH)
    directions_HP = root_HH @ directions_HP
    channel_J = spec.channel_of_row().to(root_HH.device)
    sketch_EX = root_HH.new_empty(spec.num_experts, directions_HP.numel())
    for expert, (w_JH, w_HI) in enumerate(zip(dense.w_in_EJH, dense.w_out_EHI, strict=True)):
        weight_J1 = w_HI.to(work).square().sum(0)[channel_J, None]
        sketch_HP = root_HH.T @ (w_JH.to(work).T @ (weight_J1 * (w_JH.to(work) @ directions_HP)))
        sketch_EX[expert] = sketch_HP.flatten() / sketch_HP.norm().clamp_min(torch.finfo(work).tiny)
    return (sketch_EX @ sketch_EX.T).cpu()


def grouped(likeness_EE: Tensor, size: int) -> tuple[int, ...]:
    """Groups one after the other: the two free experts that are most alike, then whoever is most like those in it."""
    order: list[int] = []
    free_E = torch.ones(len(likeness_EE), dtype=torch.bool)
    pairs_EE = likeness_EE.masked_fill(torch.eye(len(likeness_EE), dtype=torch.bool), -torch.inf)
    while len(order) < len(free_E):
        among_EE = pairs_EE.masked_fill(~(free_E[:, None] & free_E), -torch.inf)
        group = [int(among_EE.max(1).values.argmax())]
        while len(group) < size:
            free_E[group] = False
            likeness_E = likeness_EE[group].sum(0).masked_fill(~free_E, -torch.inf)
            group.append(int(likeness_E.argmax()))
        free_E[group] = False
        order += group
    return tuple(order)
