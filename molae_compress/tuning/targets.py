"""What there is to train in a compressed model, by names that hold for every layer and form.

The name of a latent tensor is that of `LatentShape.tensors`, without the bank it lies in: `encode.weight`, `core.down`,
`decode_bias`. The first part of it alone, such as `core`, names all that begin so.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from molae_compress.errors import ModelError, RecipeError
from molae_compress.layouts.lists import router_parameters
from molae_compress.modeling.latent import LatentExperts

_BANK = re.compile(r"^bank_\d+\.")
ALL = "all"


@dataclass(frozen=True)
class Target:
    """A parameter that can be trained.

    Attributes:
        module: path of the module that holds it.
        name: of the parameter there.
        short: by what it is asked for.
    """

    module: str
    name: str
    short: str

    @property
    def path(self) -> str:
        """Full name of the parameter."""
        return f"{self.module}.{self.name}"


def latent_modules(model: nn.Module) -> dict[str, LatentExperts]:
    """Path -> latent experts module of a model.

    Raises:
        ModelError: it has none.
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, LatentExperts)}
    if not found:
        raise ModelError(
            f"{type(model).__name__} holds no latent experts.",
            why="Fine-tuning trains what a compression has made.",
            remedy="Give a folder that `molae-compress apply` or `init` wrote; import molae_compress before it is loaded.",
        )
    return found


def latent_targets(model: nn.Module) -> list[Target]:
    """The latent tensors of a model that can be trained: all of bases and cores but column indices."""
    found = []
    for path, latent in latent_modules(model).items():
        for name in latent.shape.tensors(latent.spec):
            inner, _, leaf = name.rpartition(".")
            if _BANK.sub("", name) != "decode_bias" and leaf != "pivots":
                found.append(Target(f"{path}.{inner}", leaf, _BANK.sub("", name)))
    return found


def router_targets(model: nn.Module) -> list[Target]:
    """The parameters of the routers beside latent experts.

    Raises:
        ModelError: beside an experts module there is none that is found.
    """
    found: dict[str, Target] = {}
    for path, latent in latent_modules(model).items():
        above, _, leaf = path.rpartition(".")
        latent_names = [f"{leaf}.{name}" for name in latent.shape.tensors(latent.spec)]
        own = router_parameters(model.get_submodule(above), leaf, latent.num_experts, latent_names)
        if not own or not all("." in name for name in own):
            raise ModelError(
                f"No router that can be trained was found beside the experts '{path}'.",
                why=f"'{above}' holds no module there that makes one logit for each expert.",
                remedy="Train something else: `adapters`, or `latent`.",
            )
        for name in own:
            inner, _, parameter = name.rpartition(".")
            found[f"{above}.{name}"] = Target(f"{above}.{inner}", parameter, "router")
    return list(found.values())


def linear_targets(model: nn.Module) -> list[Target]:
    """The linear layers outside latent experts, but for routers and the head, by the last part of their names."""
    latent = latent_modules(model)
    inside = tuple(f"{path}." for path in latent)
    # whatever lies beside experts and makes one logit for each of them is a router
    routers = {
        f"{above}.{name.rpartition('.')[0]}"
        for above, _, leaf in (path.rpartition(".") for path in latent)
        for name in router_parameters(model.get_submodule(above), leaf, latent[f"{above}.{leaf}"].num_experts)
    }
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [
        Target(path, "weight", path.rpartition(".")[2])
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(inside) and path not in routers and module is not head
    ]


def chosen(targets: Sequence[Target], names: Collection[str], *, key: str) -> list[Target]:
    """Those of `targets` that `names` ask for.

    Args:
        targets: to choose from.
        names: `all`, short names, or the first part of some.
        key: of the recipe, for messages.

    Raises:
        RecipeError: a name stands for none; the message names similar ones.
    """
    if ALL in names:
        return list(targets)
    known = sorted({name for target in targets for name in _names(target)})
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            listed = ", ".join(sorted({target.short for target in targets}))
            dense = any(part in name for part in ("experts", "gate_proj", "up_proj", "down_proj", "gate_up_proj"))
            gone = "The dense experts are gone, and their tensors with them. " if dense else ""
            raise RecipeError(
                f"`{key}` names '{name}', which is nothing in this model.",
                why=f"{gone}There are: {listed}.",
                remedy=f"Did you mean {' or '.join(repr(match) for match in near)}?" if near else "Choose among these.",
            )
    return [target for target in targets if any(name in names for name in _names(target))]


def _names(target: Target) -> Iterator[str]:
    yield target.short
    first = target.short.partition(".")[0]
    if first != target.short:
        yield first
