"""The same fit, slow and obvious: what the tests compare the fast routines with.

Loops over tokens, symmetric square roots, singular value decompositions of whole stacks and general least squares, all
in float64 on the CPU, written from the definitions and sharing no routine with the solver. Results are effective dense
weights (core times basis), because bases are only defined up to an invertible factor.
Shape suffixes: N rows of one sample, X rows of one input branch; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

from molae_compress.solver.allocate import Curve
from molae_compress.solver.population import Calibrated
from molae_compress.solver.spectra import Fit
from molae_compress.tensors import DenseExperts, LatentShape


def moments(x_ND: Iterable[Tensor], w_N: Iterable[float]) -> Tensor:
    """[D,D]: E[x x^T] under weights, row by row."""
    total, gram_DD = 0.0, torch.zeros(0)
    for x_D, w in zip(x_ND, w_N, strict=True):
        gram_DD = gram_DD + w * torch.outer(x_D, x_D) if total else w * torch.outer(x_D, x_D)
        total += w
    return gram_DD / total


def shrunk(c_DD: Tensor, share: float) -> Tensor:
    """(1 - share) C + share tr(C)/D I."""
    return (1 - share) * c_DD + share * torch.trace(c_DD) / len(c_DD) * torch.eye(len(c_DD), dtype=c_DD.dtype)


def root(c_DD: Tensor) -> Tensor:
    """The symmetric positive semidefinite square root."""
    energy_D, vectors_DD = torch.linalg.eigh(c_DD)
    root_DD: Tensor = vectors_DD @ torch.diag(energy_D.clamp_min(0).sqrt()) @ vectors_DD.T
    return root_DD


def slot_weight(samples: Calibrated, token: int, slot: int) -> float:
    """What a squared error in one slot counts, before the mean over tokens."""
    gate = float(samples.gate_TK[token, slot])
    power = {"squared": gate**2, "linear": abs(gate), "none": 1.0}[samples.weighting]
    return power * float(samples.token_T[token])


def slots_of(samples: Calibrated, experts: Iterable[int]) -> list[tuple[int, float]]:
    """(token, weight) of every slot routed to one of the experts."""
    wanted, tokens, top_k = set(experts), len(samples.x_TH), samples.index_TK.shape[1]
    return [
        (token, slot_weight(samples, token, slot))
        for token in range(tokens)
        for slot in range(top_k)
        if int(samples.index_TK[token, slot]) in wanted
    ]


def covariance(samples: Calibrated, experts: Sequence[int], ridge: float) -> Tensor:
    """[H,H]: inputs of some experts and of the layer, both shrunk towards the identity, mixed by n / (n + kappa H)."""
    x_TH, hidden = samples.x_TH.double(), samples.x_TH.shape[1]
    everything = slots_of(samples, range(samples.num_experts))
    c_HH = moments((x_TH[t] for t, _ in everything), (w for _, w in everything))
    ridge = ridge * flatness(c_HH, len(everything))
    c_HH = shrunk(c_HH, with_noise(ridge, len(everything), 4 * hidden))
    own = slots_of(samples, experts)
    if own and len(experts) < samples.num_experts:
        share = len(own) / (len(own) + samples.shrinkage * hidden)
        own_HH = moments((x_TH[t] for t, _ in own), (w for _, w in own))
        c_HH = share * shrunk(own_HH, with_noise(ridge, len(own), 4 * hidden)) + (1 - share) * c_HH
    return c_HH


def with_noise(ridge: float, count: int, size: int) -> float:
    """A share of the identity, and of what is left the share that n rows cannot earn; `size` is D, or 4 D of inputs."""
    return ridge + (1 - ridge) * size / (count + size)


def output_noise(samples: Calibrated, expert: int, size: int, ridge: float) -> float:
    """Share of the identity in moments of an expert's intermediates: its own and the layer's, mixed as the moments are."""
    own, everything = (len(slots_of(samples, experts)) for experts in ([expert], range(samples.num_experts)))
    share = own / (own + samples.shrinkage * size)
    return share * with_noise(ridge, own, size) + (1 - share) * with_noise(ridge, everything, size)


def flatness(c_HH: Tensor, count: int) -> float:
    """Geometric over arithmetic mean of the eigenvalues, noise of H / n for n routed tokens added to each; at most 1."""
    values_H = torch.linalg.eigvalsh(c_HH)
    if values_H.mean() <= 0:
        return 1.0
    noisy_H = values_H + len(c_HH) / max(1, count) * values_H.mean()
    return min(1.0, float(noisy_H.prod() ** (1 / len(c_HH)) / values_H.mean()))


def sample(samples: Calibrated, expert: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows [N,H] and weights [N]: the expert's tokens, and all tokens of the layer in the share it has not earned."""
    own, top_k = slots_of(samples, [expert]), samples.index_TK.shape[1]
    share = len(own) / (len(own) + samples.shrinkage * size)
    own_w = torch.tensor([w for _, w in own], dtype=torch.float64)
    pool_w = torch.tensor(
        [
            sum(slot_weight(samples, t, k) for k in range(top_k) if samples.index_TK[t, k] < samples.num_experts)
            for t in range(len(samples.x_TH))
        ],
        dtype=torch.float64,
    )
    tokens = [t for t, _ in own] + list(range(len(samples.x_TH)))
    return samples.x_TH.double()[tokens], torch.cat([share * own_w / own_w.sum(), (1 - share) * pool_w / pool_w.sum()])


