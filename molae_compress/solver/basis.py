"""Phase 1, shared basis extraction: one subspace for a group of experts, in closed form.

Input side. For experts i of a group with weights W_i [J,H], input covariance C = L L^T and output metrics H_i:

    min over B, A_i of  sum_i tr( H_i (W_i - A_i B) C (W_i - A_i B)^T )
    M_i = W_i L,   G = sum_i M_i^T H_i M_i,   V = top-R eigenvectors of G,   B = V^T L^{-1}

the error being exactly the sum of the discarded eigenvalues (Eckart and Young, 1936, in whitened coordinates; MoLAE,
arXiv 2503.23100, is the case C = H_i = 1). Any square root of C gives the same subspace, so the Cholesky factor serves.
Output side: M_i = W_i^T with the intermediates' moments as metric, and no inverse. Both are one symmetric eigenproblem,
`Stack`. Shape suffixes: X rows of one matrix, N rows of all, M energies; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molae_compress.solver.moments import cholesky

_LARGEST = 1.02  # coefficient of an interpolative basis: 1 would be reached by many more exchanges that gain nothing


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of one group's Gram, largest first, and the leading eigenvectors if they were asked for.

    Attributes:
        energy_M: [M] float64, M <= H; the error of rank R is the sum of `energy_M[R:]`.
        vectors_HR: [H,R] float64, the first r columns spanning the leading r directions; orthogonal, of any length,
            zero where there is no energy. None if not asked for.
    """

    energy_M: Tensor
    vectors_HR: Tensor | None = None

    def error(self, rank: int) -> float:
        """Exact error of the best rank-`rank` basis."""
        return float(self.energy_M[rank:].sum())


class Stack:
    """Matrices M_i [X,H] on top of each other, each with a metric H_i: the right singular subspace of all H_i^{1/2} M_i.

    Products run in the type of the matrices and are summed in float64. Kept is the smaller side: the rows themselves
    if there are fewer of them than columns, their Gram matrix [H,H] otherwise.

    Args:
        rows: rows of all matrices together.
        width: H.
        rank: how many leading directions will be asked for, None for energies alone.
    """

    def __init__(self, rows: int, width: int, rank: int | None) -> None:
        self.rank = rank
        self.keeps_rows = rows < width and (rank is None or rank <= rows)
        self._rows: list[Tensor] = []
        self._gram_HH: Tensor | None = None

    def add(self, m_XH: Tensor, metric_XX: Tensor | None = None) -> None:
        """One more matrix; `metric_XX` is symmetric positive semidefinite, the identity if None."""
        if self.keeps_rows:
            root_XX = None if metric_XX is None else cholesky(metric_XX.double()).to(m_XH.dtype)
            self._rows.append(m_XH if root_XX is None else root_XX.T @ m_XH)
            return
        gram_HH = (m_XH.T @ (m_XH if metric_XX is None else metric_XX.to(m_XH.dtype) @ m_XH)).double()
        self._gram_HH = gram_HH if self._gram_HH is None else self._gram_HH.add_(gram_HH)

    def multiply(self, root_HH: Tensor) -> None:
        """Every matrix so far times `root_HH` [H,H], in float64: cheaper than one by one when there are many."""
        assert self._gram_HH is not None
        self._gram_HH = root_HH.double().T @ self._gram_HH @ root_HH.double()

    def spectrum(self) -> Spectrum:
        """Energies, and the leading `rank` directions if a rank was given; always by `eigh` of a Gram in float64."""
        if not self.keeps_rows:
            assert self._gram_HH is not None
            return _leading(self._gram_HH, self.rank)
        m_NH = torch.cat(self._rows)
        left = _leading((m_NH @ m_NH.T).double(), self.rank)
        if left.vectors_HR is None:
            return left
        return Spectrum(left.energy_M, (m_NH.T @ left.vectors_HR.to(m_NH.dtype)).double())


def _leading(gram_MM: Tensor, rank: int | None) -> Spectrum:
    if rank is None:
        return Spectrum(torch.linalg.eigvalsh(gram_MM).flip(0).clamp_min(0))
    energy_M, vectors_MM = torch.linalg.eigh(gram_MM)
    return Spectrum(energy_M.flip(0).clamp_min(0), sign_fixed(vectors_MM.flip(1)[:, :rank]))


