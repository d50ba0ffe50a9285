"""A model that several processes train, each of which holds a part of every tensor (FSDP of version 2)."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from molae_compress.errors import RecipeError


def check_sharding(arguments: TrainingArguments) -> None:
    """Raises `RecipeError` for FSDP as it is not done here."""
    config: Any = arguments.fsdp_config
    version = int(config.get("version", 2)) if arguments.fsdp else None
    if version is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        version = int(os.environ.get("FSDP_VERSION", "1"))  # by the flags of `accelerate launch`
    if version == 1:
        raise RecipeError(
            "FSDP of version 1 cannot train what is put onto a model here.",
            why="It takes adapters apart from the modules that read them, which then find parts of tensors.",
            remedy="Use `fsdp_config: {version: 2}` in `finetune.trainer`, or `accelerate launch --fsdp_version 2`.",
        )
    if arguments.fsdp and arguments.parallel_mode != ParallelMode.DISTRIBUTED:
        raise RecipeError(
            "`finetune.trainer.fsdp` divides the model among processes, and there is one.",
            remedy="Start several with `accelerate launch`, or remove it.",
        )


def whole_tensors(model: nn.Module) -> dict[str, Any]:
    """What is trained of a model, gathered on the CPU; all processes have to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    gathered: dict[str, Any] = get_model_state_dict(model, options=options)
    return gathered


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor, divided among the processes as a parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
