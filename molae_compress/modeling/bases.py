"""A basis: for each group of experts the R x H matrix that takes the hidden state to the latent space, or back.

Storage is orthonormal (the matrix itself) or interpolative: R of the H columns form the identity, so only their indices
(`pivots`) and the R x (H-R) other columns are stored; each direction is then a gather or scatter and a smaller product.
Shape suffixes: see `molae_compress.tensors`; N rows (tokens or routed slots), C the H-R other columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from molae_compress.modeling.routed import Route, routed_linear
from molae_compress.tensors import PIVOT_DTYPE, Storage


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
        columns = (self.pivots.view(self.groups, self.rank), self._rest_GC(), self._group_of_rows(route))
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

    def _group_of_rows(self, route: Route | None) -> Tensor | None:
        """[N]: which basis each row has; None where all have the same."""
        if self.groups == 1:
            return None
        assert route is not None
        return route.expert_S if self.experts_per_group == 1 else route.expert_S // self.experts_per_group

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


def _split(x_NH: Tensor, pivots_GR: Tensor, rest_GC: Tensor, group_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """[N,R] and [N,C]: of each row the columns that are pivots of its group, and the others."""
    if torch.is_grad_enabled() and x_NH.requires_grad:
        parts: tuple[Tensor, Tensor] = _Split.apply(x_NH, pivots_GR, rest_GC, group_N)  # type: ignore[no-untyped-call]
        return parts
    return _Split.forward(x_NH, pivots_GR, rest_GC, group_N)


def _joined(x_NR: Tensor, x_NC: Tensor, pivots_GR: Tensor, rest_GC: Tensor, group_N: Tensor | None) -> Tensor:
    """[N,H]: the opposite of `_split`."""
    if torch.is_grad_enabled() and (x_NR.requires_grad or x_NC.requires_grad):
        y_NH: Tensor = _Join.apply(x_NR, x_NC, pivots_GR, rest_GC, group_N)  # type: ignore[no-untyped-call]
        return y_NH
    return _Join.forward(x_NR, x_NC, pivots_GR, rest_GC, group_N)


def _columns_of_rows(columns_GC: Tensor, group_N: Tensor | None, rows: int) -> Tensor:
    """[N,C] int64: the column indices of each row's group."""
    return columns_GC.long().expand(rows, -1) if group_N is None else columns_GC[group_N].long()


class _Split(torch.autograd.Function):
    """`_split`; each of the two is the gradient of the other.

    Operations of torch would keep the column indices of every row for the backward pass, 64 bits each: more memory than
    the rows. Kept are the indices of the groups, which are stored anyway, and the group of every row.
    """

    @staticmethod
    def forward(x_NH: Tensor, pivots_GR: Tensor, rest_GC: Tensor, group_N: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = x_NH.shape[0]
        x_NR = x_NH.gather(1, _columns_of_rows(pivots_GR, group_N, rows))
        return x_NR, x_NH.gather(1, _columns_of_rows(rest_GC, group_N, rows))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _joined(*gradients, *ctx.saved_tensors), None, None, None


class _Join(torch.autograd.Function):
    """`_joined`; see `_Split`."""

    @staticmethod
    def forward(x_NR: Tensor, x_NC: Tensor, pivots_GR: Tensor, rest_GC: Tensor, group_N: Tensor | None) -> Tensor:
        rows = x_NR.shape[0]
        y_NH = x_NC.new_empty(rows, x_NR.shape[1] + x_NC.shape[1])
        y_NH.scatter_(1, _columns_of_rows(pivots_GR, group_N, rows), x_NR)
        return y_NH.scatter_(1, _columns_of_rows(rest_GC, group_N, rows), x_NC)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *_split(gradients[0], *ctx.saved_tensors), None, None, None


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
