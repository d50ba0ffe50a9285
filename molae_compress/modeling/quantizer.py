"""How an unmodified `AutoModelForCausalLM.from_pretrained` loads a compressed model.

transformers finds `quantization_config` in `config.json` and lets the quantizer registered for its `quant_method` edit
the skeleton of the model before weights are read. Importing this module registers it; without it transformers warns and
loads random experts. Nothing is quantised: latent experts are ordinary parameters, so all of training stays open.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from molae_compress.errors import ModelError
from molae_compress.kernels.gpu_experts import register_experts
from molae_compress.layouts import LAYER_NUMBER, describe_in, layout_of
from molae_compress.modeling.expand import expand_
from molae_compress.modeling.latent import LatentExperts, check_shape, check_tensors
from molae_compress.tensors import AnyShape, shape_from_dict

METHOD = "molae"
FORMAT = 1


class MolaeConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed model.

    Args:
        modules: experts module path -> `LatentShape.to_dict()`.
        format: version of the layout on disk.
        version: version of molae_compress that wrote the model; the installed one by default.
        quant_method: always `molae`.

    Raises:
        ModelError: the entry was written in a format this version does not know.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format: int = FORMAT,
        version: str | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # declared as transformers' own enum
        self.format, self.modules = format, dict(modules or {})
        self.version = installed_version() if version is None else version
        if format != FORMAT or unknown or quant_method != METHOD:
            extra = f" with the unknown fields {', '.join(sorted(unknown))}" if unknown else ""
            raise ModelError(
                f"The quantization_config has format {format!r}{extra}; this is molae_compress {installed_version()}, "
                f"which reads format {FORMAT}.",
                why=f"The model was written by molae_compress {self.version}.",
                remedy="Install that version, or compress the model again.",
            )

    def shapes(self) -> dict[str, AnyShape]:
        """Experts module path -> latent shape. Raises `ModelError` on an entry that cannot be read."""
        return {name: shape_from_dict(entry, name=name) for name, entry in self.modules.items()}


class MolaeQuantizer(HfQuantizer):
    """Puts `LatentExperts` in place of stock experts before weights are loaded."""

    requires_calibration = True
    quantization_config: MolaeConfig

    def __init__(self, quantization_config: MolaeConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ModelError(
                "The checkpoint is not compressed, so it cannot be loaded with a MolaeConfig.",
                why="Latent experts come out of a compression run, not out of loading.",
                remedy="Load it without quantization_config, and compress it with `molae-compress apply` or compress_.",
            )
        super().__init__(quantization_config, **kwargs)
        self._paths: list[str] = []

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self._paths = swap_(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for path in self._paths:
            latent = model.get_submodule(path)
            assert isinstance(latent, LatentExperts)
            _refuse_unloaded(model, path, latent)
            latent.finish_loading_()
        # Latent experts are plain floating-point parameters: `.float()`, compilation and full training are all right.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Takes latent experts out of tensor- and expert-parallel plans, which know the dense tensors only.

        Every rank then holds them whole, which is right under tensor parallelism; a request for expert parallelism
        finds no plan, and transformers refuses it.
        """
        covered = {re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in self._paths}
        for key in [key for key in plan if any(key == path or key.startswith(f"{path}.") for path in covered)]:
            del plan[key]

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        return expand_(model)

    def is_serializable(self, **kwargs: Any) -> bool:
        """Saved as it is loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """All parameters take gradients."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Full fine-tuning needs no adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The forward pass has no graph breaks on `grouped_mm` and `batched_mm`."""
        return True


def swap_(model: PreTrainedModel, config: MolaeConfig) -> list[str]:
    """Puts empty latent experts where `config` names them, on the skeleton of a dense model; returns their paths.

    All entries are checked before the first module is swapped.

    Raises:
        ModelError: a module does not exist, is no experts module of a known layout, or its shape is impossible.
    """
    wanted = {_resolve(model, name): shape for name, shape in config.shapes().items()}
    specs = {path: describe_in(model, path) for path in wanted}
    for path, shape in wanted.items():
        _replace(model, path, LatentExperts.from_stock(model.get_submodule(path), specs[path], shape))
    return list(wanted)


def attach_(model: PreTrainedModel, modules: Mapping[str, tuple[AnyShape, Mapping[str, Tensor]]]) -> PreTrainedModel:
    """Replaces experts of a live model by latent ones, in place; `save_pretrained` then writes a compressed model.

    Call it once for all modules or several times for some each. Everything is checked before the model is touched.

    Args:
        model: the model, on whose devices and in whose types the tensors are placed.
        modules: experts module path -> its latent shape and the tensors `LatentShape.tensors` names.

    Raises:
        ModelError: a path is no experts module of a known layout, a shape or its tensors do not fit, or the model is
            quantised by another method or offloaded.
    """
    check_attachable(model, modules)
    config = getattr(model.config, "quantization_config", None)
    specs = {}
    for name, (shape, tensors) in modules.items():
        specs[name] = describe_in(model, name)
        check_shape(specs[name], shape)
        check_tensors(specs[name], shape, tensors)
    for name, (shape, tensors) in modules.items():
        latent = LatentExperts.from_stock(model.get_submodule(name), specs[name], shape)
        latent.load_latent_(tensors)
        _replace(model, name, latent)
    entries = {name: shape.to_dict() for name, (shape, _) in modules.items()}
    model.config.quantization_config = MolaeConfig({**(config.modules if config else {}), **entries})
    return model


