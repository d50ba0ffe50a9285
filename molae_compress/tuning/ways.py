"""The ways to train a compressed model: its routers, adapters on latent tensors and others, latent tensors themselves."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import nn
from transformers import PreTrainedModel

from molae_compress.errors import ModelError, RecipeError
from molae_compress.recipe.sections import Finetune
from molae_compress.tuning.method import LatentTuningConfig, TrainedLayer
from molae_compress.tuning.targets import ALL, Target, chosen, latent_modules, latent_targets, linear_targets, router_targets

_ADAPTERS = "adapters"  # name of the second adapter, where there are two
_ALPHA = 8  # by which adapters count
# Steps of Adam at the height of the schedule: of adapters as they are, of tensors relative to their root mean square.
ADAPTER_RATE, LATENT_RATE, ROUTER_RATE = 1e-3, 1e-3, 2e-3


@dataclass(frozen=True)
class Chosen:
    """What is trained, by way."""

    router: list[Target]
    adapters: list[Target]
    latent: list[Target]

    @property
    def changed(self) -> list[str]:
        """Full names of the model's own parameters that differ afterwards."""
        return [target.path for target in (*self.router, *self.adapters, *self.latent)]


def choose(model: nn.Module, settings: Finetune) -> Chosen:
    """What a recipe trains in a model, with or without weights.

    Raises:
        RecipeError: a name is nothing in the model, or a tensor is both trained and adapted.
        ModelError: the model has no latent experts, or no routers where they are to be trained.
    """
    latent_modules(model)
    router = router_targets(model) if settings.router else []
    latent: list[Target] = []
    if settings.latent:
        names = (ALL,) if settings.latent == ALL else settings.latent
        latent = chosen(latent_targets(model), names, key="finetune.latent")
    adapters: list[Target] = []
    if settings.adapters:
        inside = [target for target in latent_targets(model) if model.get_parameter(target.path).dim() > 1]
        inside = [target for target in inside if not target.short.endswith("bias")]
        known = [*inside, *linear_targets(model)] if settings.adapter_targets else inside
        adapters = chosen(known, settings.adapter_targets or (ALL,), key="finetune.adapter_targets")
    both = {target.module for target in latent} & {target.module for target in adapters}
    if both:
        short = sorted({target.short for target in adapters if target.module in both})
        raise RecipeError(
            f"`finetune.latent` and the adapters both train {', '.join(short)}.",
            why="A tensor is either trained itself or has an adapter beside it; and tensors of one core go together.",
            remedy="Divide them with `finetune.latent` and `finetune.adapter_targets`, or remove one of the two ways.",
        )
    return Chosen(router, adapters, latent)


def attach(model: PreTrainedModel, targets: Chosen, rank: int | None, *, trainable: bool = True) -> PeftModel:
    """Puts adapters onto a model, for PEFT; nothing else of it takes gradients any more.

    Args:
        model: with its weights.
        targets: what is trained in it.
        rank: of adapters.
        trainable: whether what is added takes gradients.
    """
    configs: list[LatentTuningConfig | LoraConfig] = []
    if targets.adapters:
        linear = [target for target in targets.adapters if isinstance(model.get_submodule(target.module), nn.Linear)]
        others = [target for target in targets.adapters if target not in linear]
        assert rank is not None
        configs.append(
            LoraConfig(
                r=rank,
                # divided by the root of the rank: a step moves the tensor about as far at any rank
                lora_alpha=_ALPHA,
                use_rslora=True,
                target_modules=[target.module for target in linear],
                target_parameters=[target.path for target in others] or None,
            )
        )
    if targets.router or targets.latent:
        names = sorted({target.short for target in (*targets.router, *targets.latent)})
        configs.append(LatentTuningConfig(train=names))
    first, *more = configs
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is wanted
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # between PEFT and transformers
        tuned = get_peft_model(model, first)
        for config in more:
            inject_adapter_in_model(config, tuned.get_base_model(), adapter_name=_ADAPTERS)
            cast_adapter_dtype(tuned, _ADAPTERS)
    for module in tuned.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(sorted(module._get_available_adapters()), inference_mode=not trainable)
    return tuned


def rates(tuned: PeftModel, targets: Chosen, rate: float | None) -> dict[str, float]:
    """Learning rate of every parameter that is trained, by its full name in `tuned`.

    Args:
        tuned: as `attach` made it, before any of it was trained.
        targets: what it trains.
        rate: of all; None for one that suits each.
    """
    routers = {target.module for target in targets.router}
    found: dict[str, float] = {}
    for path, module in tuned.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        inside = [(f"{path}.{name}", p) for name, p in _own_parameters(module) if p.requires_grad]
        for name, parameter in inside:
            if rate is not None:
                found[name] = rate
            elif isinstance(module, TrainedLayer):
                of_router = path.removeprefix("base_model.model.") in routers
                size = float(parameter.detach().float().square().mean().sqrt())
                found[name] = (ROUTER_RATE if of_router else LATENT_RATE) * max(size, 1e-3)
            else:
                found[name] = ADAPTER_RATE
    return found


def _own_parameters(module: Any) -> list[tuple[str, nn.Parameter]]:
    """Those of a layer of PEFT that are not of what it wraps."""
    return [(name, p) for name, p in module.named_parameters() if not name.startswith("base_layer.")]


def merge(tuned: PeftModel) -> PreTrainedModel:
    """The model with all that was trained put into its own parameters, which are float32 wherever they change.

    Raises:
        ModelError: what was trained is not finite.
    """
    for module in tuned.modules():
        if isinstance(module, BaseTunerLayer):
            for parameter in module.get_base_layer().parameters():
                parameter.data = parameter.data.float()
    try:
        merged: PreTrainedModel = tuned.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            "What was trained holds values that are not finite, and cannot be written.",
            why=str(error),
            remedy="Lower `finetune.learning_rate`, and train again.",
        ) from error
    return merged
