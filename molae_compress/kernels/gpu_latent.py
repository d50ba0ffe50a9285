"""The whole expert layer on the GPU kernels, from torch tensors: latent experts, and stock dense ones.

`csrc/gpu_launch.cc` takes the same steps for ONNX Runtime. Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molae_compress.kernels.gpu_launch import combine, few_combine, few_rows, grouped_gemm, other_columns, sort_slots
from molae_compress.kernels.gpu_operands import Columns, Matrices, Rows
from molae_compress.kernels.gpu_problem import LatentExpertsProblem
from molae_compress.kernels.gpu_tiles import FEW_TOKENS


@dataclass(frozen=True)
class _Basis:
    """The bases of one side: matrices `[G,R,W]`, their columns if interpolative, and experts of a group."""

    weight_GRW: Tensor
    columns: Columns | None
    group_size: int

    @property
    def groups(self) -> int:
        return self.weight_GRW.shape[0]


def latent_experts(problem: LatentExpertsProblem, *, deterministic: bool = True) -> Tensor:
    """`[T,H]`: what `LatentExperts` computes for one bank, by a few launches and without a gradient.

    Args:
        problem: contiguous tensors on one device.
        deterministic: sum a token's experts in a fixed order, through one row for each slot; else by atomic additions
            in fp32.
    """
    p, t = problem, problem.tensors
    stems = [(t.encode, t.encode_pivots)]
    if t.up_encode is not None:
        stems.append((t.up_encode, t.up_encode_pivots))
    bases = [_basis(weight, pivots, p.num_experts, p.input_group, p.x_TH.shape[1]) for weight, pivots in stems]
    E, R = p.num_experts, p.rank_in
    core = Matrices(
        t.core.view(E, R, -1),
        transposed=True,
        gated=p.gated,
        interleaved=p.interleaved,
        weight_up=None if t.core_up is None else t.core_up.view(E, R, -1),
        bias=t.core_bias,
        activation=p.activation,
    )
    down = Matrices(t.down.view(E, -1, t.down.shape[1]), transposed=False)
    decode = None
    if t.decode is not None:
        decode = _basis(t.decode, t.decode_pivots, E, p.output_group, p.x_TH.shape[1])
    steps: _Steps = _Few(p) if p.x_TH.shape[0] <= FEW_TOKENS else _Many(p, deterministic)
    h_SI = steps.core(core, *[steps.encode(basis) for basis in bases])
    if decode is None:
        return steps.weighted_sum(h_SI, down, 1, t.decode_bias)
    return steps.down_and_decode(h_SI, down, decode, t.decode_bias)


def dense_experts(
    x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, first: Matrices, second: Matrices, bias_EH: Tensor | None
) -> Tensor:
    """`[T,H]`: stock experts, of two matrices each.

    Args:
        x_TH: inputs, contiguous.
        index_TK: int64 expert of each slot; outside 0..E-1 it is of none.
        weight_TK: routing weights.
        first: one matrix an expert into the activation, and its bias.
        second: one out of it, without its bias.
        bias_EH: that bias.
    """
    E = first.weight.shape[0]
    if x_TH.shape[0] <= FEW_TOKENS:
        slots, top_k = index_TK.numel(), index_TK.shape[1]
        h_SI = few_rows(x_TH, first, slots, index_TK=index_TK, experts=E, gather=top_k)
        return few_combine(h_SI, second, index_TK, weight_TK, experts=E, group_size=1, bias_EN=bias_EH)
    slots_S = sort_slots(index_TK, E)
    h_SI = grouped_gemm(x_TH, first, Rows(index_TK.numel(), slots_S, 1, gather=index_TK.shape[1]))
    value_SH = grouped_gemm(h_SI, second, Rows(index_TK.numel(), slots_S, 1, scatter=1))
    return combine(
        torch.empty_like(x_TH), experts=E, value_SN=value_SH, index_TK=index_TK, weight_TK=weight_TK, bias_EN=bias_EH
    )


def _basis(weight: Tensor, pivots: Tensor | None, experts: int, group_size: int, hidden: int) -> _Basis:
    groups = experts // group_size
    columns = None if pivots is None else other_columns(pivots, groups, hidden)
    return _Basis(weight.view(groups, weight.shape[0] // groups, weight.shape[1]), columns, group_size)


class _Steps(ABC):
    """What the two ways of working share."""

    def __init__(self, problem: LatentExpertsProblem) -> None:
        self.problem = problem
        self.count, self.top_k = problem.index_TK.numel(), problem.index_TK.shape[1]
        self.encoded_once = problem.input_group == problem.num_experts

    @abstractmethod
    def all_rows(self, a: Tensor, matrices: Matrices, columns: Columns | None = None) -> Tensor:
        """All rows times the one matrix there is."""

    @abstractmethod
    def encode_slots(self, basis: _Basis) -> Tensor:
        """`[S,R]`: every slot's token times the basis of its group."""

    @abstractmethod
    def core(self, core: Matrices, z: Tensor, z_up: Tensor | None = None) -> Tensor:
        """`[S,I]` from encoded slots, or from encoded tokens."""

    @abstractmethod
    def product(self, a_SN: Tensor, matrices: Matrices, group_size: int, *, was_core: bool, by_slot: bool) -> Tensor:
        """`[S,M]` from rows as `core` leaves them, or by slot; left in the same order, or by slot."""

    @abstractmethod
    def weighted_sum(self, a_SN: Tensor, matrices: Matrices, group_size: int, bias_EN: Tensor | None) -> Tensor:
        """`[T,M]`: products of rows as `core` leaves them, summed over the experts of a token."""

    def encode(self, basis: _Basis) -> Tensor:
        """`[T,R]` if all experts share the basis, else `[S,R]`."""
        if not self.encoded_once:
            return self.encode_slots(basis)
        return self.all_rows(self.problem.x_TH, Matrices(basis.weight_GRW, transposed=False), basis.columns)

    def down_and_decode(self, h_SI: Tensor, down: Matrices, basis: _Basis, bias_EH: Tensor | None) -> Tensor:
        """`[T,H]`: the second projection, the bases, and the routed sum where it is cheapest."""
        decode, columns = Matrices(basis.weight_GRW, transposed=True), basis.columns
        if basis.groups == 1:
            return self._decode_sum(self.weighted_sum(h_SI, down, 1, None), decode, columns, bias_EH)
        if columns is None:
            u_SR = self.product(h_SI, down, 1, was_core=True, by_slot=False)
            return self.weighted_sum(u_SR, decode, basis.group_size, bias_EH)
        u_SR = self.product(h_SI, down, 1, was_core=True, by_slot=True)
        other_SC = self.product(u_SR, decode, basis.group_size, was_core=False, by_slot=True)
        return self._routed(
            torch.empty_like(self.problem.x_TH),
            value_SN=other_SC,
            kept_SR=u_SR,
            columns=columns,
            group_size=basis.group_size,
            bias_EN=bias_EH,
        )

    def _decode_sum(self, u_TR: Tensor, decode: Matrices, columns: Columns | None, bias_EH: Tensor | None) -> Tensor:
        """`[T,H]`: routed sums in latent space through the one basis."""
        y_TH = self.all_rows(u_TR, decode)
        if columns is not None:
            y_TH = combine(torch.empty_like(self.problem.x_TH), value_SN=y_TH, kept_SR=u_TR, columns=columns)
        return y_TH if bias_EH is None else self._routed(y_TH, base_TN=y_TH, bias_EN=bias_EH)

    def _routed(self, out_TN: Tensor, **terms: Any) -> Tensor:
        p = self.problem
        return combine(out_TN, experts=p.num_experts, index_TK=p.index_TK, weight_TK=p.weight_TK, **terms)


