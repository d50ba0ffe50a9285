"""A model without weights: its modules on the meta device, filled and emptied one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from molae_compress.errors import ModelError


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model folder.

    Raises:
        ModelError: there is none, transformers does not know its model type, or it needs code from the folder and
            `trust_remote_code` is off. Code for a type that transformers knows is not needed, and not run.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ModelError(f"'{folder}' has no config.json.", remedy="Give the folder of a Hugging Face model.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"'{path}' is not valid JSON ({error}).", remedy="Fetch the file again.") from error
    if "auto_map" in content and content.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise ModelError(
            f"The model in '{folder}' brings its own code ({content['auto_map']}).",
            why="Code from a model folder runs with your rights.",
            remedy="Read that code, then allow it with --trust-remote-code.",
        )
    try:
        return cast(PretrainedConfig, AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise ModelError(
            f"The configuration '{path}' cannot be used ({error}).",
            remedy="Check `model_type`; a newer transformers may be needed.",
        ) from error


def drop_quantization_(config: PretrainedConfig) -> None:
    """Takes out what a configuration and those nested in it say about quantised weights."""
    vars(config).pop("quantization_config", None)
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            drop_quantization_(value)


def model_class(config: PretrainedConfig) -> Any:
    """What loads a whole checkpoint: the class of transformers that its config names, else `AutoModelForCausalLM`.

    For a composite of text and other towers the latter may load the text model alone.

    Raises:
        ModelError: the class that is named belongs to another model type.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if _is_own_code(config) or not (isinstance(named, type) and issubclass(named, PreTrainedModel)):
        return AutoModelForCausalLM
    if not isinstance(config, named.config_class or PretrainedConfig):
        raise ModelError(
            f"The configuration is of model type '{config.model_type}', but its `architectures` names {named.__name__}.",
            why="That class is configured by another model type.",
            remedy="Fetch config.json of the model again.",
        )
    return named


def _is_own_code(thing: object) -> bool:
    """Whether the class of a configuration or model came with a model folder."""
    return type(thing).__module__.partition(".")[0] != "transformers"


def code_fingerprint(folder: Path, model: PreTrainedModel) -> str:
    """SHA-256 over the Python files of a model folder, in hex; empty if none of them is used."""
    if not (_is_own_code(model) or _is_own_code(model.config)):
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `config` (see `model_class`) in evaluation mode, parameters float32 on meta, other buffers on the CPU."""
    loader = model_class(config)
    try:
        with torch.device("meta"):
            if loader is AutoModelForCausalLM:
                model = loader.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
            else:
                model = loader._from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise ModelError(
            f"No causal language model class belongs to model type '{config.model_type}'.",
            why=str(error).split("\n")[0],
            remedy="Compress a model that AutoModelForCausalLM loads.",
        ) from error
    model = cast(PreTrainedModel, model.eval().requires_grad_(False))
    _fill_computed_buffers(model)
    return model


def _fill_computed_buffers(model: PreTrainedModel, root: nn.Module | None = None) -> None:
    """Rotary tables and the like are in no checkpoint: made as `from_pretrained` makes them, by the model's own code.

    Inside a composite that is the code of the innermost model around the buffer.
    """
    root = model if root is None else root
    for child in root.children():
        _fill_computed_buffers(child if isinstance(child, PreTrainedModel) else model, child)
    if zero_computed_buffers_(root, recurse=False):
        model._init_weights(root)


def zero_computed_buffers_(root: nn.Module, *, recurse: bool = True) -> bool:
    """Takes buffers that no checkpoint stores off the meta device, as zeros on the CPU; returns whether there are any."""
    found = False
    for module in root.modules() if recurse else (root,):
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
                found = True
    return found


def fill_(root: nn.Module, tensors: Mapping[str, Tensor], device: torch.device, *, keep_dtype: bool = False) -> None:
    """Gives parameters and buffers of `root` their values, by full name, in the types the model declares or as stored."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        module = root.get_submodule(parent)
        held: Any = module._parameters if leaf in module._parameters else module._buffers
        dtype = tensor.dtype if keep_dtype or not tensor.is_floating_point() else held[leaf].dtype
        value = tensor.to(device=device, dtype=dtype)
        held[leaf] = nn.Parameter(value, requires_grad=False) if held is module._parameters else value


def empty_(module: nn.Module) -> None:
    """Sends parameters and persistent buffers back to the meta device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = buffer.to("meta")
