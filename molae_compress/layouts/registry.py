"""All known layouts, those of other packages included, and the one that fits a module."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from functools import cache

from torch import Tensor, nn
from transformers import PretrainedConfig

from molae_compress.errors import ModelError
from molae_compress.layouts.base import Layout
from molae_compress.layouts.fused import Decorated, ExpertMajor, Stacked, Undecorated, WholeBlock, WithIdentityExperts
from molae_compress.layouts.lists import ExpertList, NllbExperts, SwitchExperts
from molae_compress.tensors import DenseExperts, ExpertsSpec

GROUP = "molae_compress.adapters"  # of entry points
TOP_K_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
)
LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")
_BUILT_IN: tuple[type[Layout], ...] = (
    Decorated,
    Undecorated,
    WithIdentityExperts,
    ExpertMajor,
    Stacked,
    WholeBlock,
    SwitchExperts,
    NllbExperts,
    ExpertList,
)


@cache
def layouts() -> tuple[Layout, ...]:
    """Every layout of this package, and those that installed packages register under `molae_compress.adapters`.

    Raises:
        ModelError: an entry point cannot be imported, or is not a `Layout`.
    """
    found = [layout() for layout in _BUILT_IN]
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            found.append(entry.load()())
        except (ImportError, AttributeError, TypeError) as error:
            raise ModelError(
                f"The layout '{entry.name}' ({entry.value}) of an installed package cannot be used ({error}).",
                remedy="Repair or uninstall the package that registers it.",
            ) from error
        if not isinstance(found[-1], Layout):
            raise ModelError(
                f"'{entry.name}' ({entry.value}) is registered under {GROUP} but is no subclass of Layout.",
                remedy="Repair or uninstall the package that registers it.",
            )
    return tuple(found)


def layout_of(name: str, module: nn.Module) -> Layout | None:
    """The layout of a module, or None if it is no experts module that is known.

    Args:
        name: path of the module inside its model.
        module: any module.

    Raises:
        ModelError: two layouts claim it.
    """
    matching = [layout for layout in layouts() if layout.matches(name, module)]
    if len(matching) > 1:
        raise ModelError(
            f"The module '{name}' of class {type(module).__name__} matches {len(matching)} layouts: "
            f"{', '.join(type(layout).__qualname__ for layout in matching)}.",
            why="Which of them describes it cannot be told.",
            remedy="Uninstall or narrow the layout that claims too much.",
        )
    return matching[0] if matching else None


def routed_layout(model: nn.Module, name: str) -> Layout | None:
    """The layout of the module at path `name`, if its surroundings too say that it is routed experts; else None."""
    module = model.get_submodule(name)
    layout = layout_of(name, module)
    if layout is None or not layout.belongs(name, module, model.get_submodule(name.rpartition(".")[0])):
        return None
    return layout


def describe_in(model: nn.Module, name: str) -> ExpertsSpec:
    """The `ExpertsSpec` of the experts module at path `name` of a live or meta model.

    Raises:
        ModelError: it is of no known layout or of several, its weights do not fit together, or how many experts a token
            uses is told nowhere.
    """
    layout, module = _known(model, name)
    top_k = _top_k(model, name, module, layout.top_k(module))
    return layout.describe(module, name, layer=_layer_index(name), top_k=top_k)


def weight_names(model: nn.Module, name: str) -> tuple[str, ...]:
    """Full names of the parameters of a model that are the weights of its experts module at path `name`."""
    layout, module = _known(model, name)
    return tuple(f"{name}.{weight}" for weight in layout.weight_names(module))


def dense_experts(model: nn.Module, spec: ExpertsSpec, weights: Mapping[str, Tensor] | None = None) -> DenseExperts:
    """Canonical view of the weights of one experts module; see `Layout.dense`."""
    layout, module = _known(model, spec.name)
    return layout.dense(module, spec, weights)


def _known(model: nn.Module, name: str) -> tuple[Layout, nn.Module]:
    module = model.get_submodule(name)
    layout = layout_of(name, module)
    if layout is None:
        raise ModelError(
            f"The module '{name}' of class {type(module).__name__} is no experts module of a known layout.",
            remedy="Write a layout for the class (see docs/adapters.md), or report it to the project.",
        )
    return layout, module


def _layer_index(name: str) -> int:
    match = LAYER_NUMBER.search(name)
    if match is None:
        raise ModelError(
            f"The experts module '{name}' does not lie in a numbered layer.",
            remedy="Report the model class to the project.",
        )
    return int(match[1])


def _top_k(model: nn.Module, name: str, experts: nn.Module, known: int | None) -> int:
    """Experts per token: what the layout or the router beside the experts says, else the configuration."""
    parent = model.get_submodule(name.rpartition(".")[0])
    config = experts.__dict__.get("config") or getattr(model, "config", None)
    config = config.get_text_config() if isinstance(config, PretrainedConfig) else config
    values = [known, getattr(parent, "top_k", None), *(getattr(child, "top_k", None) for child in parent.children())]
    values += [getattr(config, key, None) for key in TOP_K_NAMES]
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ModelError(
        f"How many experts a token uses in '{name}' is told neither by its router nor by the configuration.",
        why=f"Looked for top_k beside the experts and for {', '.join(TOP_K_NAMES)} in {type(config).__name__}.",
        remedy="Add num_experts_per_tok to config.json.",
    )
