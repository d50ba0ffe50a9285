"""The expert-specific matrices of a latent experts module, with the model's own activation between them.

Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from molae_compress.layouts import Layout, bare_copy
from molae_compress.modeling.routed import Route, make_route, routed_linear, routed_sum
from molae_compress.tensors import ExpertsSpec, LatentShape

WIDTH_NAMES = ("hidden_dim", "hidden_size")


def layer_core(experts: nn.Module, layout: Layout, spec: ExpertsSpec, shape: LatentShape, like: Tensor) -> nn.Module:
    """The core of the layer form, with empty parameters: the model's own experts class at hidden width R, if it can be."""
    return _own_core(experts, spec, shape, like) if layout.own_core else PlainCore(experts, layout, spec, shape, like)


def _own_core(experts: nn.Module, spec: ExpertsSpec, shape: LatentShape, like: Tensor) -> nn.Module:
    """The model's own class.

    An output bias is not the core's business (it stays at full width, after decode), but the class reads one: it gets a
    buffer for it that stays zero and is not saved.
    """
    core = bare_copy(experts)
    for name in WIDTH_NAMES:
        if core.__dict__.get(name) == spec.hidden:
            core.__dict__[name] = shape.rank_in
    _add_parameters(core, spec, shape, like)
    if spec.has_bias:
        zeros = like.new_zeros(spec.num_experts, shape.rank_in)
        core.register_buffer("down_proj_bias", zeros, persistent=False)
    return core


def _add_parameters(core: nn.Module, spec: ExpertsSpec, shape: LatentShape, like: Tensor) -> None:
    for name, size in shape.tensors(spec).items():
        if name.startswith("core."):
            core.register_parameter(name.removeprefix("core."), nn.Parameter(like.new_empty(size)))


class _Core(nn.Module):
    """What the cores below share: their parameters, and the activation of the original.

    Args:
        experts: the original module, whose activation is used.
        layout: its layout.
        spec: its description.
        shape: how it is stored.
        like: gives device and type of the parameters.
    """

    activate: Callable[[Tensor], Tensor]

    def __init__(self, experts: nn.Module, layout: Layout, spec: ExpertsSpec, shape: LatentShape, like: Tensor) -> None:
        super().__init__()
        self.spec = spec
        _add_parameters(self, spec, shape, like)
        # Set past nn.Module: the model must neither save, initialise nor wrap what is left of the original.
        self.__dict__["activate"] = layout.activation(experts)


class PlainCore(_Core):
    """Core of the layer form for classes that cannot compute at another width: `[E,J,R]` and `[E,R,I]`, called alike."""

    down_proj: Tensor

    def __init__(self, experts: nn.Module, layout: Layout, spec: ExpertsSpec, shape: LatentShape, like: Tensor) -> None:
        super().__init__(experts, layout, spec, shape, like)
        self.config = experts.__dict__.get("config")
        self.first = "gate_up_proj" if spec.has_gate else "up_proj"

    def forward(self, z_TR: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """`[T,R]`: routed sums, without output biases."""
        route = make_route(index_TK, self.spec.num_experts, getattr(self.config, "_experts_implementation", None))
        h_SJ = routed_linear(z_TR[route.token_S], getattr(self, self.first), route, 1, transposed=False)
        if self.spec.has_bias:
            h_SJ = h_SJ + getattr(self, f"{self.first}_bias")[route.expert_S]
        return routed_sum(routed_linear(self.activate(h_SJ), self.down_proj, route, 1, transposed=False), weight_TK, route)


class GroupedCore(_Core):
    """Cores of the grouped form: `[E*R,J]` into the activation and `[E*R,I]` out of it, latent dimension in front."""

    down: Tensor
    bias: Tensor | None

    def __init__(self, experts: nn.Module, layout: Layout, spec: ExpertsSpec, shape: LatentShape, like: Tensor) -> None:
        super().__init__(experts, layout, spec, shape, like)
        self.stems = tuple(core for _, core in shape.branches())
        if not spec.has_bias:
            self.register_parameter("bias", None)

    def forward(self, latent_SR: tuple[Tensor, ...], route: Route) -> Tensor:
        """`[S,R_out]`, or `[S,H]` where the second projection is dense.

        Args:
            latent_SR: encoded rows in the order of `route`, one tensor per input basis.
            route: expert of each row.
        """
        E = self.spec.num_experts
        parts = [
            routed_linear(z_SR, core.view(E, -1, core.shape[1]), route, 1, transposed=True)
            for z_SR, core in zip(latent_SR, (getattr(self, stem) for stem in self.stems), strict=True)
        ]
        h_SJ = parts[0] if len(parts) == 1 else self._in_model_order(*parts)
        if self.bias is not None:
            h_SJ = h_SJ + self.bias[route.expert_S]
        h_SI = self.activate(h_SJ)
        return routed_linear(h_SI, self.down.view(E, -1, self.down.shape[1]), route, 1, transposed=False)

    def _in_model_order(self, gate_SI: Tensor, up_SI: Tensor) -> Tensor:
        h_SJ = torch.cat((gate_SI, up_SI), dim=-1)
        if self.spec.interleaved:
            # Not a stack: its gradients would alternate in memory, which grouped GEMM kernels refuse.
            h_SJ = h_SJ.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return h_SJ