class _Many(_Steps):
    """Many tokens: slots sorted by expert, rows of an expert multiplied together; what `core` leaves is sorted."""

    def __init__(self, problem: LatentExpertsProblem, deterministic: bool) -> None:
        super().__init__(problem)
        self.slots, self.deterministic = sort_slots(problem.index_TK, problem.num_experts), deterministic

    def all_rows(self, a: Tensor, matrices: Matrices, columns: Columns | None = None) -> Tensor:
        return grouped_gemm(a, matrices, Rows(a.shape[0]), columns=columns)

    def encode_slots(self, basis: _Basis) -> Tensor:
        rows = Rows(self.count, self.slots, basis.group_size, gather=self.top_k)
        return grouped_gemm(self.problem.x_TH, Matrices(basis.weight_GRW, transposed=False), rows, columns=basis.columns)

    def core(self, core: Matrices, z: Tensor, z_up: Tensor | None = None) -> Tensor:
        return grouped_gemm(z, core, Rows(self.count, self.slots, 1, gather=self.top_k * self.encoded_once), a_up=z_up)

    def product(self, a_SN: Tensor, matrices: Matrices, group_size: int, *, was_core: bool, by_slot: bool) -> Tensor:
        return grouped_gemm(a_SN, matrices, Rows(self.count, self.slots, group_size, int(not was_core), int(by_slot)))

    def weighted_sum(self, a_SN: Tensor, matrices: Matrices, group_size: int, bias_EN: Tensor | None) -> Tensor:
        p = self.problem
        out_TM = a_SN.new_empty(p.x_TH.shape[0], matrices.width)
        if self.deterministic:
            rows = Rows(self.count, self.slots, group_size, scatter=1)
            return self._routed(out_TM, value_SN=grouped_gemm(a_SN, matrices, rows), bias_EN=bias_EN)
        sum_TM = torch.zeros_like(out_TM, dtype=torch.float32)
        rows = Rows(self.count, self.slots, group_size, scatter=self.top_k)
        grouped_gemm(a_SN, matrices, rows, row_weight=p.weight_TK, add_to=sum_TM)
        return self._routed(out_TM, base_TN=sum_TM, bias_EN=bias_EN)


