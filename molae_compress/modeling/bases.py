"""A basis: for each group of experts the R x H matrix that takes the hidden state to the latent space, or back.

Storage is orthonormal (the matrix itself) or interpolative: R of the H columns form the identity, so only their indices
(`pivots`) and the R x (H-R) other columns are stored; each direction is then a gather or scatter and a smaller product.
Shape suffixes: see `molae_compress.tensors`; N rows (tokens or routed slots), C the H-R other columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from molae_compress.kernels.cpu_experts import is_recorded
from molae_compress.modeling.routed import Route, routed_linear
from molae_compress.tensors import PIVOT_DTYPE, Storage

# Rows of a group on a CPU from which on one call for each group is cheaper than an index for every number of every row.
_ROWS = 8


class Basis(nn.Module):
    """The bases of one side of a latent experts module.

    Not an `nn.Linear`: adapters that wrap linear layers would wrap it without being able to follow the groups.

    Args:
        groups: G.
        experts_per_group: group of expert e is e // experts_per_group.
        rank: R.
        hidden: H.
        storage: `orthonormal` or `interpolative`.
        decode: map R -> H (the transposed basis) instead of H -> R.
        device: where the empty parameters are made.
        dtype: their type.
    """

    pivots: Tensor | None

    def __init__(
        self,
        groups: int,
        experts_per_group: int,
        rank: int,
        hidden: int,
        storage: Storage,
        *,
        decode: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.groups, self.experts_per_group, self.rank, self.hidden = groups, experts_per_group, rank, hidden
        self.decode = decode
        width = hidden if storage == "orthonormal" else hidden - rank
        self.weight = nn.Parameter(torch.empty(groups * rank, width, device=device, dtype=dtype))
        pivots = torch.empty(groups * rank, device=device, dtype=PIVOT_DTYPE) if storage == "interpolative" else None
        self.register_buffer("pivots", pivots)
        self._derived: tuple[Tensor, int, Tensor] | None = None

    def forward(self, x_NW: Tensor, route: Route | None = None) -> Tensor:
        """Encodes `[N,H]` to `[N,R]`, or decodes `[N,R]` to `[N,H]`.

        Args:
            x_NW: rows in the order of `route`.
            route: expert of each row; may be absent with one group, where all rows share the basis.
        """
        if self.pivots is None:
            return self._product(x_NW, route)
        columns = (self.pivots.view(self.groups, self.rank), self._rest_GC(), *self._groups_of(x_NW, route))
        if self.decode:
            other_NC = self._product(x_NW, route) if self.rank < self.hidden else x_NW[:, :0]
            return _joined(x_NW.to(other_NC.dtype), other_NC, *columns)
        x_NR, x_NC = _split(x_NW, *columns)
        return x_NR + self._product(x_NC, route) if self.rank < self.hidden else x_NR

    def prepare(self) -> None:
        """Derives what follows from the pivots ahead of the first call, so that a compiled graph finds it."""
        if self.pivots is not None and not self.pivots.is_meta:
            # off the file that they may be mapped from: in another type, nothing else would keep it in memory
            self.pivots = self.pivots.clone()
            self._rest_GC()

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        storage = "orthonormal" if self.pivots is None else "interpolative"
        return f"groups={self.groups}, rank={self.rank}, hidden={self.hidden}, decode={self.decode}, {storage}"

    def _product(self, x_NW: Tensor, route: Route | None) -> Tensor:
        """Rows times the stored part of their basis: `weight^T` to encode, `weight` to decode."""
        weight_GRW = self.weight.view(self.groups, self.rank, -1)
        if self.groups == 1:
            return x_NW @ (weight_GRW[0] if self.decode else weight_GRW[0].T)
        assert route is not None
        return routed_linear(x_NW, weight_GRW, route, self.experts_per_group, transposed=self.decode)

    def _groups_of(self, x_NW: Tensor, route: Route | None) -> tuple[Tensor | None, Tensor | None]:
        """[N]: which basis each row has, None for the only one; [G]: one past the last row of each where a loop pays."""
        if self.groups == 1:
            return None, None
        assert route is not None
        size, ends_E = self.experts_per_group, route.ends_E
        group_N = route.expert_S if size == 1 else route.expert_S // size
        many = x_NW.device.type == "cpu" and not is_recorded() and x_NW.shape[0] >= _ROWS * self.groups
        return group_N, ends_E[size - 1 :: size] if many and ends_E is not None else None

    def _rest_GC(self) -> Tensor:
        """[G,H-R] int32: the columns that are no pivots, ascending.

        Kept as long as the pivots are the very same tensor: it is not a buffer, because loading, offloading and moving
        a model would have to bring it up to date in as many places.
        """
        assert self.pivots is not None
        compiling = torch.compiler.is_compiling()
        # Writes into a tensor are counted, but not for tensors made in inference mode, nor visible to the compiler.
        version = 0 if compiling or self.pivots.is_inference() else self.pivots._version
        kept = self._derived
        if kept is None or kept[0] is not self.pivots or not (compiling or kept[1] == version):
            kept = (self.pivots, version, self._derive_rest())
            if not compiling:
                self._derived = kept
        return kept[2]

    @torch.no_grad()
    def _derive_rest(self) -> Tensor:
        assert self.pivots is not None
        pivots_GR = self.pivots.view(self.groups, self.rank).long()
        is_pivot_GH = torch.zeros(self.groups, self.hidden, dtype=torch.uint8, device=pivots_GR.device)
        is_pivot_GH = is_pivot_GH.scatter(1, pivots_GR, 1)
        # A stable sort puts the other columns first and leaves them in order.
        rest_GC = torch.argsort(is_pivot_GH, dim=1, stable=True)[:, : self.hidden - self.rank]
        return rest_GC.to(PIVOT_DTYPE)


def _split(
    x_NH: Tensor, pivots_GR: Tensor, rest_GC: Tensor, group_N: Tensor | None, ends_G: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[N,R] and [N,C]: of each row the columns that are pivots of its group, and the others."""
    if torch.is_grad_enabled() and x_NH.requires_grad:
        parts: tuple[Tensor, Tensor] = _Split.apply(x_NH, pivots_GR, rest_GC, group_N, ends_G)  # type: ignore[no-untyped-call]
        return parts
    return _Split.forward(x_NH, pivots_GR, rest_GC, group_N, ends_G)