def intermediate(dense: DenseExperts, w_JH: Tensor, expert: int, x_NH: Tensor) -> Tensor:
    """[N,I]: intermediates of one expert with another first projection."""
    bias_J = 0.0 if dense.bias_in_EJ is None else dense.bias_in_EJ[expert].double()
    return dense.activate(x_NH @ w_JH.T + bias_J)


def output_metric(dense: DenseExperts, expert: int, x_NH: Tensor, p_N: Tensor, ridge: float) -> Tensor:
    """[J,J]: E[(W dz/du)^T (W dz/du)], from the Jacobian of every row."""
    bias_J = 0.0 if dense.bias_in_EJ is None else dense.bias_in_EJ[expert].double()
    w_HI, metric_JJ = dense.w_out_EHI[expert].double(), torch.zeros(0)
    for x_H, p in zip(x_NH, p_N, strict=True):
        u_J = dense.w_in_EJH[expert].double() @ x_H + bias_J
        jacobian_IJ = torch.autograd.functional.jacobian(lambda u: dense.activate(u[None])[0], u_J)
        part_JJ = p * (w_HI @ jacobian_IJ).T @ (w_HI @ jacobian_IJ)
        metric_JJ = metric_JJ + part_JJ if len(metric_JJ) else part_JJ
    return metric_JJ + ridge * torch.trace(metric_JJ) / len(metric_JJ) * torch.eye(len(metric_JJ), dtype=torch.float64)


