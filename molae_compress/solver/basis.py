"""Phase 1, shared basis extraction: one subspace for a group of experts, in closed form.

Input side. For experts i of a group with weights W_i [J,H], input covariance C = L L^T and output metrics H_i:

    min over B, A_i of  sum_i tr( H_i (W_i - A_i B) C (W_i - A_i B)^T )
    M_i = H_i^{1/2} W_i L,   V = top-R right singular vectors of the stack of all M_i,   B = V^T L^{-1}

the error being exactly the sum of the discarded squared singular values. Any square root of C gives the same
subspace, so the Cholesky factor serves. Output side: the principal subspace of the outputs N_i = W_i Z_i^{1/2}
needs no inverse. Both reduce to one symmetric eigenproblem on the smaller side of a stack of matrices, `principal`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values of one group's stack, largest first, and the right singular vectors if they were asked for.

    Attributes:
        energy_M: [M] float64, M <= H; the error of rank R is the sum of `energy_M[R:]`.
        vectors_HR: [H,R] float64, columns spanning the leading R directions, sign fixed; None if not asked for.
    """

    energy_M: Tensor
    vectors_HR: Tensor | None = None

    def error(self, rank: int) -> float:
        """Exact error of the best rank-`rank` basis."""
        return float(self.energy_M[rank:].sum())


def principal(stack: Iterable[Tensor], rows: int, width: int, *, rank: int | None = None) -> Spectrum:
    """Right singular subspace of the matrices `[rows_i, width]` of `stack` on top of each other, `rows` in all.

    Always a Gram matrix and `eigh` in float64, on the smaller side; the stack is formed only if it is the smaller side,
    otherwise one matrix is in memory at a time. With `rank` the leading vectors are returned too.
    """
    if rows < width:
        m_NH = torch.cat([m_XH.double() for m_XH in stack])
        gram = m_NH @ m_NH.T
    else:
        gram = torch.zeros(0)
        for m_XH in stack:
            part_HH = (m_XH.T @ m_XH).double()
            gram = gram.add_(part_HH) if gram.numel() else part_HH
    if rank is None:
        return Spectrum(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0))
    energy_M, vectors_MM = torch.linalg.eigh(gram)
    energy_M, vectors_MR = energy_M.flip(0).clamp_min(0), vectors_MM.flip(1)[:, :rank]
    if rows < width:  # from left to right vectors; a direction of no energy stays some direction, made orthogonal later
        vectors_MR = torch.nn.functional.normalize(m_NH.T @ vectors_MR, dim=0)
    return Spectrum(energy_M, sign_fixed(vectors_MR))


def sign_fixed(vectors_HM: Tensor) -> Tensor:
    """Flips columns so that the entry of largest magnitude is positive: runs on one machine agree bit for bit."""
    peak_M = vectors_HM.gather(0, vectors_HM.abs().argmax(0, keepdim=True))[0]
    return vectors_HM * torch.where(peak_M < 0, -1.0, 1.0)


def orthonormal_rows(b_RH: Tensor) -> Tensor:
    """[R,H]: an orthonormal basis of the row space of `b_RH`, in float64."""
    q_HR, r_RR = torch.linalg.qr(b_RH.double().T)
    return (q_HR * torch.where(r_RR.diagonal() < 0, -1.0, 1.0)).T


def interpolative(b_RH: Tensor) -> tuple[Tensor, Tensor]:
    """Gauge-fixes a basis: pivot columns [R] (ascending int64) and coefficients [R,H-R] of the other columns.

    The row space of `b_RH` is that of a matrix whose pivot columns are the identity, so only the rest needs storing
    (notes on gauge freedom in docs/how-it-works.md). Pivots come from an LU factorisation with partial pivoting of an
    orthonormal basis: as good as column-pivoted QR here, at the speed of a matrix product.
    """
    rank, width = b_RH.shape
    q_RH = orthonormal_rows(b_RH)
    factors_HR, swaps_R = torch.linalg.lu_factor(q_RH.T)
    permutation_H = torch.lu_unpack(factors_HR, swaps_R, unpack_data=False)[0].argmax(0)
    pivots_R = permutation_H[:rank].sort().values
    rest = torch.ones(width, dtype=torch.bool, device=b_RH.device)
    rest[pivots_R] = False
    return pivots_R, torch.linalg.solve(q_RH[:, pivots_R], q_RH[:, rest])


def interpolated(pivots_R: Tensor, rest_RX: Tensor) -> Tensor:
    """[R,H]: the full basis of an interpolative one, X = H - R; inverse of the storage in `interpolative`."""
    rank, width = pivots_R.shape[0], pivots_R.shape[0] + rest_RX.shape[1]
    basis_RH = torch.zeros(rank, width, dtype=rest_RX.dtype, device=rest_RX.device)
    keep = torch.ones(width, dtype=torch.bool, device=rest_RX.device)
    keep[pivots_R.long()] = False
    basis_RH[:, keep] = rest_RX
    basis_RH[torch.arange(rank, device=rest_RX.device), pivots_R.long()] = 1.0
    return basis_RH
