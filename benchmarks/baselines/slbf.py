"""SLBF, shared low-rank basis factorisation (Cao et al., 2026): W_i ~ A_i f(sum_j w_ij U_j V_j).

A_i [P,R] per expert; M bases of rank K per layer and projection, U_j [R,K], V_j [K,D], mixed without a softmax; all three
projections, data-free. Bases are stored gauge-fixed: K columns of V_j are the identity, so that one takes K (R + D - K)
numbers and K indices. Setting: f = tanh (SiLU came out no better), factors start at matrix signs (orthonormal), weights at
the expert's own group, AdamW; R, M and K are those of the least error in short fits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molae_compress.solver.basis import interpolated, interpolative

from .adam import Parameters, compressed, descend, error, group_bases, stacked
from .common import Setting, budget, opened

RATE, DECAY, SCALE = 0.05, 1e-4, 1.0
F = torch.tanh
NAMES = ("gate", "up", "down")


class Shape(NamedTuple):
    """Rank of A_i, number of bases, and their rank."""

    rank: int
    bases: int
    width: int

    def numel(self, E: int, P: int, D: int) -> int:
        basis = self.width * (self.rank + D - self.width) + self.width
        return E * P * self.rank + self.bases * basis + E * self.bases


def shapes(E: int, P: int, D: int, allowed: int) -> list[Shape]:
    """For some ranks of A_i (or a little above) and numbers of bases, what comes closest to the budget of one projection."""
    found = []
    for rank in sorted({max(1, round(P * share)) for share in (0.375, 0.5, 0.625, 0.75, 0.875, 1.0)}):
        for bases in sorted({max(1, E // 4), max(1, E // 2), max(1, 3 * E // 4)}):
            near = range(rank, min(P, rank + P // 16) + 1)
            fits = [Shape(r, bases, width) for r in near for width in range(-(-r // bases), r + 1)]
            fits = [shape for shape in fits if shape.numel(E, P, D) <= allowed]
            found += [max(fits, key=lambda shape: shape.numel(E, P, D))] if fits else []
    return found


def start(w_NEPD: Tensor, shape: Shape, setting: Setting) -> Parameters:
    """Factors and mixing weights before the first step."""
    N, E = w_NEPD.shape[:2]
    chance = torch.Generator().manual_seed(setting.seed)
    own_EM = torch.nn.functional.one_hot(torch.arange(E) * shape.bases // E, shape.bases).float()
    v_NMKD = group_bases(w_NEPD, shape.bases, shape.width)
    u_NMRK = torch.linalg.qr(torch.randn(N, shape.bases, shape.rank, shape.width, generator=chance))[0]
    noise_NEM = torch.randn(N, E, shape.bases, generator=chance) * (0.5 / shape.bases**0.5)
    level = SCALE / (u_NMRK @ v_NMKD).square().mean().sqrt()
    return {"u": u_NMRK * level.sqrt(), "v": v_NMKD * level.sqrt(), "weights": own_EM + noise_NEM}


def mixed(parameters: Parameters) -> Tensor:
    """[N,E,R,D]: each expert's basis."""
    return F(torch.einsum("nem,nmrd->nerd", parameters["weights"], parameters["u"] @ parameters["v"]))


def gauge_fixed(u_NMRK: Tensor, v_NMKD: Tensor, setting: Setting) -> Tensor:
    """[N,M,R,D]: the products as they are read back from their gauge-fixed, rounded form."""
    out = u_NMRK @ v_NMKD
    for n in range(u_NMRK.shape[0]):
        for j in range(u_NMRK.shape[1]):
            pivots_K, rest_KX = interpolative(v_NMKD[n, j])
            out[n, j] = setting.stored(out[n, j][:, pivots_K]) @ interpolated(pivots_K, setting.stored(rest_KX))
    return out


def fitted(w_NEPD: Tensor, shape: Shape, setting: Setting, steps: int) -> tuple[float, Tensor]:
    """Relative error and the fitted matrices."""
    parameters = descend(w_NEPD, start(w_NEPD, shape, setting), mixed, steps, RATE, DECAY)
    bases_NMRD = gauge_fixed(parameters["u"], parameters["v"], setting)
    return error(w_NEPD, F(torch.einsum("nem,nmrd->nerd", setting.stored(parameters["weights"]), bases_NMRD)), setting)


def slbf(model: PreTrainedModel, windows_NL: Tensor, setting: Setting) -> int:
    """All three projections alike."""
    layers = opened(model)
    N, E, P, D = stacked(layers, NAMES).shape
    return compressed(model, layers, NAMES, shapes(E, P, D, budget(layers, setting) // N), fitted, setting)
