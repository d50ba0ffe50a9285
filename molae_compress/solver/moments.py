"""Weighted second moments: what calibration leaves behind for the solver.

Accumulated in float64, mergeable in any order, shrunk by a convex combination and never by an absolute epsilon.
Shape suffixes: N rows of a sample, D and F features; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 4096  # rows per product: bounds the float32 error and the memory of one step
_SINGULAR = 1e-14  # of the mean diagonal: a pivot this small is rounding
_LIFTS = (0.0, 1e-8, 1e-6, 1e-4)  # of the mean diagonal: well above the rounding of float64 moments, then of float32 ones


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
        """Moments of rows `x_ND` (any float dtype) with weights `w_N` >= 0 on the same device."""
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

    def product(rows: slice) -> Tensor:
        return ((a_ND[rows].to(work) * w_N[rows, None].to(work)).T @ b_NF[rows].to(work)).double()

    out_DF = product(slice(0, _CHUNK))
    for start in range(_CHUNK, a_ND.shape[0], _CHUNK):
        out_DF += product(slice(start, start + _CHUNK))
    return out_DF


def trust(count: int, size: int, shrinkage: float) -> float:
    """Share a = n / (n + kappa D) that the moments of n rows of D features earn against their prior."""
    if count == 0:
        return 0.0
    return count / (count + shrinkage * size)


def ridged(c_DD: Tensor, share: float) -> Tensor:
    """(1 - share) C + share tr(C)/D I: scale-free shrinkage towards the identity, which stands in for a C of zero.

    Returns:
        [D,D] in the dtype of `c_DD`; positive definite for share > 0.
    """
    level = float(c_DD.diagonal().mean())
    if level <= 0.0:
        return torch.eye(len(c_DD), dtype=c_DD.dtype, device=c_DD.device)
    out_DD = c_DD * (1.0 - share)
    out_DD.diagonal().add_(share * level)
    return out_DD


def cholesky(c_DD: Tensor) -> Tensor:
    """[D,D] float64, lower: a factor of a symmetric positive semidefinite float64 matrix.

    A singular one is lifted by a small multiple of its mean diagonal, so that what it divides stays bounded.
    """
    level = float(c_DD.diagonal().mean())
    level = level if level > 0 else 1.0
    for lift in _LIFTS:
        lifted_DD = c_DD if lift == 0.0 else c_DD + lift * level * torch.eye(len(c_DD), dtype=c_DD.dtype).to(c_DD)
        factor_DD: Tensor
        factor_DD, info = torch.linalg.cholesky_ex(lifted_DD)
        if not int(info) and float(factor_DD.diagonal().min()) ** 2 > _SINGULAR * level:
            return factor_DD
    raise AssertionError("not positive semidefinite, or not finite")
