"""The expert-specific matrices of a latent experts module, with the model's own activation between them.

Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from molae_compress.modeling.routed import Route, routed_linear
from molae_compress.stock import activation, bare_copy
from molae_compress.tensors import ExpertsSpec, LatentShape

WIDTH_NAMES = ("hidden_dim", "hidden_size")


def layer_core(experts: nn.Module, spec: ExpertsSpec, shape: LatentShape) -> nn.Module:
    """The model's own experts class at hidden width R, with empty parameters.

    An output bias is not the core's business (it stays at full width, after decode), but the class reads one: it gets a
    buffer for it that stays zero and is not saved.
    """
    like = next(experts.parameters())
    core = bare_copy(experts)
    for name in WIDTH_NAMES:
        if core.__dict__.get(name) == spec.hidden:
            core.__dict__[name] = shape.rank_in
    for name, size in shape.tensors(spec).items():
        if name.startswith("core."):
            core.register_parameter(name.removeprefix("core."), nn.Parameter(like.new_empty(size)))
    if spec.has_bias:
        zeros = like.new_zeros(spec.num_experts, shape.rank_in)
        core.register_buffer("down_proj_bias", zeros, persistent=False)
    return core


class GroupedCore(nn.Module):
    """Cores of the grouped form: `[E*R,J]` into the activation and `[E*R,I]` out of it, latent dimension in front.

    Args:
        experts: the stock module, whose activation is used.
        spec: its description.
        shape: how it is stored.
    """

    activate: Callable[[Tensor], Tensor]
    down: Tensor
    bias: Tensor | None

    def __init__(self, experts: nn.Module, spec: ExpertsSpec, shape: LatentShape) -> None:
        super().__init__()
        self.spec = spec
        self.stems = tuple(core for _, core in shape.branches())
        like = next(experts.parameters())
        self.register_parameter("bias", None)
        for name, size in shape.tensors(spec).items():
            if name.startswith("core."):
                self.register_parameter(name.removeprefix("core."), nn.Parameter(like.new_empty(size)))
        # Set past nn.Module: the model must neither save, initialise nor wrap what is left of the stock module.
        self.__dict__["activate"] = activation(experts)

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
