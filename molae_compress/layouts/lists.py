"""Experts as separate modules in a list or dictionary: old classes of transformers, and most models with remote code.

What one expert computes is read from its own forward, run with stand-ins for its linear layers: the activation, clamps
and scales between them are never written again, and an expert that computes anything else is refused.
Shape suffixes: see `molae_compress.tensors`; N rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from molae_compress.layouts.base import Call, Layout, Traits, Weights, bare_copy
from molae_compress.tensors import ExpertsSpec

# Names of the layers in use: gate first, up second; where there is no gate, only the order of the two matters.
_LAYERS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("wi", "wo"),
    ("fc1", "fc2"),
)
_LIST_NAME = re.compile(r"(^|_)experts?$")
_ROUTER_NAME = re.compile(r"(^|_)(gate|gating|router|routing)(?!_?(up|proj))")
_ROUTER_CLASS = re.compile(r"(Gate|Gating|Router|Routing)(?![a-z])")
_PROBE_HIDDEN, _PROBE_WIDTH, _PROBE_ROWS = 5, 3, 4


class ExpertList(Layout):
    """A `ModuleList` or `ModuleDict` of experts which the model calls one by one, with the rows of each.

    The experts are gated or plain MLPs of two or three linear layers, found by structure and proven by a small
    computation.
    """

    rule = (
        "a list or dictionary, named after experts or beside a router of as many outputs, of alike modules that prove to be "
        "MLPs of two or three linear layers"
    )
    called_one_by_one = True

    def matches(self, name: str, module: nn.Module) -> bool:
        if not is_container(module):
            return False
        leaf = name.rpartition(".")[2]
        experts = self.experts(module)
        return len(experts) > 1 and (bool(_LIST_NAME.search(leaf)) or _only_mlps(leaf, module, experts))

    def belongs(self, name: str, module: nn.Module, parent: nn.Module) -> bool:
        leaf = name.rpartition(".")[2]
        return bool(_LIST_NAME.search(leaf)) or router_beside(parent, leaf, len(module._modules))

    def experts(self, module: nn.Module) -> dict[str, nn.Module]:
        """The experts by name, in their order; other things may lie in the container beside them."""
        return {name: child for name, child in module.named_children() if layer_names(child) is not None}

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(
            f"{name}.{layer}.{kind}"
            for name, expert in self.experts(module).items()
            for layer in layer_names(expert) or ()
            for kind in self._kinds(expert)
        )

    def refusal(self, module: nn.Module) -> str | None:
        experts = self.experts(module)
        others = [
            name
            for name, child in module.named_children()
            if name not in experts and (any(True for _ in child.parameters()) or any(True for _ in child.buffers()))
        ]
        if None in module._modules.values():
            return "lacks some of its experts"
        if others:
            return f"holds other modules beside its experts ({', '.join(others)})"
        kinds = {
            (type(expert), *((name, tuple(tensor.shape)) for name, tensor in expert.state_dict(keep_vars=True).items()))
            for expert in experts.values()
        }
        if len(kinds) > 1:
            return "holds experts of unequal classes or shapes"
        first = next(iter(experts.values()))
        layers = layer_names(first) or ()
        biases = {_has_bias(first, (layer,)) for layer in layers}
        unknown = {name.rpartition(".")[0] for name, _ in first.named_parameters()} - set(layers)
        if unknown or len(biases) > 1:
            extra = ", ".join(sorted(unknown)) or "some with a bias, some without"
            return f"holds experts of more than linear layers ({extra})"
        if not _proves_itself(first, layers):
            return (
                f"holds experts that compute something else than their layers {', '.join(layers)} and an activation between"
            )
        return None

    def traits(self, module: nn.Module) -> Traits:
        return Traits(has_gate=_is_gated(next(iter(self.experts(module).values())), self._layers(module)))

    def canonical(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Weights:
        *first, last = self._layers(module)
        experts = list(self.experts(module).items())

        def joined(layers: list[str], kind: str) -> Tensor:
            return torch.stack([torch.cat([tensors[f"{name}.{layer}.{kind}"] for layer in layers]) for name, _ in experts])

        weights = Weights(joined(first, "weight"), joined([last], "weight"))
        if len(self._kinds(experts[0][1])) > 1:
            weights = weights._replace(bias_in_EJ=joined(first, "bias"), bias_out_EH=joined([last], "bias"))
        return weights

    def stored(self, module: nn.Module, weights: Weights) -> dict[str, Tensor]:
        *first, last = self._layers(module)
        parts: dict[str, Tensor] = {}
        for e, name in enumerate(self.experts(module)):
            for layer, w_IH in zip(first, weights.w_in_EJH[e].chunk(len(first)), strict=True):
                parts[f"{name}.{layer}.weight"] = w_IH
            parts[f"{name}.{last}.weight"] = weights.w_out_EHI[e]
            if weights.bias_in_EJ is not None and weights.bias_out_EH is not None:
                for layer, bias_I in zip(first, weights.bias_in_EJ[e].chunk(len(first)), strict=True):
                    parts[f"{name}.{layer}.bias"] = bias_I
                parts[f"{name}.{last}.bias"] = weights.bias_out_EH[e]
        return parts

    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        expert = next(iter(self.experts(module).values()))
        return _between(expert, layer_names(expert) or ())

    def _layers(self, module: nn.Module) -> tuple[str, ...]:
        return layer_names(next(iter(self.experts(module).values()))) or ()

    def _kinds(self, expert: nn.Module) -> tuple[str, ...]:
        return ("weight", "bias") if _has_bias(expert, layer_names(expert) or ()) else ("weight",)


class SwitchExperts(ExpertList):
    """Switch Transformers: a dictionary called with a one-hot mask; tokens above an expert's capacity have none."""

    rule = "the class SwitchTransformersExperts: a dictionary of experts, called with a mask [T,1,E]"
    classes: tuple[str, ...] = ("SwitchTransformersExperts",)
    arguments = ("hidden_states", "selected_experts", "routing_weights")
    called_one_by_one = False

    def matches(self, name: str, module: nn.Module) -> bool:
        return type(module).__name__ in self.classes

    def top_k(self, module: nn.Module) -> int | None:
        return 1

    def enter(self, module: nn.Module, spec: ExpertsSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        x_TH, mask_TKE, weight_TK = self.bind(args, kwargs)
        return Call(x_TH, mask_TKE.argmax(-1), weight_TK * mask_TKE.amax(-1), lambda y_TH: y_TH)


class NllbExperts(SwitchExperts):
    """NLLB-MoE: called with one column per expert; token dropout of training becomes a factor."""

    rule = "the class NllbMoeExperts: a dictionary of experts, called with indices and weights [T,E]"
    classes = ("NllbMoeExperts",)
    arguments = ("hidden_states", "router_mask", "router_probs")

    def top_k(self, module: nn.Module) -> int | None:
        return 2

    def enter(self, module: nn.Module, spec: ExpertsSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        x_TH, index_TK, weight_TK = self.bind(args, kwargs)
        # In training the original drops whole outputs of experts at random; their mean is the same.
        scale = 1 - cast(float, module.moe_token_dropout)
        return Call(x_TH, index_TK.long(), weight_TK * scale, lambda y_TH: y_TH)


def is_container(module: nn.Module) -> bool:
    """Whether it is a plain list or dictionary of modules."""
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward


def router_beside(parent: nn.Module, leaf: str, choices: int, *, named: bool = False) -> bool:
    """Whether a router for the list `leaf` of `parent` lies beside it.

    It is a linear layer or a parameter with an output for each of the list's modules, or a module whose name or class
    speaks of gates or routers and holds no matrices that say otherwise.

    Args:
        parent: the module that holds the list.
        leaf: name of the list in it.
        choices: modules in the list.
        named: take only what is named after gates or routers, and has that many outputs.
    """
    for name, child in parent.named_children():
        if name == leaf or is_container(child):
            continue
        if _ROUTER_NAME.search(name) or _ROUTER_CLASS.search(type(child).__name__):
            widths = _widths(child)
            if choices in widths or not (widths or named):
                return True
        elif not named and isinstance(child, nn.Linear) and child.out_features == choices:
            return True
    own = parent.named_parameters(recurse=False)
    return any(p.dim() == 2 and choices in p.shape and (not named or _ROUTER_NAME.search(name)) for name, p in own)


def router_parameters(parent: nn.Module, leaf: str, choices: int, weights: Collection[str] = ()) -> tuple[str, ...]:
    """Paths in `parent` of the parameters that make one logit for each of `choices` experts of its child `leaf`.

    They are those of a linear layer with as many outputs, or of a module (or bare ones) named after gates or routers; a
    matrix says which it is by its size, and a vector of that size beside it is its bias.

    Args:
        parent: the module that holds the experts.
        leaf: name of the experts in it.
        choices: experts.
        weights: paths in `parent` of the experts' weights.
    """
    found: list[str] = []
    for path, module in parent.named_modules():
        own = {f"{path}.{name}" if path else name: p for name, p in module.named_parameters(recurse=False)}
        own = {name: p for name, p in own.items() if name not in weights and choices in p.shape and p.dim() <= 2}
        linear = isinstance(module, nn.Linear) and module.out_features == choices
        spoken = any(_ROUTER_NAME.search(part) for part in path.split(".")) or _ROUTER_CLASS.search(type(module).__name__)
        if not (linear or spoken):
            own = {name: p for name, p in own.items() if _ROUTER_NAME.search(name.rpartition(".")[2])}
        if any(p.dim() == 2 for p in own.values()):
            found += own
    return tuple(found)


def _widths(router: nn.Module) -> set[int]:
    """Outputs that a router's matrices may have; either side of a bare parameter, whose orientation nobody tells."""
    widths: set[int] = set()
    for part in router.modules():
        if isinstance(part, nn.Linear):
            widths.add(part.out_features)
        else:
            widths.update(*(tuple(p.shape) for p in part.parameters(recurse=False) if p.dim() == 2))
    return widths


def _only_mlps(leaf: str, module: nn.Module, experts: Mapping[str, nn.Module]) -> bool:
    """Whether a list of whatever name holds MLPs of one class that read and write the same width, and nothing else."""
    if "shared" in leaf or len(experts) < len(module._modules) or len({type(expert) for expert in experts.values()}) > 1:
        return False
    expert = next(iter(experts.values()))
    first, *_, last = (cast(nn.Linear, expert.get_submodule(layer)) for layer in layer_names(expert) or ())
    return first.in_features == last.out_features


def layer_names(expert: nn.Module) -> tuple[str, ...] | None:
    """The linear layers of an expert, the one to the output last; None if it does not have two or three that fit together.

    Under other names than the usual ones the layer to the output is the one whose widths are those of the others, swapped;
    of two it is the one that was made last.
    """
    linear = {name: child for name, child in expert.named_children() if isinstance(child, nn.Linear)}
    usual = next((names for names in _LAYERS if set(names) == set(linear)), None)
    if usual is not None or len(linear) not in (2, 3):
        return usual
    for last, layer in reversed(linear.items()):
        others = [name for name in linear if name != last]
        widths = {(linear[name].in_features, linear[name].out_features) for name in others}
        if widths == {(layer.out_features, layer.in_features)} and layer.in_features != layer.out_features:
            return (*others, last)
    return None


def _has_bias(expert: nn.Module, layers: tuple[str, ...]) -> bool:
    return any(expert.get_submodule(layer)._parameters.get("bias") is not None for layer in layers)


class _Half(nn.Module):
    """Stands for the n-th of the layers that read the input: passes the n-th part of its columns on."""

    weight = None

    def __init__(self, part: int, parts: int) -> None:
        super().__init__()
        self.part, self.parts = part, parts

    def forward(self, h_NJ: Tensor) -> Tensor:
        return h_NJ.chunk(self.parts, dim=-1)[self.part]


def _between(expert: nn.Module, layers: tuple[str, ...]) -> nn.Module:
    """The expert with its linear layers taken out: maps what the first ones give, side by side, to what the last reads."""
    hollow = _without_layers(expert, layers)
    *first, last = layers
    for part, layer in enumerate(first):
        hollow._modules[layer] = _Half(part, len(first))
    hollow._modules[last] = _Half(0, 1)
    return hollow


def _without_layers(expert: nn.Module, layers: tuple[str, ...]) -> nn.Module:
    """What remains of an expert, for evaluation: activation and dropout, as copies whose mode is nobody else's."""
    hollow = bare_copy(expert, [f"{layer}.weight" for layer in layers])
    for name, child in hollow.named_children():
        hollow._modules[name] = deepcopy(child)
    return hollow.eval()


def _is_gated(expert: nn.Module, layers: tuple[str, ...]) -> bool:
    """Two layers that read the input, or one of twice the width that the last layer reads."""
    first, last = (cast(nn.Linear, expert.get_submodule(layer)) for layer in (layers[0], layers[-1]))
    return len(layers) == 3 or first.out_features == 2 * last.in_features


def _proves_itself(expert: nn.Module, layers: tuple[str, ...]) -> bool:
    """Whether an expert's forward, at a small width and with random layers, is what we take it for."""
    *first, last = layers
    has_bias = _has_bias(expert, layers)
    width = _PROBE_WIDTH * (2 if len(first) == 1 and _is_gated(expert, layers) else 1)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        small = _without_layers(expert, layers)
        for layer in first:
            small._modules[layer] = nn.Linear(_PROBE_HIDDEN, width, bias=has_bias, dtype=torch.float32)
        small._modules[last] = nn.Linear(_PROBE_WIDTH, _PROBE_HIDDEN, bias=has_bias, dtype=torch.float32)
        between = _between(expert, layers)
        for scale in (1.0, 30.0):  # the second is beyond any clamp
            x_NH = scale * torch.randn(_PROBE_ROWS, _PROBE_HIDDEN, dtype=torch.float32)
            h_NJ = torch.cat([small.get_submodule(layer)(x_NH) for layer in first], dim=-1)
            try:
                expected_NH = small.get_submodule(last)(between(h_NJ))
                out_NH = small(x_NH)
            except (RuntimeError, TypeError, AttributeError, ValueError):
                return False
            if not isinstance(out_NH, Tensor) or not torch.allclose(out_NH, expected_NH, rtol=1e-4, atol=1e-5):
                return False
    return True
