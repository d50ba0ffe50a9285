"""Phase 2, expert-specific refit: least squares for the cores, given the bases.

Everything is written as a correction of the plain projection, so that it vanishes where the basis already holds the
weights: a full-rank basis gives back the dense expert to rounding, whatever the calibration data. That also keeps the
products accurate in float32, because what is left over is small where the metric would amplify its rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molae_compress.solver.moments import cholesky


def right_inverse(b_RH: Tensor) -> Tensor:
    """[H,R] in the dtype of `b_RH`, solved in float64: B^T (B B^T)^{-1}. W times it is the core with A B nearest to W."""
    wide_RH = b_RH.double()
    return torch.cholesky_solve(wide_RH, cholesky(wide_RH @ wide_RH.T)).T.to(b_RH.dtype)


def refit_core(w_XH: Tensor, b_RH: Tensor, inverse_HR: Tensor, cb_HR: Tensor) -> Tensor:
    """[X,R]: argmin over A of tr((W - A B) C (W - A B)^T), for the expert's own C; all in one float dtype.

    Args:
        w_XH: dense rows.
        b_RH: the basis as stored.
        inverse_HR: its `right_inverse`.
        cb_HR: C B^T.

    A = W C B^T (B C B^T)^{-1}, as the projection W B^+ plus the same refit of what that leaves over.
    """
    a_XR = w_XH @ inverse_HR
    left_XR = (w_XH - a_XR @ b_RH) @ cb_HR
    gram_RR = (b_RH @ cb_HR).double()
    root_RR = cholesky((gram_RR + gram_RR.T) / 2).to(left_XR.dtype)
    return a_XR + torch.cholesky_solve(left_XR.T, root_RR).T


def refit_down(w_HI: Tensor, target_II: Tensor, gram_II: Tensor, ridge: float) -> Tensor:
    """[H,I] in the dtype of `w_HI`: maps compressed intermediates z' to the original outputs W z, with ridge towards W.

    Args:
        w_HI: dense second projection.
        target_II: E[z z'^T] float64, original against compressed intermediates.
        gram_II: E[z' z'^T] float64.
        ridge: share of the mean diagonal of `gram_II` that is added to it.

    W + W (E[z z'^T] - E[z' z'^T]) (E[z' z'^T] + ridge I)^{-1}: the minimiser of E|W z - W' z'|^2 + ridge |W' - W|^2.
    """
    damped_II = gram_II.clone()
    damped_II.diagonal().add_(ridge * gram_II.diagonal().mean())
    change_II = torch.cholesky_solve((target_II - gram_II).T, cholesky(damped_II)).T
    return w_HI + w_HI @ change_II.to(w_HI.dtype)


def output_metric(w_HI: Tensor, slope_JJ: Tensor, channel_J: Tensor, ridge: float) -> Tensor:
    """[J,J] in the dtype of `w_HI`: what an error of the first projection costs at the expert's output, to first order.

    Args:
        w_HI: second projection W.
        slope_JJ: E[v v^T], v = dz/du the slopes of the activation.
        channel_J: int64, the channel that each row of the first projection feeds.
        ridge: share of the mean diagonal that is added to it.

    With y = W z(u) a small error d of u changes y by W (v * d), so E|dy|^2 = d^T ((W^T W)[c,c'] * E[v v^T]) d: the
    two-sided whitening of OBD-LLM without a backward pass through the model.
    """
    metric_JJ = (w_HI.T @ w_HI)[channel_J][:, channel_J] * slope_JJ.to(w_HI.dtype)
    metric_JJ.diagonal().add_(ridge * metric_JJ.diagonal().mean())
    return metric_JJ
