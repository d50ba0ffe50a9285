"""Matrix products in which every row has its own expert, on any of transformers' experts backends.

Rows are routed slots: token t has K of them, one per expert it uses. Neighbouring experts may share a matrix (a group);
since groups are contiguous, one sort of the slots by expert serves every group size. Shape suffixes: see
`molae_compress.tensors`; N and M are widths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Semi-private helpers of transformers, imported in this one place.
from transformers.integrations.moe import _batched_linear, _grouped_linear

from molae_compress.kernels import cpu_experts
from molae_compress.kernels.gpu_experts import NAME

BACKENDS = ("eager", "batched_mm", "grouped_mm", NAME)
ALIGNMENT = 16  # bytes; grouped GEMM kernels refuse rows of other lengths


class Route(NamedTuple):
    """The expert of every slot, in the order in which slots are computed.

    Some slots may be strangers': of experts that are not among the E. Where the number of rows may depend on data they
    are left out. In a compiled graph, and where counting them would make the device wait, they come last and are
    not computed (with `batched_mm` they are, in vain).

    Attributes:
        backend: one of `BACKENDS`.
        expert_S: expert of each row; ascending, except for `batched_mm`.
        token_S: token of each row.
        back_S: row of each slot `(token, k)`; None if rows are in the order of slots, or some slots have none.
        ends_E: int32, one past the last row of each expert; None for `batched_mm`.
        stranger_S1: rows of strangers; None if there are none.
        slot_S: slot of each row, and the number of slots, where strangers have no row.
    """

    backend: str
    expert_S: Tensor
    token_S: Tensor
    back_S: Tensor | None
    ends_E: Tensor | None
    stranger_S1: Tensor | None = None
    slot_S: tuple[Tensor, int] | None = None

    def without_strangers(self, y_SN: Tensor) -> Tensor:
        """Rows with zeros for strangers, which kernels leave undefined in both directions."""
        return y_SN if self.stranger_S1 is None else y_SN.masked_fill(self.stranger_S1, 0.0)

    def restore(self, y_SN: Tensor, top_k: int) -> Tensor:
        """[T,K,N]: rows back in the order of tokens, with zeros where a slot has none."""
        if self.slot_S is not None:
            slot_S, slots = self.slot_S
            y_SN = y_SN.new_zeros(slots, y_SN.shape[1]).index_copy(0, slot_S, y_SN)
        elif self.back_S is not None:
            y_SN = y_SN[self.back_S]
        return y_SN.view(-1, top_k, y_SN.shape[-1])

    def slot_of_rows(self, slots: int) -> Tensor:
        """[S]: slot `(token, k)` of each row, counted through all tokens."""
        if self.slot_S is not None:
            return self.slot_S[0]
        in_order_S = torch.arange(slots, device=self.token_S.device)
        return in_order_S if self.back_S is None else torch.empty_like(in_order_S).scatter(0, self.back_S, in_order_S)


def make_route(index_TK: Tensor, num_experts: int, implementation: str | None, *, strangers: bool = False) -> Route:
    """Orders the routed slots for the configured experts implementation of transformers.

    Args:
        index_TK: experts of each token, int64.
        num_experts: E.
        implementation: `config._experts_implementation`; one without a latent form of its own (a fused kernel for dense
            experts, say) falls back to `grouped_mm`.
        strangers: some slots may be of none of the E experts: their index is E.
    """
    backend = implementation if implementation in BACKENDS else "grouped_mm"
    top_k, expert_S = index_TK.shape[1], index_TK.reshape(-1)
    slot_S = torch.arange(expert_S.shape[0], device=expert_S.device)
    left_out = None
    if strangers and (backend == "eager" or expert_S.device.type == "cpu") and not cpu_experts.is_recorded():
        slot_S = (expert_S < num_experts).nonzero()[:, 0]
        expert_S, left_out, strangers = expert_S[slot_S], (slot_S, index_TK.numel()), False
    if backend == "batched_mm":
        stranger_S1, expert_S = _marked(expert_S, num_experts, strangers)
        return Route(backend, expert_S, slot_S // top_k, None, None, stranger_S1, left_out)
    sorted_S, order_S = torch.sort(expert_S, stable=True)
    experts_E = torch.arange(num_experts, device=expert_S.device, dtype=sorted_S.dtype)
    ends_E = torch.searchsorted(sorted_S, experts_E, right=True, out_int32=True)
    if left_out is not None:
        slot_S = slot_S[order_S]
        return Route(backend, sorted_S, slot_S // top_k, None, ends_E, None, (slot_S, index_TK.numel()))
    back_S = torch.empty_like(order_S).scatter(0, order_S, slot_S)
    stranger_S1, sorted_S = _marked(sorted_S, num_experts, strangers)
    return Route(backend, sorted_S, order_S // top_k, back_S, ends_E, stranger_S1)


def _marked(expert_S: Tensor, num_experts: int, strangers: bool) -> tuple[Tensor | None, Tensor]:
    """Which rows are strangers', and indices that are safe to look up."""
    if not strangers:
        return None, expert_S
    return (expert_S == num_experts)[:, None], expert_S.clamp(max=num_experts - 1)


