"""Weighted second moments: what calibration leaves behind for the solver.

Accumulated in float64, mergeable in any order, shrunk by a convex combination and never by an absolute epsilon.
Shape suffixes: N rows of a sample, D features; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 4096  # rows per product: bounds the float32 error and the memory of one step


@dataclass(frozen=True)
class Moments:
    """Sum of w x x^T over a population, with its total weight and its number of rows.

    Attributes:
        gram_DD: [D,D] float64.
        weight: sum of the weights w.
        count: rows seen.
    """

    gram_DD: Tensor
    weight: float
    count: int

    @classmethod
    def zeros(cls, size: int, device: torch.device | str = "cpu") -> Moments:
        """The moments of nothing: neutral under `merge`."""
        return cls(torch.zeros(size, size, dtype=torch.float64, device=device), 0.0, 0)

    @classmethod
    def identity(cls, size: int, device: torch.device | str = "cpu") -> Moments:
        """The data-free limit: all directions alike."""
        return cls(torch.eye(size, dtype=torch.float64, device=device), 1.0, 0)

    @classmethod
    def of(cls, x_ND: Tensor, w_N: Tensor) -> Moments:
        """Moments of rows `x_ND` (any float dtype) with weights `w_N` >= 0."""
        return cls(cross(x_ND, x_ND, w_N), float(w_N.double().sum()), x_ND.shape[0])

    def merge(self, other: Moments) -> Moments:
        """Moments of both populations together; associative and commutative up to float64 rounding."""
        return Moments(self.gram_DD + other.gram_DD, self.weight + other.weight, self.count + other.count)

    def mean(self) -> Tensor:
        """[D,D] float64: E[x x^T]; zero if nothing was seen."""
        return self.gram_DD / self.weight if self.weight > 0 else torch.zeros_like(self.gram_DD)


def cross(a_ND: Tensor, b_NF: Tensor, w_N: Tensor) -> Tensor:
    """[D,F] float64: sum over rows of w a b^T, multiplied in the dtype of `a` (at least float32), summed in float64."""
    work = torch.float64 if a_ND.dtype == torch.float64 else torch.float32
    out_DF = torch.zeros(a_ND.shape[1], b_NF.shape[1], dtype=torch.float64, device=a_ND.device)
    for start in range(0, a_ND.shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        out_DF += ((a_ND[rows].to(work) * w_N[rows, None].to(work)).T @ b_NF[rows].to(work)).double()
    return out_DF


def trust(count: int, size: int, shrinkage: float) -> float:
    """Share a = n / (n + kappa D) that n rows of D features earn against their prior (algorithms: refit of rare experts)."""
    if count == 0:
        return 0.0
    return count / (count + shrinkage * size)


def ridged(c_DD: Tensor, share: float) -> Tensor:
    """(1 - share) C + share tr(C)/D I: scale-free shrinkage towards the identity; positive definite for share > 0."""
    size = c_DD.shape[0]
    level = c_DD.diagonal().mean().clamp_min(torch.finfo(c_DD.dtype).tiny)
    out_DD = c_DD * (1.0 - share)
    out_DD.diagonal().add_(share * level)
    assert out_DD.shape == (size, size)
    return out_DD
