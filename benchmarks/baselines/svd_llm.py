"""SVD-LLM v2 (Wang et al., arXiv 2503.12340) on every matrix of every expert; and the same stored as PIFA does.

Each matrix W is truncated in the metric of its own inputs: with C = sum of x x^T over the tokens routed to the expert (of
intermediates z for the second projection), C = U S U^T, the SVD of W U S^1/2 is cut and multiplied by its inverse.
Ranks as in the paper's algorithm 2: matrices of one type (gate, up, down; of all layers and experts) share a budget,
in which the ratio removed from a matrix is proportional to 1 / log of its loss at the uniform ratio.
PIFA (Zhao et al., ICML 2025): a matrix of rank r is r of its columns, the other columns as their combinations and r
indices, so that the same budget holds a higher rank.
Setting: float64; C is shrunk by 1 % towards its mean diagonal, since experts see few tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molae_compress.solver.basis import interpolated, interpolative
from molae_compress.solver.moments import ridged

from .common import Layer, Setting, budget, observed, sums

RIDGE = 1e-2


@dataclass
class Matrix:
    """One expert's projection: its SVD in whitened coordinates, and how to come back from them."""

    target_XY: Tensor
    u_XR: Tensor
    s_R: Tensor
    back_RY: Tensor

    @classmethod
    def whitened(cls, w_XY: Tensor, c_YY: Tensor) -> Matrix:
        """By C = V diag(e) V^T, with sums of zero read as the identity."""
        e_Y, v_YY = torch.linalg.eigh(ridged(c_YY, RIDGE))
        u_XR, s_R, vt_RY = torch.linalg.svd(w_XY.double() @ v_YY * e_Y.sqrt(), full_matrices=False)
        return cls(w_XY, u_XR, s_R, (vt_RY / e_Y.sqrt()) @ v_YY.T)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """[X,R] and [R,Y] float64, the singular values split between them."""
        root_R = self.s_R[:rank].sqrt()
        return self.u_XR[:, :rank] * root_R, root_R[:, None] * self.back_RY[:rank]

    def loss(self, rank: int) -> float:
        return float(self.s_R[rank:].square().sum().sqrt())


def plain(matrix: Matrix, rank: int, setting: Setting) -> Tensor:
    """The truncated matrix from two rounded factors."""
    a_XR, b_RY = matrix.factors(rank)
    return setting.stored(a_XR) @ setting.stored(b_RY)


def pivoted(matrix: Matrix, rank: int, setting: Setting) -> Tensor:
    """The truncated matrix from r of its columns and the combinations that make the others."""
    if rank == 0:
        return torch.zeros_like(matrix.target_XY)
    a_XR, b_RY = matrix.factors(rank)
    pivots_R, rest_RX = interpolative(b_RY)
    return setting.stored((a_XR @ b_RY)[:, pivots_R]) @ interpolated(pivots_R, setting.stored(rest_RX))


def levels(rows: int, columns: int, cost: Callable[[int], int]) -> list[int]:
    """Numbers stored at rank 0, 1, ... as long as that is less than the dense matrix, which is the last level."""
    costs = [cost(rank) for rank in range(min(rows, columns) + 1)]
    return [each for each in costs if each < rows * columns] + [rows * columns]


def choose(shares: Sequence[float], steps: Sequence[int], allowed: int) -> list[int]:
    """For each share of a matrix the highest level within it; what is left over goes to whoever was cut most."""
    picked = [max(k for k, cost in enumerate(steps) if cost <= max(0.0, share) * steps[-1]) for share in shares]
    left = allowed - sum(steps[k] for k in picked)
    order = sorted(range(len(shares)), key=lambda i: steps[picked[i]] - shares[i] * steps[-1])
    for i in order:
        if picked[i] + 1 < len(steps) and steps[picked[i] + 1] - steps[picked[i]] <= left:
            left -= steps[picked[i] + 1] - steps[picked[i]]
            picked[i] += 1
    return picked


def shares_of(matrices: Sequence[Matrix], keep: float, rank: int) -> list[float]:
    """What each matrix may keep: 1 - n R (1/log L) / sum(1/log L), L its loss at the uniform rank."""
    inverse = [1 / math.log(max(matrix.loss(rank), math.e)) for matrix in matrices]
    mean = sum(inverse) / len(inverse)
    return [1 - (1 - keep) * each / mean for each in inverse]


def svd_llm(model: PreTrainedModel, windows_NL: Tensor, setting: Setting) -> int:
    """Two dense factors a matrix."""
    return _compress(model, windows_NL, setting, plain, lambda rows, columns, rank: rank * (rows + columns))


def pifa(model: PreTrainedModel, windows_NL: Tensor, setting: Setting) -> int:
    """The same with interpolative storage."""
    return _compress(model, windows_NL, setting, pivoted, lambda rows, columns, rank: rank * (rows + columns - rank + 1))


def _compress(
    model: PreTrainedModel,
    windows_NL: Tensor,
    setting: Setting,
    restored: Callable[[Matrix, int, Setting], Tensor],
    cost: Callable[[int, int, int], int],
) -> int:
    layers = observed(model, windows_NL)
    types = _whitened(layers)
    allowed, stored = budget(layers, setting) // 3, 0
    for matrices in types:
        rows, columns = matrices[0].target_XY.shape
        steps = levels(rows, columns, partial(cost, rows, columns))
        uniform = choose([setting.keep], steps, 0)[0]
        picked = choose(shares_of(matrices, setting.keep, uniform), steps, allowed)
        stored += sum(steps[k] for k in picked)
        for matrix, k in zip(matrices, picked, strict=True):
            if k < len(steps) - 1:
                matrix.target_XY.copy_(restored(matrix, k, setting))
    for layer in layers:
        layer.write(model)
    return stored


def _whitened(layers: Sequence[Layer]) -> list[list[Matrix]]:
    """Matrices by type: views of the layers' stacks, so that what is written into them is written there."""
    types: list[list[Matrix]] = [[], [], []]
    for layer in layers:
        for expert in range(layer.spec.num_experts):
            c_HH, c_II = sums(layer, expert)
            types[0].append(Matrix.whitened(layer.gate_EIH[expert], c_HH))
            types[1].append(Matrix.whitened(layer.up_EIH[expert], c_HH))
            types[2].append(Matrix.whitened(layer.down_EHI[expert], c_II))
    return types
