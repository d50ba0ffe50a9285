"""A basis: for each group of experts the R x H matrix that takes the hidden state to the latent space, or back.

Storage is orthonormal (the matrix itself) or interpolative: R of the H columns form the identity, so only their indices
(`pivots`) and the R x (H-R) other columns are stored; each direction is then a gather or scatter and a smaller product.
Shape suffixes: see `molae_compress.tensors`; N rows (tokens or routed slots), C the H-R other columns.
"""

from __future__ import annotations

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
        pivots_NR = self._columns_of_rows(self.pivots.view(self.groups, self.rank).long(), x_NW, route)
        if self.rank == self.hidden:  # no columns besides the identity
            return x_NW.new_empty(x_NW.shape).scatter(1, pivots_NR, x_NW) if self.decode else x_NW.gather(1, pivots_NR)
        rest_NC = self._columns_of_rows(self._rest_GC(), x_NW, route)
        if not self.decode:
            return x_NW.gather(1, pivots_NR) + self._product(x_NW.gather(1, rest_NC), route)
        other_NC = self._product(x_NW, route)
        y_NH = other_NC.new_empty(x_NW.shape[0], self.hidden)
        return y_NH.scatter_(1, pivots_NR, x_NW.to(y_NH.dtype)).scatter_(1, rest_NC, other_NC)

    def prepare(self) -> None:
        """Derives what follows from the pivots ahead of the first call, so that a compiled graph finds it."""
        if self.pivots is not None and not self.pivots.is_meta:
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

    def _columns_of_rows(self, columns_GC: Tensor, x_NW: Tensor, route: Route | None) -> Tensor:
        """[N,C]: the column indices of each row's group."""
        if self.groups == 1:
            return columns_GC.expand(x_NW.shape[0], -1)
        assert route is not None
        return columns_GC[route.expert_S // self.experts_per_group]

    def _rest_GC(self) -> Tensor:
        """[G,H-R] int64: the columns that are no pivots, ascending.

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
        return kept[2].long()

    @torch.no_grad()
    def _derive_rest(self) -> Tensor:
        assert self.pivots is not None
        pivots_GR = self.pivots.view(self.groups, self.rank).long()
        is_pivot_GH = torch.zeros(self.groups, self.hidden, dtype=torch.uint8, device=pivots_GR.device)
        is_pivot_GH = is_pivot_GH.scatter(1, pivots_GR, 1)
        # A stable sort puts the other columns first and leaves them in order.
        rest_GC = torch.argsort(is_pivot_GH, dim=1, stable=True)[:, : self.hidden - self.rank]
        return rest_GC.to(PIVOT_DTYPE)


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