def sign_fixed(vectors_HM: Tensor) -> Tensor:
    """Flips columns so that the entry of largest magnitude is positive: an eigenvector's sign is arbitrary."""
    peak_M = vectors_HM.gather(0, vectors_HM.abs().argmax(0, keepdim=True))[0]
    return vectors_HM * torch.where(peak_M < 0, -1.0, 1.0)


def orthonormal_rows(b_RH: Tensor) -> Tensor:
    """[R,H] float64: an orthonormal basis of the row space of `b_RH`, its first r rows spanning what the first r do."""
    q_HR: Tensor
    q_HR, r_RR = torch.linalg.qr(b_RH.double().T)
    return (q_HR * torch.where(r_RR.diagonal() < 0, -1.0, 1.0)).T


def interpolative(b_RH: Tensor) -> tuple[Tensor, Tensor]:
    """Gauge-fixes a basis: pivot columns [R] (ascending int64) and coefficients [R,H-R] float64 of the other columns.

    The row space of `b_RH` is that of a matrix whose pivot columns are the identity, so only the rest needs storing
    (the gauge freedom in docs/how-it-works.md; PIFA, ICML 2025, stores single matrices so). Rounding errors of the
    coefficients grow with them, so the pivots are chosen such that none is much beyond 1.
    """
    q_HR = orthonormal_rows(b_RH).T
    pivots_R, others_X = _pivots(q_HR)
    return pivots_R, torch.linalg.solve(q_HR[pivots_R].T, q_HR[others_X].T)


def _pivots(q_HR: Tensor) -> tuple[Tensor, Tensor]:
    """Columns [R] and [H-R], each ascending: the pivots of an interpolative basis of orthonormal columns, and the others.

    Those of an LU factorisation with partial pivoting, Q = P [L1; L2] U, improved by exchanging the two columns of the
    largest coefficient in L2 L1^{-1} while it is beyond `_LARGEST`. Every exchange multiplies the volume that the pivots
    span by that coefficient, so that it ends (Goreinov et al., How to find a good submatrix, 2010).
    """
    rank = q_HR.shape[1]
    factors_HR, swaps_R = torch.linalg.lu_factor(q_HR)
    order_H = torch.lu_unpack(factors_HR, swaps_R, unpack_data=False)[0].argmax(0)
    rest_XR = torch.linalg.solve_triangular(
        factors_HR[:rank], factors_HR[rank:], upper=False, left=False, unitriangular=True
    ).contiguous()  # the search below takes twenty times as long column by column
    while rest_XR.numel():
        row, column = divmod(int(rest_XR.abs().argmax()), rank)
        largest = float(rest_XR[row, column])
        if not abs(largest) > _LARGEST:
            break
        change_R = rest_XR[row].clone()
        change_R[column] -= 1  # the row becomes that of the identity
        rest_XR.addr_(rest_XR[:, column].clone(), change_R, alpha=-1 / largest)
        rest_XR[row] = -change_R / largest  # of the column that was a pivot
        rest_XR[row, column] = 1 / largest
        order_H[[column, rank + row]] = order_H[[rank + row, column]]
    return order_H[:rank].sort().values, order_H[rank:].sort().values


def interpolated(pivots_R: Tensor, rest_RX: Tensor) -> Tensor:
    """[R,H]: the full basis of an interpolative one, X = H - R, in its type; inverse of the storage in `interpolative`."""
    rank, width = pivots_R.shape[0], pivots_R.shape[0] + rest_RX.shape[1]
    basis_RH = torch.zeros(rank, width, dtype=rest_RX.dtype, device=rest_RX.device)
    keep = torch.ones(width, dtype=torch.bool, device=rest_RX.device)
    keep[pivots_R.long()] = False
    basis_RH[:, keep] = rest_RX
    basis_RH[torch.arange(rank, device=rest_RX.device), pivots_R.long()] = 1.0
    return basis_RH