def check_attachable(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuses a live model whose experts `attach_` could not replace, whatever by; raises `ModelError` as it does."""
    config = getattr(model.config, "quantization_config", None)
    if config is not None and not isinstance(config, MolaeConfig):
        raise ModelError(
            f"The model is quantised already (quantization_config {type(config).__name__}).",
            remedy="Load the original model, without quantisation.",
        )
    for name in names:
        experts = _experts_at(model, name)
        if experts is None:
            raise _mismatch(model, name)
        if any("_hf_hook" in vars(module) for module in experts.modules()):
            raise ModelError(
                f"The experts '{name}' are dispatched by accelerate.",
                why="Its hooks would stay behind and move the new tensors.",
                remedy="Load the model on one device, without offloading.",
            )
        if unloaded := [key for key, weight in experts.named_parameters() if weight.is_meta]:
            raise ModelError(
                f"The experts '{name}' have no weights in memory ('{unloaded[0]}' is on the meta device).",
                remedy="Load the model with its weights, or compress the checkpoint with `run`.",
            )


def installed_version() -> str:
    """Version of the installed package; `source` where it runs from a source tree."""
    try:
        return importlib.metadata.version("molae-compress")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def register() -> None:
    """Makes transformers know the method and the experts implementation, under whatever name this module was imported."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(MolaeConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(MolaeQuantizer)
    register_experts()


def _resolve(model: PreTrainedModel, name: str) -> str:
    """The path of the experts module `name` in this model, which may lack a head or other towers, or have more of them.

    What is above the list of layers may differ, as long as one module only fits.
    """
    if _experts_at(model, name) is not None:
        return name
    inside = _in_layers(name)
    fitting: list[str] = [
        path for path, _ in model.named_modules() if _in_layers(path) == inside and _experts_at(model, path) is not None
    ]
    if len(fitting) != 1:
        raise _mismatch(model, name)
    return fitting[0]


def _in_layers(name: str) -> str:
    """The path from the list of layers on."""
    number = LAYER_NUMBER.search(name)
    return name if number is None else name[name.rfind(".", 0, number.start()) + 1 :]


def _experts_at(model: nn.Module, path: str) -> nn.Module | None:
    parent, _, leaf = path.rpartition(".")
    try:
        module = getattr(model.get_submodule(parent), leaf, None)
    except AttributeError:
        return None
    return module if isinstance(module, nn.Module) and layout_of(path, module) is not None else None


def _mismatch(model: PreTrainedModel, name: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} holds no routed experts at '{name}'.",
        why="The model and the list of compressed modules do not belong together.",
        remedy="Use the config.json that was written with the weights.",
    )


def _refuse_unloaded(model: PreTrainedModel, path: str, latent: LatentExperts) -> None:
    """Random experts are worse than none. transformers marks what it read from the file; dispatching loses the mark."""
    if len(set(getattr(model, "hf_device_map", {"": ""}).values())) > 1:
        return
    held = latent.state_dict(keep_vars=True)
    missing = [name for name, tensor in held.items() if not getattr(tensor, "_is_hf_initialized", False)]
    if missing:
        raise ModelError(
            f"The checkpoint has no tensors {', '.join(f'{path}.{name}' for name in missing)}.",
            why="config.json says that these experts are compressed.",
            remedy="Fetch the model again, or use the config.json that was written with the weights.",
        )


def _replace(model: PreTrainedModel, path: str, latent: LatentExperts) -> None:
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    setattr(parent, leaf, latent)
    # Some classes initialise the experts' weights together with their block; those weights are gone, and the rest of the
    # block is read from the checkpoint, as transformers reports if it is not.
    if not parent._non_persistent_buffers_set:
        parent._is_hf_initialized = True  # type: ignore[assignment]
    # Experts of two stacks that are one in the original become two: what ties them speaks of weights that are gone.
    ties = model.all_tied_weights_keys
    for tied in [tied for pair in ties.items() for tied in pair[:1] if any(name.startswith(f"{path}.") for name in pair)]:
        if not all(_holds(model, name) for name in (tied, ties[tied])):
            del ties[tied]


def _holds(model: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    try:
        return leaf in model.get_submodule(parent)._parameters
    except AttributeError:
        return False


register()
