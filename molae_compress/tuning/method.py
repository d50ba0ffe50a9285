"""A PEFT method that trains chosen tensors of latent experts, and routers, in full: type `MOLAE`.

    from molae_compress.tuning import LatentTuningConfig
    model = peft.get_peft_model(model, LatentTuningConfig(train=["core", "router"]))

An adapter holds tensors of its own in place of the model's, which stay as they are: it can be switched off, stands beside
others, and is saved alone. Importing this module registers the method; PEFT has to know it before it loads such an adapter.
With several adapters active at once, what each of them changes is added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from molae_compress.errors import ModelError
from molae_compress.tuning.targets import ALL, Target, chosen, latent_targets, router_targets

NAME = "MOLAE"
ROUTER = "router"


def _extend_peft_types() -> None:
    """PEFT knows methods by the members of an enum, and registers no others."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


_extend_peft_types()


@dataclass
class LatentTuningConfig(PeftConfig):
    """What an adapter of this method trains.

    Attributes:
        train: `all` latent tensors, or names of some: `encode`, `core`, `core.down`, `decode`; and `router`.
        target_modules: none, PEFT only looks whether there are any.
        modules_to_save: further modules to train and store as they are, as in other methods.
    """

    train: list[str] = field(default_factory=lambda: [ALL])
    target_modules: None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(NAME)
        self.train = [self.train] if isinstance(self.train, str) else list(self.train)


def trained_targets(model: nn.Module, train: Sequence[str]) -> list[Target]:
    """What `LatentTuningConfig.train` means in a model; raises `RecipeError` for a name that is nothing there."""
    names = [name for name in train if name != ROUTER]
    found = chosen(latent_targets(model), names, key="latent") if names else []
    return found + (router_targets(model) if ROUTER in train else [])


class TrainedLayer(nn.Module, BaseTunerLayer):
    """Stands for a module some of whose own parameters are trained."""

    adapter_layer_names = ("molae_trained",)
    _before: dict[str, Tensor]

    def __init__(self, base_layer: nn.Module, adapter_name: str, names: Sequence[str], config: LatentTuningConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.molae_trained = nn.ModuleDict({})
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.__dict__["_before"] = {}  # values that merging replaced
        self.update_layer(adapter_name, names, config)

    def update_layer(self, adapter_name: str, names: Sequence[str], config: LatentTuningConfig) -> None:
        """Adds an adapter, which begins as the module is."""
        base = self.get_base_layer()
        copies = {name: nn.Parameter(base.get_parameter(name).detach().clone()) for name in names}
        self.molae_trained[adapter_name] = nn.ParameterDict(copies)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts the values of adapters into the module.

        Raises:
            ValueError: with `safe_merge`, a value is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        base = self.get_base_layer()
        merging = [*self.merged_adapters, *(name for name in names if name in self.molae_trained)]
        values = {name: value.detach() for name, value in self._values(merging)}
        if safe_merge and not all(value.isfinite().all() for value in values.values()):
            raise ValueError(f"The adapters {', '.join(merging)} hold values that are not finite, and are not merged.")
        for name, value in values.items():
            parameter = base.get_parameter(name)
            self._before.setdefault(name, parameter.data)
            parameter.data = value.to(parameter.dtype)
        self.merged_adapters = merging

    def unmerge(self) -> None:
        """Puts the values from before merging back."""
        for name, value in self._before.items():
            self.get_base_layer().get_parameter(name).data = value
        self._before.clear()
        self.merged_adapters = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes with the tensors of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        values = dict(self._values(self._applied()))
        if not values:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, values, args, kwargs)

    @property
    def weight(self) -> Tensor:
        """As the module would show it."""
        value: Tensor = self._shown("weight")
        return value

    @property
    def bias(self) -> Tensor:
        """As the module would show it."""
        value: Tensor = self._shown("bias")
        return value

    def __getattr__(self, name: str) -> Any:
        """Models read tensors and attributes of modules such as routers, past their forward."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return self._shown(name)

    def _shown(self, name: str) -> Any:
        for found, value in self._values(self._applied()):
            if found == name:
                return value
        return getattr(self.base_layer, name)

    def _applied(self) -> list[str]:
        """The adapters whose values stand for those of the module."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.molae_trained]

    def _values(self, adapters: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every parameter that these adapters change, in the type of the module's own."""
        base = self.get_base_layer()
        held = [dict(self.molae_trained[adapter].named_parameters()) for adapter in adapters]
        for name in dict.fromkeys(name for parameters in held for name in parameters):
            own = [parameters[name] for parameters in held if name in parameters]
            start = self._before.get(name, base.get_parameter(name).detach())
            value = own[0] if len(own) == 1 else start.float() + torch.stack([one.float() - start for one in own]).sum(0)
            yield name, value.to(start.dtype)


class LatentTuner(BaseTuner):
    """Puts `TrainedLayer` in place of every module that holds a tensor to train."""

    prefix = "molae_"
    tuner_layer_cls = TrainedLayer
    target_module_mapping = {}  # noqa: RUF012 - an attribute of instances in the base class

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        names: dict[str, list[str]] = {}
        for target in trained_targets(model, peft_config.train):
            names.setdefault(target.module, []).append(target.name)
        for path in names:
            module = model.get_submodule(path)
            if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainedLayer):
                raise ModelError(
                    f"'{path}' has an adapter of {type(module).__name__} already.",
                    why="A tensor cannot be trained itself and have an adapter beside it.",
                    remedy="Name other tensors in `train`, or in the targets of the adapter.",
                )
        self.__dict__["_names"] = names

    def _check_target_module_exists(self, peft_config: LatentTuningConfig, key: str) -> bool:  # type: ignore[override]
        return key in self.__dict__["_names"]

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        names = self.__dict__["_names"][current_key]
        if isinstance(target, TrainedLayer):
            target.update_layer(adapter_name, names, peft_config)
            return
        new = TrainedLayer(target, adapter_name, names, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The method of the base class looks for weights by their usual names.
        setattr(parent, child_name, new_module)
        new_module.train(child.training)


def register() -> None:
    """Makes PEFT know the method; registering twice changes nothing."""
    if PeftType(NAME) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=LatentTuningConfig, model_cls=LatentTuner)


register()
