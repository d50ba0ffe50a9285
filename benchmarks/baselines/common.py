"""What all baselines share: the model's experts as matrices, what they saw of the calibration text, and the accounting.

A baseline is a function `(model, windows_NL, setting) -> stored`. It edits the experts of a float32 model in place, so that
they compute what the compressed ones would, and returns how many numbers the compressed experts store. Whatever it stores
is rounded to `setting.dtype` before it is multiplied out.
Shape suffixes: X, Y rows and columns of any matrix; N matrices or windows; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molae_compress.adapters import find_experts, layers_with_experts
from molae_compress.errors import ModelError
from molae_compress.layouts import layout_of
from molae_compress.layouts.registry import dense_experts
from molae_compress.solver.population import Calibrated
from molae_compress.tensors import DenseExperts, ExpertsSpec


@dataclass(frozen=True)
class Setting:
    """What a baseline is asked for.

    Attributes:
        keep: share of the numbers of the routed experts that may be stored.
        dtype: what stored numbers are rounded to.
        seed: of everything drawn at random.
        steps: gradient steps of the methods that take any.
    """

    keep: float
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    steps: int = 600

    def stored(self, tensor: Tensor) -> Tensor:
        """The tensor as it is read back, in float32."""
        return tensor.to(self.dtype).float()


@dataclass
class Layer:
    """Routed experts of one layer: three stacks of matrices, and the tokens they saw if anybody watched."""

    spec: ExpertsSpec
    gate_EIH: Tensor
    up_EIH: Tensor
    down_EHI: Tensor
    activate: Callable[[Tensor], Tensor]
    seen: Calibrated | None = None

    @property
    def numel(self) -> int:
        return self.spec.dense_numel

    @property
    def tokens(self) -> Calibrated:
        assert self.seen is not None, "the layer was not observed"
        return self.seen

    def w_in(self, gate_XH: Tensor, up_XH: Tensor) -> Tensor:
        """[2X,H] or [E,2X,H]: gate and up rows in the order the model's activation reads them."""
        if self.spec.interleaved:
            return torch.stack([gate_XH, up_XH], dim=-2).flatten(-3, -2)
        return torch.cat([gate_XH, up_XH], dim=-2)

    def intermediate(self, expert: int, x_NH: Tensor) -> Tensor:
        """[N,I]: what an expert's second projection reads."""
        return self.activate(x_NH @ self.w_in(self.gate_EIH[expert], self.up_EIH[expert]).T)

    def output(self, expert: int, x_NH: Tensor) -> Tensor:
        """[N,H]: what an expert makes of its inputs, before the routing weight."""
        return self.intermediate(expert, x_NH) @ self.down_EHI[expert].T

    def write(self, model: nn.Module) -> None:
        """Puts the three stacks into the model."""
        module = model.get_submodule(self.spec.name)
        layout = layout_of(self.spec.name, module)
        assert layout is not None
        layout.store_(module, DenseExperts(self.spec, self.w_in(self.gate_EIH, self.up_EIH), self.down_EHI, self.activate))


def opened(model: PreTrainedModel, gradients: bool = False) -> list[Layer]:
    """The routed experts of a model, as copies; or the gradients of their weights.

    Raises:
        ModelError: experts without a gate, with biases or with a norm of their outputs, of which the papers do not speak.
    """
    layers = []
    for spec in find_experts(model):
        if not spec.has_gate or spec.has_bias or spec.has_output_norm:
            raise ModelError(f"The baselines know gated experts without biases, which those of '{spec.name}' are not.")
        held = dict(model.get_submodule(spec.name).named_parameters())
        dense = dense_experts(model, spec, {name: _gradient(part) for name, part in held.items()} if gradients else held)
        gate_I, up_I = spec.gate_rows()
        w_in = dense.w_in_EJH
        layers.append(Layer(spec, w_in[:, gate_I], w_in[:, up_I], dense.w_out_EHI.clone(), dense.activate))
    return layers


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@torch.no_grad()
def observed(model: PreTrainedModel, windows_NL: Tensor, batch_size: int = 8) -> list[Layer]:
    """`opened`, with the tokens every layer's experts see of the calibration windows and the routing the model computes."""
    layers = opened(model)
    around = layers_with_experts(model)
    records: list[list[tuple[Tensor, ...]]] = [[] for _ in layers]
    hooks = []
    for layer, record in zip(layers, records, strict=True):
        module = model.get_submodule(layer.spec.name)
        hooks.append(module.register_forward_pre_hook(partial(_enter, layer.spec, record), with_kwargs=True))
        block = model.get_submodule(around.paths[around.of(layer.spec.name)])
        hooks.append(block.register_forward_hook(partial(_leave, record)))
    try:
        for ids_BL in windows_NL.split(batch_size):
            model(input_ids=ids_BL, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, record in zip(layers, records, strict=True):
        x_TH, index_TK, gate_TK, energy_T = (torch.cat(parts) for parts in zip(*record, strict=True))
        layer.seen = Calibrated(x_TH, index_TK, gate_TK, 1 / energy_T, layer.spec.num_experts)
    return layers


def _enter(spec: ExpertsSpec, record: list[tuple[Tensor, ...]], module: nn.Module, args: Any, kwargs: Any) -> None:
    layout = layout_of(spec.name, module)
    assert layout is not None
    call = layout.enter(module, spec, args, kwargs)
    index_TK = call.index_TK.masked_fill(call.weight_TK == 0, spec.num_experts)  # slots without an expert
    record.append((call.x_TH.float(), index_TK, call.weight_TK.float()))


def _leave(record: list[tuple[Tensor, ...]], _: nn.Module, args: Any, out: Any) -> None:
    h_TH = (out[0] if isinstance(out, tuple) else out).flatten(0, -2)
    record[-1] = (*record[-1], h_TH.float().square().sum(1))


def budget(layers: Sequence[Layer], setting: Setting) -> int:
    """How many numbers all layers together may store."""
    return math.floor(setting.keep * sum(layer.numel for layer in layers) + 1e-6)


def evenly(total: int, places: int, most: int) -> list[int]:
    """`total` whole things over places as evenly as they go, the first places getting what is left over."""
    each, more = divmod(total, places)
    return [min(most, each + (place < more)) for place in range(places)]


def sums(layer: Layer, expert: int, weight: str = "none") -> tuple[Tensor, Tensor]:
    """[H,H] and [I,I] float64: sums of x x^T and z z^T over the tokens routed to an expert.

    Args:
        layer: observed.
        expert: its index.
        weight: `none`, or `squared`: g^2 / |h|^2, an output error relative to the residual stream.
    """
    tokens = layer.tokens
    size_H, size_I = layer.spec.hidden, layer.spec.intermediate
    c_HH, c_II = torch.zeros(size_H, size_H).double(), torch.zeros(size_I, size_I).double()
    for index_N, x_NH, gate_N in tokens.routed(expert):
        w_N1 = (gate_N.square() * tokens.token_T[index_N])[:, None] if weight == "squared" else torch.ones(len(x_NH), 1)
        z_NI = layer.intermediate(expert, x_NH)
        c_HH += ((w_N1 * x_NH).T @ x_NH).double()
        c_II += ((w_N1 * z_NI).T @ z_NI).double()
    return c_HH, c_II
