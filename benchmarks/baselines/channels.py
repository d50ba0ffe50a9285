"""Channel pruning by ridge leverage scores with a closed-form second projection (the Nystrom form; arXiv 2606.18304).

With C = sum of w z z^T over the tokens routed to an expert (z what its second projection reads, w = g^2 / |h|^2), channels
are ranked by the diagonal of C (C + lam I)^-1; the kept ones S get W' = W C[:, S] C[S, S]^-1, the least-squares
second projection for the original output. One allocation over all experts of all layers: how many channels an expert keeps
follows from the error tr(W (C - C[:, S] C[S, S]^-1 C[S, :]) W^T) that each number leaves, by water-filling.
Setting: lam is the mean diagonal of C (0.001 to 1 times it tried), the ridge of C[S, S] 0.1 % of it; steps of one channel.
Stored are three vectors a channel, and how many channels each expert has.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molae_compress.solver.allocate import Curve, allocate
from molae_compress.solver.moments import cholesky, ridged

from .common import Layer, Setting, budget, observed, sums

LEVERAGE, RIDGE = 1.0, 1e-3
UNSEEN = 1e-9  # what the error of an expert counts that no token was routed to: it is served last


def order(c_II: Tensor) -> Tensor:
    """Channels by falling leverage."""
    level = float(c_II.diagonal().mean()) or 1.0
    damped_II = c_II + LEVERAGE * level * torch.eye(len(c_II), dtype=c_II.dtype)
    return torch.cholesky_solve(c_II, cholesky(damped_II)).diagonal().argsort(descending=True, stable=True)


def curve(w_HI: Tensor, c_II: Tensor, order_I: Tensor) -> list[float]:
    """Error left by the first 0, 1, ... channels of an order, each with the least-squares second projection.

    In the order given, the Cholesky factor's columns are what every channel adds to those before it.
    """
    factor_II = cholesky(c_II[order_I][:, order_I])
    gains_I = (w_HI.double()[:, order_I] @ factor_II).square().sum(0)
    return [*gains_I.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def refitted(w_HI: Tensor, c_II: Tensor, kept_S: Tensor) -> Tensor:
    """[H,S]: the least-squares second projection on the kept channels."""
    c_SS = c_II[kept_S][:, kept_S]
    return torch.cholesky_solve(c_II[kept_S] @ w_HI.double().T, cholesky(c_SS)).T


def channels(model: PreTrainedModel, windows_NL: Tensor, setting: Setting) -> int:
    """Pruned channels are zeroed in all three projections."""
    layers = observed(model, windows_NL)
    experts = [(layer, expert) for layer in layers for expert in range(layer.spec.num_experts)]
    moments = [ridged(sums(layer, expert, "squared")[1], RIDGE) for layer, expert in experts]
    seen = [1.0 if layer.tokens.counts_E[expert] > 0 else UNSEEN for layer, expert in experts]
    orders = [order(c_II) for c_II in moments]
    curves = []
    for (layer, expert), c_II, order_I, weight in zip(experts, moments, orders, seen, strict=True):
        width, cost = layer.spec.intermediate, 3 * layer.spec.hidden
        errors = tuple(weight * error for error in curve(layer.down_EHI[expert], c_II, order_I))
        curves.append(Curve(tuple(range(width + 1)), tuple(cost * rank for rank in range(width + 1)), errors))
    picked = allocate(curves, budget(layers, setting) - len(experts))
    assert picked is not None
    for (layer, expert), c_II, order_I, count in zip(experts, moments, orders, picked, strict=True):
        _prune(layer, expert, c_II, order_I[:count], setting)
    for layer in layers:
        layer.write(model)
    return sum(curve.costs[count] for curve, count in zip(curves, picked, strict=True)) + len(experts)


def _prune(layer: Layer, expert: int, c_II: Tensor, kept_S: Tensor, setting: Setting) -> None:
    down_HI = layer.down_EHI[expert].clone()
    gone_I = torch.ones(len(c_II), dtype=torch.bool)
    gone_I[kept_S] = False
    if not gone_I.any():
        return
    layer.gate_EIH[expert][gone_I] = 0
    layer.up_EIH[expert][gone_I] = 0
    layer.down_EHI[expert].zero_()
    if len(kept_S):
        layer.down_EHI[expert][:, kept_S] = setting.stored(refitted(down_HI, c_II, kept_S))
