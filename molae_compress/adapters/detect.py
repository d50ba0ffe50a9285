"""Which modules of a model are routed experts: found by structure, refused loudly where the structure is unknown."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from molae_compress.errors import ModelError
from molae_compress.stock import (
    dense_experts,
    describe,
    expert_parameter_names,
    is_stock_experts,
    store_dense_,
)
from molae_compress.tensors import ExpertsSpec

__all__ = ["decoder_layers", "dense_experts", "expert_parameter_names", "find_experts", "store_dense_"]

TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
)
EXPERTS_CLASS = re.compile(r"Experts?(MLP|GLU)?$")
EXPERTS_ATTRIBUTE = re.compile(r"(^|_)experts?$")
NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


def find_experts(model: nn.Module) -> list[ExpertsSpec]:
    """Finds every routed-experts module of a live or meta model, in module order.

    Shared experts are left alone: they see every token, so they are plain dense layers.

    Args:
        model: a transformers model.

    Raises:
        ModelError: no routed experts were found, some have a structure that is not understood, or the model is already
            compressed.
    """
    _refuse_compressed(model)
    specs: list[ExpertsSpec] = []
    strangers: list[str] = []
    for name, module in _outermost_experts(model):
        if is_stock_experts(module):
            specs.append(describe(module, name, layer=_layer_index(name), top_k=_top_k(model, name, module)))
        else:
            strangers.append(f"'{name}' ({type(module).__name__})")
    if strangers:
        raise ModelError(
            f"{type(model).__name__} holds experts of a structure that is not understood: {_listed(strangers)}.",
            why="Compressing the rest and skipping these would leave most of the model as it is, without a word.",
            remedy="Report the model class to the project; until it is supported this model cannot be compressed.",
        )
    if not specs:
        raise _nothing_found(model)
    return specs


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers that holds the routed experts: its path inside the model, and the list itself.

    Raises:
        ModelError: as `find_experts`, or the experts lie in several stacks of layers (encoder and decoder, say).
    """
    paths = {_stack_path(model, spec.name) for spec in find_experts(model)}
    if len(paths) != 1:
        raise ModelError(
            f"The experts of {type(model).__name__} lie in {len(paths)} stacks of layers: {_listed(sorted(paths))}.",
            why="Calibration walks one stack of decoder layers.",
            remedy="Compress a model with one stack, for example the text model alone.",
        )
    path = paths.pop()
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return path, layers


def _outermost_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are or look like routed experts, none of them inside another."""
    inside = "\0"
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if is_stock_experts(module) or (_looks_like_experts(name, module) and not _holds_stock_experts(module)):
            inside = f"{name}."
            yield name, module


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    if "shared" in name or "Shared" in type(module).__name__ or not any(True for _ in module.parameters()):
        return False
    stacks = _stacks(module)
    if "gate_proj" in stacks:  # separate gate and up stacks are shared experts: every token uses all of them
        return False
    same_length = len(stacks) >= 2 and len(set(stacks.values())) == 1
    leaf = name.rpartition(".")[2]
    return bool(EXPERTS_CLASS.search(type(module).__name__) or EXPERTS_ATTRIBUTE.search(leaf)) or same_length


def _holds_stock_experts(module: nn.Module) -> bool:
    return any(is_stock_experts(child) for child in module.modules())


def _stacks(module: nn.Module) -> dict[str, int]:
    """Own 3-D parameters of a module (convolutions aside) and how many matrices each stacks."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: parameter.shape[0] for name, parameter in own if parameter.dim() == 3 and parameter.shape[0] > 1}


def _layer_index(name: str) -> int:
    match = NUMBER.search(name)
    if match is None:
        raise ModelError(
            f"The experts module '{name}' does not lie in a numbered layer.",
            remedy="Report the model class to the project.",
        )
    return int(match[1])


def _stack_path(model: nn.Module, name: str) -> str:
    """Path of the outermost ModuleList above the module `name`."""
    match = NUMBER.search(name)
    path = name[: match.start()] if match else ""
    if not path or not isinstance(model.get_submodule(path), nn.ModuleList):
        raise ModelError(
            f"The experts module '{name}' does not lie in a list of layers.",
            remedy="Report the model class to the project.",
        )
    return path


def _top_k(model: nn.Module, name: str, experts: nn.Module) -> int:
    """Experts per token: what the router beside the experts says, else the configuration."""
    parent = model.get_submodule(name.rpartition(".")[0])
    config = experts.__dict__.get("config")
    values = [getattr(child, "top_k", None) for child in parent.children()]
    values += [getattr(config, key, None) for key in TOP_K_NAMES]
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ModelError(
        f"How many experts a token uses in '{name}' is told neither by its router nor by the configuration.",
        why=f"Looked for top_k beside the experts and for {', '.join(TOP_K_NAMES)} in {type(config).__name__}.",
        remedy="Add num_experts_per_tok to config.json.",
    )


def _refuse_compressed(model: nn.Module) -> None:
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if (method or getattr(quantization, "quant_method", None)) == "molae":
        raise ModelError(
            f"{type(model).__name__} is compressed already (quantization_config of its config says molae).",
            remedy="Compress the original model, or expand this one first.",
        )


def _nothing_found(model: nn.Module) -> ModelError:
    named = [
        f"'{name}' ({type(module).__name__})"
        for name, module in model.named_modules()
        if re.search("expert", f"{type(module).__name__} {name.rpartition('.')[2]}", re.IGNORECASE)
    ]
    stacked = sorted({type(module).__name__ for module in model.modules() if _stacks(module)})
    return ModelError(
        f"No routed experts were found in {type(model).__name__}.",
        why=f"Modules named after experts: {_listed(named) or 'none'}. "
        f"Classes with stacked (3-D) parameters: {_listed(stacked) or 'none'}.",
        remedy="Give a Mixture-of-Experts model whose experts transformers implements in fused form.",
    )


def _listed(items: list[str], limit: int = 6) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