def routed_linear(x_SN: Tensor, weight: Tensor, route: Route, experts_per_group: int, *, transposed: bool) -> Tensor:
    """[S,M]: every row times the matrix of its expert's group.

    Args:
        x_SN: rows in the order of `route`.
        weight: [G,N,M] if `transposed`, else [G,M,N].
        route: expert of each row.
        experts_per_group: group of expert e is e // experts_per_group.
        transposed: orientation of `weight`.
    """
    x_SN = route.without_strangers(x_SN)  # for the backward pass, which leaves their gradients undefined
    return route.without_strangers(_product(x_SN, weight, route, experts_per_group, transposed))


def _product(x_SN: Tensor, weight: Tensor, route: Route, experts_per_group: int, transposed: bool) -> Tensor:
    if route.ends_E is None:
        return _batched_linear(x_SN, weight[route.expert_S // experts_per_group], is_transposed=transposed)
    ends_G = route.ends_E[experts_per_group - 1 :: experts_per_group].contiguous()
    if route.backend == NAME and cpu_experts.can_run(x_SN, [weight]):
        if cpu_experts.pays(x_SN.dtype, x_SN.shape[0], weight.shape[0]):
            return cpu_experts.product(x_SN, weight, ends_G, transposed=transposed)
        return _looped_linear(x_SN, weight if transposed else weight.transpose(1, 2), ends_G)
    if route.backend == "eager":
        return _looped_linear(x_SN, weight if transposed else weight.transpose(1, 2), ends_G)
    # Both widths count, because the backward pass swaps them.
    if any(width * weight.element_size() % ALIGNMENT for width in weight.shape[1:]):
        weight_GNM = weight if transposed else weight.transpose(1, 2)
        y_SM: Tensor = torch.ops.transformers.grouped_mm_fallback(x_SN.to(weight.dtype), weight_GNM, ends_G)
        return y_SM
    return _grouped_linear(x_SN, weight, ends_G, is_transposed=transposed)


def _looped_linear(x_SN: Tensor, weight_GNM: Tensor, ends_G: Tensor) -> Tensor:
    """The plain form of the product: one group after the other."""
    starts = [0, *ends_G.tolist()]
    slices = zip(starts[:-1], starts[1:], weight_GNM, strict=True)
    return torch.cat([x_SN[start:end] @ weight_NM for start, end, weight_NM in slices])


def routed_sum(y_SN: Tensor, weight_TK: Tensor, route: Route) -> Tensor:
    """[T,N]: rows of a token's experts, weighted by its routing and summed."""
    if torch.is_grad_enabled() and (y_SN.requires_grad or weight_TK.requires_grad):
        y_TN: Tensor = _RoutedSum.apply(y_SN, weight_TK, route)  # type: ignore[no-untyped-call]
        return y_TN
    return _RoutedSum.forward(y_SN, weight_TK, route)


class _RoutedSum(torch.autograd.Function):
    """`routed_sum`. Kept for the backward pass are the rows as they are, not as many as there are slots of any expert."""

    @staticmethod
    def forward(y_SN: Tensor, weight_TK: Tensor, route: Route) -> Tensor:
        y_TKN = route.restore(y_SN, weight_TK.shape[1])
        return (y_TKN * weight_TK[..., None]).sum(dim=1).to(y_SN.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y_SN, weight_TK, ctx.route = inputs
        ctx.save_for_backward(y_SN, weight_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y_SN, weight_TK = ctx.saved_tensors
        slot_S = ctx.route.slot_of_rows(weight_TK.numel())
        grad_SN = gradients[0].to(torch.promote_types(y_SN.dtype, weight_TK.dtype))[ctx.route.token_S]
        of_slots_S = (grad_SN * y_SN).sum(-1).to(weight_TK.dtype)
        of_weights_S = weight_TK.new_zeros(weight_TK.numel()).index_copy(0, slot_S, of_slots_S)
        of_rows_SN = grad_SN * weight_TK.flatten()[slot_S, None]
        return of_rows_SN.to(y_SN.dtype), of_weights_S.view_as(weight_TK), None
