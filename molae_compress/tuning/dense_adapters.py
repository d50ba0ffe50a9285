"""Adapters from disk on a compressed model; those made for the dense model are told apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from molae_compress.errors import CheckpointError, ModelError
from molae_compress.tuning.method import NAME
from molae_compress.tuning.targets import latent_modules

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPED = re.compile(r"\.base_layer(?=\.)")


def load_adapter(model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` for a compressed model, which refuses adapters of dense experts.

    PEFT itself leaves those out with at most a warning where the names differ, and adds nothing to the experts.

    Args:
        model: a compressed model.
        folder: what `save_pretrained` of an adapter wrote.
        is_trainable: go on training it.

    Raises:
        CheckpointError: there is no adapter in the folder.
        ModelError: it was made for the dense model, or for another compression of it.
    """
    folder = Path(folder)
    check_adapter(model, folder)
    return PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)


def check_adapter(model: nn.Module, folder: Path) -> None:
    """Raises as `load_adapter`, which see."""
    try:
        PeftConfig.from_pretrained(str(folder))
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        content = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"'{folder}' holds no adapter that can be read ({error}).",
            remedy=f"Give a folder with {_CONFIG} and {_WEIGHTS}, as `save_pretrained` of PEFT writes it.",
        ) from error
    latent = latent_modules(model)
    for key, shape in shapes.items():
        path = _WRAPPED.sub("", key.removeprefix("base_model.model."))
        inside = next((name for name in latent if path.startswith(f"{name}.")), None)
        if inside is not None and not _fits(latent[inside], path.removeprefix(f"{inside}."), shape, content):
            raise ModelError(
                f"The adapter '{folder}' does not fit the latent experts '{inside}' (its tensor '{key}').",
                why="It was made for dense experts, or for another compression: the tensors it changes are not here.",
                remedy="Merge it into the model that it was made for and compress the result, or train a new adapter on "
                "this one (`molae-compress finetune`). Parts of an adapter outside the experts would fit.",
            )


def _fits(latent: nn.Module, path: str, shape: tuple[int, ...], config: dict[str, object]) -> bool:
    """Whether an adapter's tensor at a path inside latent experts belongs to one of their tensors."""
    parts = path.split(".")
    try:
        holder = latent.get_submodule(".".join(parts[: next(i for i, part in enumerate(parts) if _is_of_method(part))]))
    except (AttributeError, StopIteration):
        return False
    if holder is latent:
        return False  # dense experts are adapted as a whole, latent ones part by part
    sizes = {size for parameter in holder.parameters(recurse=False) for size in parameter.shape}
    if config.get("peft_type") == NAME:
        held = dict(holder.named_parameters(recurse=False)).get(parts[-1])
        return held is not None and tuple(held.shape) == shape
    return any(size in sizes for size in shape)


def _is_of_method(part: str) -> bool:
    """Whether a part of a name begins what a PEFT method adds."""
    return part.startswith(("lora_", "molae_", "modules_to_save"))