def _joined(
    x_NR: Tensor, x_NC: Tensor, pivots_GR: Tensor, rest_GC: Tensor, group_N: Tensor | None, ends_G: Tensor | None
) -> Tensor:
    """[N,H]: the opposite of `_split`."""
    if torch.is_grad_enabled() and (x_NR.requires_grad or x_NC.requires_grad):
        y_NH: Tensor = _Join.apply(x_NR, x_NC, pivots_GR, rest_GC, group_N, ends_G)  # type: ignore[no-untyped-call]
        return y_NH
    return _Join.forward(x_NR, x_NC, pivots_GR, rest_GC, group_N, ends_G)


def _take(x_NH: Tensor, columns_GC: Tensor, group_N: Tensor | None, ends_G: Tensor | None) -> Tensor:
    """[N,C]: of each row the columns of its group."""
    if group_N is None:
        return x_NH.index_select(1, columns_GC[0])
    if ends_G is None:
        return x_NH.gather(1, columns_GC[group_N].long())
    y_NC, start = x_NH.new_empty(x_NH.shape[0], columns_GC.shape[1]), 0
    for columns_C, end in zip(columns_GC, ends_G.tolist(), strict=True):
        if start < end:
            torch.index_select(x_NH[start:end], 1, columns_C, out=y_NC[start:end])
        start = end
    return y_NC


def _put(y_NH: Tensor, x_NC: Tensor, columns_GC: Tensor, group_N: Tensor | None, ends_G: Tensor | None) -> None:
    """Writes each row into the columns of its group."""
    if group_N is None:
        y_NH.index_copy_(1, columns_GC[0].long(), x_NC)
    elif ends_G is None:
        y_NH.scatter_(1, columns_GC[group_N].long(), x_NC)
    else:
        start = 0
        for columns_C, end in zip(columns_GC.long(), ends_G.tolist(), strict=True):
            if start < end:
                y_NH[start:end].index_copy_(1, columns_C, x_NC[start:end])
            start = end


class _Split(torch.autograd.Function):
    """`_split`; each of the two is the gradient of the other.

    Operations of torch would keep the column indices of every row for the backward pass, 64 bits each: more memory than
    the rows. Kept are the indices of the groups, which are stored anyway, and the group of every row.
    """

    @staticmethod
    def forward(
        x_NH: Tensor, pivots_GR: Tensor, rest_GC: Tensor, group_N: Tensor | None, ends_G: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return _take(x_NH, pivots_GR, group_N, ends_G), _take(x_NH, rest_GC, group_N, ends_G)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _joined(*gradients, *ctx.saved_tensors), None, None, None, None


class _Join(torch.autograd.Function):
    """`_joined`; see `_Split`."""

    @staticmethod
    def forward(
        x_NR: Tensor, x_NC: Tensor, pivots_GR: Tensor, rest_GC: Tensor, group_N: Tensor | None, ends_G: Tensor | None
    ) -> Tensor:
        y_NH = x_NC.new_empty(x_NR.shape[0], x_NR.shape[1] + x_NC.shape[1])
        _put(y_NH, x_NR, pivots_GR, group_N, ends_G)
        _put(y_NH, x_NC, rest_GC, group_N, ends_G)
        return y_NH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *_split(gradients[0], *ctx.saved_tensors), None, None, None, None


def basis_matrix(weight: Tensor, pivots: Tensor | None, *, groups: int, hidden: int) -> Tensor:
    """[G,R,H]: the bases of a side written out, from the stored tensors."""
    rank = weight.shape[0] // groups
    weight_GRW = weight.view(groups, rank, weight.shape[1])
    if pivots is None:
        return weight_GRW
    pivots_GR = pivots.view(groups, rank).long()
    matrix_GRH = weight.new_zeros(groups, rank, hidden)
    for g in range(groups):
        is_rest_H = torch.ones(hidden, dtype=torch.bool, device=weight.device)
        is_rest_H[pivots_GR[g]] = False
        matrix_GRH[g, :, pivots_GR[g]] = torch.eye(rank, dtype=weight.dtype, device=weight.device)
        matrix_GRH[g, :, is_rest_H] = weight_GRW[g]
    return matrix_GRH
