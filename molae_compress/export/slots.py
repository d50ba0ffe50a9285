"""Experts taken out of a model, so that it can be traced without them: each module leaves a slot, one opaque node.

torch.export sees an operator with a number where the experts were, and neither their code nor their weights. What the
number stands for is put into the graph afterwards (see `lowering`), so that weights are never traced, folded or copied.
Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molae_compress.errors import ExportError
from molae_compress.layouts import Layout, bare_copy, describe_in, layout_of, routed_layout
from molae_compress.layouts.base import FLAGS
from molae_compress.modeling.latent import LatentExperts
from molae_compress.tensors import ExpertsSpec

SLOT_DOMAIN, SLOT_NAME = "molae.export", "Experts"

# An operator without a kernel: it is only ever traced.
torch.library.define("molae_export::experts", "(Tensor x, Tensor index, Tensor weight, int number) -> Tensor")


@torch.library.register_fake("molae_export::experts")  # type: ignore[untyped-decorator]  # annotated in part
def _shape_of_output(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, number: int) -> Tensor:
    return torch.empty_like(x_TH)


class Slot(nn.Module):
    """Called and answering as the experts module it stands for, inside a traced graph.

    Attributes:
        spec: of the experts.
        layout: how they are called.
        number: of the node it becomes.
    """

    def __init__(self, stock: nn.Module, layout: Layout, spec: ExpertsSpec, number: int) -> None:
        super().__init__()
        self.spec, self.layout, self.number = spec, layout, number
        self.stock = stock
        for key, value in vars(stock).items():
            if key not in vars(self) and key not in FLAGS:
                self.__dict__[key] = value  # models and layouts read such attributes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One node, between what the layout does to inputs and outputs."""
        call = self.layout.enter(self.stock, self.spec, args, kwargs)
        y_TH = torch.ops.molae_export.experts(call.x_TH, call.index_TK, call.weight_TK.to(call.x_TH.dtype), self.number)
        return call.leave(y_TH)


def experts_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The experts modules of a loaded model by path, latent and dense ones.

    Raises:
        ExportError: the model calls experts one by one.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in found)
        if not inside and (isinstance(module, LatentExperts) or routed_layout(model, name) is not None):
            found[name] = module
    for name, module in found.items():
        if layout_and_spec(model, name, module)[0].called_one_by_one:
            raise ExportError(
                f"The experts '{name}' of {type(model).__name__} cannot be exported.",
                why="The model takes single experts out of a list and calls them in a Python loop, which no graph can hold.",
                remedy="Export a model whose class in transformers calls its experts as one module.",
            )
    return found


def layout_and_spec(model: PreTrainedModel, name: str, module: nn.Module) -> tuple[Layout, ExpertsSpec]:
    """Layout and description of an experts module of a model, latent or dense."""
    if isinstance(module, LatentExperts):
        return module.layout, module.spec
    layout = layout_of(name, module)
    assert layout is not None
    return layout, describe_in(model, name)


@contextmanager
def slots_in(model: PreTrainedModel, experts: dict[str, nn.Module]) -> Iterator[None]:
    """The model with a slot in place of each of `experts`, numbered in their order, while the context is open."""
    for number, (name, module) in enumerate(experts.items()):
        layout, spec = layout_and_spec(model, name, module)
        stock = module.stock() if isinstance(module, LatentExperts) else _without_experts(module, layout)
        _set(model, name, Slot(stock, layout, spec, number))
    try:
        yield
    finally:
        for name, module in experts.items():
            _set(model, name, module)


def _without_experts(module: nn.Module, layout: Layout) -> nn.Module:
    """A copy of a dense experts module that lacks the experts' weights and nothing else."""
    weights = layout.weight_names(module)
    bare = bare_copy(module, weights)
    for name, parameter in module._parameters.items():
        if name not in weights:
            bare.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        bare.register_buffer(name, buffer)
    return bare


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
