"""MoBE, mixture of basis experts (Chen et al., arXiv 2508.05257): W_i ~ A_i f(sum_j softmax(alpha_i)_j B_j).

A_i [P,R] per expert, M bases B_j [R,D] per layer and projection, data-free. The paper factors gate and up, and leaves the
second projection dense; `mobe_even` splits the budget evenly over all three, which others found better.
Setting: f = tanh (SiLU came out no better); bases start from the SVD of groups of experts by index, alpha at the expert's
own group; Adam. The paper has R = P, which small budgets do not hold; R and M are those of the least error in short fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .adam import Parameters, compressed, descend, error, group_bases, stacked
from .common import Layer, Setting, budget, opened

RATE, SCALE, OWN = 0.07, 0.5, 3.0
F = torch.tanh


class Shape(NamedTuple):
    """Rank of A_i and number of bases."""

    rank: int
    bases: int

    def numel(self, E: int, P: int, D: int) -> int:
        return E * P * self.rank + self.bases * self.rank * D + E * self.bases


def shapes(E: int, P: int, D: int, allowed: int) -> list[Shape]:
    """For each number of bases the highest rank within the budget of one layer's projection."""
    found = []
    for bases in sorted({1, 2, 3, 4, 5, 6, 8}):
        rank = min(P, math.floor((allowed - E * bases) / (E * P + bases * D)))
        if bases <= E and rank >= 1:
            found.append(Shape(rank, bases))
    return found


def start(w_NEPD: Tensor, shape: Shape, setting: Setting) -> Parameters:
    """Bases and mixing logits before the first step."""
    N, E = w_NEPD.shape[:2]
    own_EM = torch.nn.functional.one_hot(torch.arange(E) * shape.bases // E, shape.bases).float()
    noise = torch.randn(N, E, shape.bases, generator=torch.Generator().manual_seed(setting.seed))
    bases_NMRD = group_bases(w_NEPD, shape.bases, shape.rank)
    bases_NMRD = bases_NMRD * (SCALE / bases_NMRD.square().mean().sqrt())
    return {"bases": bases_NMRD, "alpha": OWN * own_EM + 0.1 * noise}


def mixed(parameters: Parameters) -> Tensor:
    """[N,E,R,D]: each expert's basis."""
    return F(torch.einsum("nem,nmrd->nerd", parameters["alpha"].softmax(-1), parameters["bases"]))


def fitted(w_NEPD: Tensor, shape: Shape, setting: Setting, steps: int) -> tuple[float, Tensor]:
    """Relative error and the fitted matrices."""
    parameters = descend(w_NEPD, start(w_NEPD, shape, setting), mixed, steps, RATE)
    weights_NEM = setting.stored(parameters["alpha"].softmax(-1))
    f_NERD = F(torch.einsum("nem,nmrd->nerd", weights_NEM, setting.stored(parameters["bases"])))
    return error(w_NEPD, f_NERD, setting)


def mobe(model: PreTrainedModel, windows_NL: Tensor, setting: Setting) -> int:
    """Gate and up; the second projection stays as it is."""
    layers = opened(model)
    left = budget(layers, setting) - sum(layer.numel for layer in layers) // 3
    return sum(layer.numel for layer in layers) // 3 + _compress(model, layers, ("gate", "up"), left, setting)


def mobe_even(model: PreTrainedModel, windows_NL: Tensor, setting: Setting) -> int:
    """All three projections alike."""
    layers = opened(model)
    return _compress(model, layers, ("gate", "up", "down"), budget(layers, setting), setting)


def _compress(model: PreTrainedModel, layers: Sequence[Layer], names: Sequence[str], allowed: int, setting: Setting) -> int:
    N, E, P, D = stacked(layers, names).shape
    return compressed(model, layers, names, shapes(E, P, D, allowed // N), fitted, setting)