def input_basis(weights: Sequence[Tensor], metrics: Sequence[Tensor], c_HH: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Basis [R,H] and squared singular values of the stack of all H_i^{1/2} W_i C^{1/2}."""
    stack_NH = torch.cat([root(h_XX) @ w_XH @ root(c_HH) for w_XH, h_XX in zip(weights, metrics, strict=True)])
    _, sigma_M, right_MH = torch.linalg.svd(stack_NH)
    return right_MH[:rank] @ torch.linalg.inv(root(c_HH)), sigma_M.square()


def output_basis(factors_HN: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal basis [H,R] and squared singular values of the factors beside each other."""
    left_HH, sigma_M, _ = torch.linalg.svd(torch.cat(list(factors_HN), dim=1))
    return left_HH[:, :rank], sigma_M.square()


def refit_core(w_XH: Tensor, b_RH: Tensor, c_HH: Tensor) -> Tensor:
    """[X,R]: argmin over A of |(W - A B) C^{1/2}|, by general least squares."""
    a_RX: Tensor = torch.linalg.lstsq((b_RH @ root(c_HH)).T, (w_XH @ root(c_HH)).T, driver="gelsd").solution
    return a_RX.T


def refit_down(w_HI: Tensor, z_NI: Tensor, own_NI: Tensor, p_N: Tensor, ridge: float) -> Tensor:
    """[H,I]: argmin over W' of E|W z - W' z'|^2 + ridge E|z'|^2/I |W' - W|^2, by general least squares."""
    level = ridge * float((p_N[:, None] * own_NI.square()).sum()) / own_NI.shape[1]
    damping_II = level**0.5 * torch.eye(own_NI.shape[1], dtype=torch.float64)
    left = torch.cat([p_N[:, None].sqrt() * own_NI, damping_II])
    right = torch.cat([p_N[:, None].sqrt() * z_NI, damping_II]) @ w_HI.T
    down_IH: Tensor = torch.linalg.lstsq(left, right, driver="gelsd").solution
    return down_IH.T


def importance(samples: Calibrated) -> list[float]:
    """What the output error of each expert counts: in part its own slots, in part those of the average one."""
    own = [sum(w for _, w in slots_of(samples, [e])) / len(samples.x_TH) for e in range(samples.num_experts)]
    return [(1 - samples.even) * weight + samples.even * sum(own) / len(own) for weight in own]


def solve_layer(dense: DenseExperts, samples: Calibrated, shape: LatentShape, fit: Fit) -> tuple[Tensor, Tensor]:
    """Effective weights [E,J,H] and [E,H,I] float64 of the latent layer that `layer.solve_layer` finds."""
    w_in_EJH, w_out_EHI = dense.w_in_EJH.double().clone(), dense.w_out_EHI.double().clone()
    spec, total = dense.spec, len(samples.x_TH)
    weights = importance(samples)
    branches = spec.gate_rows() if shape.gate_up == "separate" else (torch.arange(spec.rows),)
    for start in range(0, spec.num_experts, shape.input_group):
        group = range(start, start + shape.input_group)
        c_HH = covariance(samples, group, fit.ridge_in)
        for rows_X in branches:
            metrics = []
            for e in group:
                metric_JJ = torch.eye(spec.rows, dtype=torch.float64)
                if fit.metric == "two-sided":
                    metric_JJ = output_metric(dense, e, *sample(samples, e, spec.rows), fit.ridge_metric)
                metrics.append(weights[e] * metric_JJ[rows_X][:, rows_X])
            dense_weights = [dense.w_in_EJH[e].double()[rows_X] for e in group]
            b_RH, _ = input_basis(dense_weights, metrics, c_HH, shape.rank_in)
            for e, w_XH in zip(group, dense_weights, strict=True):
                own_HH = covariance(samples, [e], fit.ridge_in) if fit.cores else c_HH
                w_in_EJH[e, rows_X] = refit_core(w_XH, b_RH, own_HH) @ b_RH
    for start in range(0, spec.num_experts, shape.output_group):
        group = range(start, start + shape.output_group)
        factors = []
        for e in group:
            x_NH, p_N = sample(samples, e, spec.intermediate)
            own_NI = intermediate(dense, w_in_EJH[e], e, x_NH)
            ridge = output_noise(samples, e, spec.intermediate, fit.ridge_out)
            if fit.down:
                z_NI = intermediate(dense, dense.w_in_EJH[e].double(), e, x_NH)
                w_out_EHI[e] = refit_down(w_out_EHI[e], z_NI, own_NI, p_N, ridge)
            q_II = shrunk(moments(own_NI, p_N.tolist()), ridge)
            factors.append(w_out_EHI[e] @ root(q_II) * weights[e] ** 0.5)
        if fit.output == "combined":
            factors = [routed_sum(dense, samples, w_in_EJH, w_out_EHI, group).T / total**0.5]
        if shape.rank_out is not None:
            d_HR, _ = output_basis(factors, shape.rank_out)
            for e in group:
                w_out_EHI[e] = d_HR @ d_HR.T @ w_out_EHI[e]
    return w_in_EJH, w_out_EHI


def routed_sum(
    dense: DenseExperts, samples: Calibrated, w_in_EJH: Tensor, w_out_EHI: Tensor, experts: Iterable[int]
) -> Tensor:
    """[T,H]: per token the gated sum of some experts' outputs without output biases, over the residual norm."""
    wanted = set(experts)
    y_TH = torch.zeros(samples.x_TH.shape, dtype=torch.float64)
    for token, slot in product(range(len(y_TH)), range(samples.index_TK.shape[1])):
        e = int(samples.index_TK[token, slot])
        if e in wanted:
            z_1I = intermediate(dense, w_in_EJH[e].double(), e, samples.x_TH[token : token + 1].double())
            y_TH[token] += float(samples.gate_TK[token, slot]) * (w_out_EHI[e].double() @ z_1I[0])
    return y_TH * samples.token_T.double().sqrt()[:, None]


def allocate(curves: Sequence[Curve], budget: int) -> float | None:
    """Least total error of any choice within the budget, by trying them all; None if nothing fits."""
    return min(
        (
            sum(curve.errors[k] for curve, k in zip(curves, picks, strict=True))
            for picks in product(*(range(len(curve.costs)) for curve in curves))
            if sum(curve.costs[k] for curve, k in zip(curves, picks, strict=True)) <= budget
        ),
        default=None,
    )
