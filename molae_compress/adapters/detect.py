"""Which modules of a model are routed experts: found by structure, refused loudly where the structure is unknown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from molae_compress.errors import ModelError
from molae_compress.layouts import LAYER_NUMBER, describe_in, layout_of, routed_layout
from molae_compress.layouts.lists import is_container, router_beside
from molae_compress.tensors import ExpertsSpec

EXPERTS_CLASS = re.compile(r"Experts?(MLP|GLU)?$")
EXPERTS_ATTRIBUTE = re.compile(r"(^|_)experts?$")
# Experts which are no feed-forward layers. Nothing inside them is looked at either.
LEFT_ALONE = ("JetMoeMoA", "VitPoseNaiveMoe")
HOPELESS = {
    "DogeCDMoE": "retrieves experts of one row and one column each: no basis is smaller than what it would replace",
}


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
        if routed_layout(model, name) is None:
            strangers.append(f"'{name}' ({type(module).__name__})")
        else:
            specs.append(describe_in(model, name))
    if strangers:
        raise ModelError(
            f"{type(model).__name__} holds experts of a structure that is not understood: {_listed(strangers)}.",
            why="Compressing the rest and skipping these would leave most of the model as it is, without a word.",
            remedy="Write a layout for the class (see docs/adapters.md), or report it to the project.",
        )
    if not specs:
        raise _nothing_found(model)
    return specs


def unproven_experts(model: nn.Module) -> tuple[str, ...]:
    """Paths of lists that look like routed experts and are left alone, because it cannot be told that they are.

    They hold alike MLPs with no router beside them, or other modules beside a router of as many outputs.

    Args:
        model: a dense transformers model.
    """
    found: list[str] = []
    for name, module, routed in _outermost(model):
        above = tuple(f"{path}." for path in found)
        if not routed and is_container(module) and not name.startswith(above) and _may_be_routed(model, name, module):
            found.append(name)
    return tuple(found)


@dataclass(frozen=True)
class Layers:
    """The layers of all lists of layers that hold experts, in the order in which the model calls them.

    Attributes:
        paths: of every layer inside the model.
    """

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def of(self, name: str) -> int:
        """Number of the layer that the module `name` lies in."""
        return next(number for number, path in enumerate(self.paths) if name.startswith(f"{path}."))


def layers_with_experts(model: nn.Module, experts: Iterable[str] | None = None) -> Layers:
    """The lists of layers that hold experts modules, one list after the other: that of an encoder before a decoder's.

    Args:
        model: a transformers model.
        experts: paths of the experts modules; by default those `find_experts` finds.

    Raises:
        ModelError: as `find_experts`, or experts lie in no list of layers.
    """
    names = experts if experts is not None else [spec.name for spec in find_experts(model)]
    stacks = list(dict.fromkeys(_stack_path(model, name) for name in names))
    stacks.sort(key=lambda path: "encoder" not in path.split("."))
    return Layers(tuple(f"{path}.{child}" for path in stacks for child, _ in model.get_submodule(path).named_children()))


def _outermost_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are or look like routed experts, none of them inside another."""
    return ((name, module) for name, module, routed in _outermost(model) if routed)


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Modules, and whether they are or look like routed experts; nothing inside those, or inside what is left alone."""
    inside = "\0"
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        class_name = type(module).__name__
        if class_name in HOPELESS:
            raise ModelError(
                f"The experts module '{name}' of class {class_name} cannot be compressed.",
                why=f"It {HOPELESS[class_name]}.",
                remedy="Use another model, or compress its dense layers by other means.",
            )
        if class_name in LEFT_ALONE or _is_shared(name, module):
            inside = f"{name}."
        elif _is_routed(model, name) or (_looks_like_experts(name, module) and not _holds_experts(model, name)):
            inside = f"{name}."
            yield name, module, True
        else:
            yield name, module, False


def _is_routed(model: nn.Module, name: str) -> bool:
    """Whether a module is routed experts of a known layout; a list of MLPs outside numbered layers is a projector or so."""
    layout = routed_layout(model, name)
    named = EXPERTS_ATTRIBUTE.search(name.rpartition(".")[2]) is not None
    return layout is not None and (not layout.called_one_by_one or named or LAYER_NUMBER.search(name) is not None)


def _may_be_routed(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a list that was not found to be routed experts may be such nevertheless.

    What the classes of transformers itself hold is known: all of them are tested.
    """
    above, _, leaf = name.rpartition(".")
    parent = model.get_submodule(above)
    if type(parent).__module__.startswith("transformers.models."):
        return False
    layout = layout_of(name, module)
    if layout is not None:
        return layout.refusal(module) is None
    kinds = {(type(child), *(tuple(p.shape) for p in child.parameters())) for child in module.children()}
    alike = len(module._modules) > 1 and len(kinds) == 1 and any(p.dim() > 1 for p in module.parameters())
    beside = router_beside(parent, leaf, len(module._modules), named=True)
    return alike and "shared" not in leaf and beside


def _is_shared(name: str, module: nn.Module) -> bool:
    """Whether every token uses all of it: experts under such a name are plain dense layers."""
    leaf = name.rpartition(".")[2]
    if "shared" in leaf:
        return _looks_like_experts(leaf, module)
    # A class is also named so for the model it belongs to.
    return "Shared" in type(module).__name__ and layout_of(name, module) is None and _looks_like_experts(leaf, module)


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    if not any(True for _ in module.parameters()):
        return False
    stacks = _stacks(module)
    if "gate_proj" in stacks:  # separate gate and up stacks are shared experts: every token uses all of them
        return False
    same_length = len(stacks) >= 2 and len(set(stacks.values())) == 1
    leaf = name.rpartition(".")[2]
    return bool(EXPERTS_CLASS.search(type(module).__name__) or EXPERTS_ATTRIBUTE.search(leaf)) or same_length


def _holds_experts(model: nn.Module, name: str) -> bool:
    return any(_is_routed(model, f"{name}.{path}") for path, _ in model.get_submodule(name).named_modules() if path)


def _stacks(module: nn.Module) -> dict[str, int]:
    """Own 3-D parameters of a module (convolutions aside) and how many matrices each stacks."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: parameter.shape[0] for name, parameter in own if parameter.dim() == 3 and parameter.shape[0] > 1}


def _stack_path(model: nn.Module, name: str) -> str:
    """Path of the outermost ModuleList above the module `name`."""
    match = LAYER_NUMBER.search(name)
    path = name[: match.start()] if match else ""
    if not path or not isinstance(model.get_submodule(path), nn.ModuleList):
        raise ModelError(
            f"The experts module '{name}' does not lie in a list of layers.",
            remedy="Report the model class to the project.",
        )
    return path


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
        remedy="Give a Mixture-of-Experts model. Experts are found as one module with stacked weights, or as a list or "
        "dictionary of alike modules; for any other form write a layout (see docs/adapters.md).",
    )


def _listed(items: list[str], limit: int = 6) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
