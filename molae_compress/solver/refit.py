"""Phase 2, expert-specific refit: least squares for the cores, given the bases.

Everything is written as a correction of the plain projection, so that it vanishes where the basis already holds the
weights: a full-rank basis gives back the dense expert to rounding, whatever the calibration data.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_right(a_NR: Tensor, gram_RR: Tensor) -> Tensor:
    """[N,R]: A gram^{-1} for a symmetric positive definite `gram_RR`, in float64."""
    return torch.cholesky_solve(a_NR.double().T, torch.linalg.cholesky(gram_RR.double())).T


def project(w_JH: Tensor, b_RH: Tensor) -> Tensor:
    """[J,R]: the core whose product with the basis is nearest to W with all directions alike, W B^T (B B^T)^{-1}."""
    b_RH = b_RH.double()
    return solve_right(w_JH.double() @ b_RH.T, b_RH @ b_RH.T)


def refit_core(w_JH: Tensor, b_RH: Tensor, cb_HR: Tensor) -> Tensor:
    """[J,R] float64: argmin over A of tr((W - A B) C (W - A B)^T), given `cb_HR` = C B^T for the expert's own C.

    A = W C B^T (B C B^T)^{-1}, computed as the projection plus the refit of what it leaves over.
    """
    a_JR = project(w_JH, b_RH)
    left_JH = (w_JH - (a_JR @ b_RH.double()).to(w_JH.dtype)).to(cb_HR.dtype)
    gram_RR = b_RH.double() @ cb_HR.double()
    return a_JR + solve_right(left_JH @ cb_HR, (gram_RR + gram_RR.T) / 2)


def refit_down(w_HI: Tensor, target_II: Tensor, gram_II: Tensor, ridge: float) -> Tensor:
    """[H,I] float64: maps the compressed intermediates z' to the original outputs W z, with ridge towards W.

    Args:
        w_HI: dense second projection.
        target_II: E[z z'^T], original against compressed intermediates.
        gram_II: E[z' z'^T].
        ridge: share of the mean diagonal of `gram_II` that is added to it.

    W + W (E[z z'^T] - E[z' z'^T]) (E[z' z'^T] + ridge I)^{-1}: the minimiser of E|W z - W' z'|^2 + ridge |W' - W|^2.
    """
    level = gram_II.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped_II = gram_II + ridge * level * torch.eye(gram_II.shape[0], dtype=gram_II.dtype, device=gram_II.device)
    return w_HI.double() + w_HI.double() @ solve_right(target_II - gram_II, damped_II)


def output_metric(w_HI: Tensor, slope_JJ: Tensor, channel_J: Tensor, ridge: float) -> Tensor:
    """[J,J] float64: what an error of the first projection costs at the expert's output, to first order.

    With y = W z(u) and slopes v = dz/du, a small error d of u changes y by W (v * d), so
    E|dy|^2 = d^T ((W^T W)[c,c'] * E[v v^T]) d, with c the channel a row feeds.
    """
    ww_II = w_HI.double().T @ w_HI.double()
    metric_JJ = ww_II[channel_J][:, channel_J] * slope_JJ
    level = metric_JJ.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    metric_JJ.diagonal().add_(ridge * level)
    return metric_JJ