class _Few(_Steps):
    """A few tokens: each slot by itself, nothing sorted, rows by slot throughout."""

    def all_rows(self, a: Tensor, matrices: Matrices, columns: Columns | None = None) -> Tensor:
        return few_rows(a, matrices, a.shape[0], columns=columns)

    def encode_slots(self, basis: _Basis) -> Tensor:
        matrices = Matrices(basis.weight_GRW, transposed=False)
        return self._of_slots(self.problem.x_TH, matrices, basis.group_size, self.top_k, columns=basis.columns)

    def core(self, core: Matrices, z: Tensor, z_up: Tensor | None = None) -> Tensor:
        return self._of_slots(z, core, 1, self.top_k if self.encoded_once else 1, a_up=z_up)

    def product(self, a_SN: Tensor, matrices: Matrices, group_size: int, *, was_core: bool, by_slot: bool) -> Tensor:
        return self._of_slots(a_SN, matrices, group_size, 1)

    def weighted_sum(self, a_SN: Tensor, matrices: Matrices, group_size: int, bias_EN: Tensor | None) -> Tensor:
        p = self.problem
        return few_combine(
            a_SN, matrices, p.index_TK, p.weight_TK, experts=p.num_experts, group_size=group_size, bias_EN=bias_EN
        )

    def down_and_decode(self, h_SI: Tensor, down: Matrices, basis: _Basis, bias_EH: Tensor | None) -> Tensor:
        if basis.columns is None:  # the sum over experts, one basis or many, and the bias in the launch of the product
            u_SR = self.product(h_SI, down, 1, was_core=True, by_slot=True)
            return self.weighted_sum(u_SR, Matrices(basis.weight_GRW, transposed=True), basis.group_size, bias_EH)
        return super().down_and_decode(h_SI, down, basis, bias_EH)

    def _of_slots(self, a: Tensor, matrices: Matrices, group_size: int, gather: int, **inputs: Any) -> Tensor:
        p = self.problem
        return few_rows(
            a,
            matrices,
            self.count,
            index_TK=p.index_TK,
            experts=p.num_experts,
            group_size=group_size,
            gather=gather,
            **inputs,
        )
