"""Configurations of models that do not exist yet, and the dense model of one, with random weights."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    configuration_utils,
)

from molae_compress.adapters.skeleton import model_class, read_config
from molae_compress.checkpoint.source import resolve_model
from molae_compress.errors import ModelError, RecipeError


def configuration(
    config: str | Path | PretrainedConfig, values: Mapping[str, Any], *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """A configuration of its own, with some values replaced.

    Args:
        config: a model type of transformers, a folder or hub id with a `config.json`, or a configuration, which is copied.
        values: by the names that transformers gives them.
        trust_remote_code: allow code from the folder.

    Raises:
        RecipeError: the configuration has no value of a name.
        ModelError, CheckpointError: there is no such model type, folder or model.
    """
    if isinstance(config, PretrainedConfig):
        content = copy.deepcopy(config)
        _check_values(content, values)
        for key, value in values.items():
            setattr(content, key, value)
        return content
    if isinstance(config, str) and config in CONFIG_MAPPING:
        _check_values(AutoConfig.for_model(config), values)
        return AutoConfig.for_model(config, **values)
    if isinstance(config, str) and "/" not in config and not Path(config).exists():
        near = difflib.get_close_matches(config, CONFIG_MAPPING, n=3)
        raise ModelError(
            f"'{config}' is neither a model type of transformers nor a folder.",
            remedy=f"Did you mean {' or '.join(repr(name) for name in near)}?" if near else "Give for example 'qwen3_moe'.",
        )
    folder = resolve_model(str(config), weights=False)
    return configuration(read_config(folder, trust_remote_code=trust_remote_code), values)


def _check_values(config: PretrainedConfig, values: Mapping[str, Any]) -> None:
    """Values of any name are taken by transformers; those it heeds are declared, or read in the code of the family."""
    known = {*config.to_dict(), *config.attribute_map}
    folder = Path(inspect.getfile(type(config))).parent
    for key in values:
        if key in known or hasattr(config, key):
            continue
        code = [path.read_text(encoding="utf-8") for path in (*folder.glob("*.py"), Path(configuration_utils.__file__))]
        if not any(re.search(rf"\b{re.escape(key)}\b", text) for text in code):
            near = difflib.get_close_matches(key, known, n=2)
            raise RecipeError(
                f"{type(config).__name__} has no value '{key}'.",
                remedy=f"Did you mean {' or '.join(repr(name) for name in near)}?" if near else "",
            )


def dense_model(config: PretrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration, as transformers initialises it; raises `ModelError` where it cannot be built."""
    loader = model_class(config)
    try:
        if loader is AutoModelForCausalLM:
            model = loader.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        else:
            model = loader._from_config(config, dtype=dtype)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ModelError(
            f"A model of type '{config.model_type}' cannot be built from this configuration.",
            why=f"transformers says: {str(error).splitlines()[0]}.",
            remedy="Change the values of its configuration.",
        ) from error
    return cast(PreTrainedModel, model)
