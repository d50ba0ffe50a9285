"""What each GPU kernel computes, said as plainly as possible: one loop over rows in fp32, for tests to compare with.

Shape suffixes: see `molae_compress.tensors`; N and M are widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from molae_compress.kernels.activation import IDENTITY, Activation
from molae_compress.kernels.gpu_problem import LatentExpertsProblem


def sorted_slots(index_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(slot of each row, one past the last row of each expert), by a stable sort."""
    expert_S = index_TK.flatten()
    expert_S = torch.where((expert_S >= 0) & (expert_S < experts), expert_S, experts)
    order_S = torch.sort(expert_S, stable=True).indices
    return order_S.int(), torch.bincount(expert_S, minlength=experts + 1)[:experts].cumsum(0).int()


def columns(pivots_GR: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """(the other columns of each group, ascending; where every column lies in (pivots, others))."""
    rest, position = [], []
    for pivots_R in pivots_GR.tolist():
        others = [column for column in range(hidden) if column not in pivots_R]
        rest.append(others)
        position.append([(pivots_R + others).index(column) for column in range(hidden)])
    return torch.tensor(rest, dtype=torch.int32), torch.tensor(position, dtype=torch.int32)


def gated(h_J: Tensor, activation: Activation, *, is_gated: bool, interleaved: bool) -> Tensor:
    """`[I]`: the activation of the rows of one first projection."""
    if not is_gated:
        return activation(h_J)
    gate_I, up_I = (h_J[0::2], h_J[1::2]) if interleaved else h_J.chunk(2)
    return activation(gate_I, up_I)


def product(
    a_N: Tensor,
    matrix_MN: Tensor,
    bias_M: Tensor | None = None,
    activation: Activation = IDENTITY,
    *,
    is_gated: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """One row of a grouped product, in fp32."""
    h_M = matrix_MN.float() @ a_N.float()
    if bias_M is not None:
        h_M = h_M + bias_M.float()
    return gated(h_M, activation, is_gated=is_gated, interleaved=interleaved)


def basis(weight: Tensor, pivots: Tensor | None, group: int, rank: int, hidden: int) -> Tensor:
    """`[R,H]` fp32: the basis of one group written out."""
    stored = weight[group * rank : (group + 1) * rank].float()
    if pivots is None:
        return stored
    pivots_R = pivots[group * rank : (group + 1) * rank].long()
    matrix_RH = torch.zeros(rank, hidden)
    rest = [column for column in range(hidden) if column not in pivots_R.tolist()]
    matrix_RH[torch.arange(rank), pivots_R] = 1.0
    matrix_RH[:, rest] = stored
    return matrix_RH


def latent_experts(problem: LatentExpertsProblem) -> Tensor:
    """`[T,H]` fp32: token by token and expert by expert."""
    p, t = problem, problem.tensors
    y_TH = torch.zeros(p.x_TH.shape, dtype=torch.float32)
    E, R, H = p.num_experts, p.rank_in, p.x_TH.shape[1]
    rows_out = p.rank_out or H
    for token, k in ((token, k) for token in range(p.index_TK.shape[0]) for k in range(p.index_TK.shape[1])):
        e = int(p.index_TK[token, k])
        if not 0 <= e < E:
            continue
        branches = [(t.encode, t.encode_pivots, t.core)]
        if t.up_encode is not None and t.core_up is not None:
            branches.append((t.up_encode, t.up_encode_pivots, t.core_up))
        parts = [
            core[e * R : (e + 1) * R].float().T @ basis(weight, pivots, e // p.input_group, R, H) @ p.x_TH[token].float()
            for weight, pivots, core in branches
        ]
        joined = torch.stack(parts, 1).flatten() if p.interleaved and len(parts) == 2 else torch.cat(parts)
        h_J = joined if t.core_bias is None else joined + t.core_bias[e].float()
        h_I = gated(h_J, p.activation, is_gated=p.gated, interleaved=p.interleaved)
        y_H = t.down[e * rows_out : (e + 1) * rows_out].float() @ h_I
        if t.decode is not None:
            y_H = basis(t.decode, t.decode_pivots, e // p.output_group, rows_out, H).T @ y_H
        if t.decode_bias is not None:
            y_H = y_H + t.decode_bias[e].float()
        y_TH[token] += p.weight_TK[token, k].float() * y_H
    return y_TH
