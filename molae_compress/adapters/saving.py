"""Parameters of a model class in the format that checkpoints of its family have on disk."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def in_hub_format(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_pretrained` would store for some parameters of `model`: key on disk -> tensor, contiguous.

    Args:
        model: of the class, without weights; one that was not loaded, so that nothing is remembered of a loading.
        tensors: parameters by name; those that are stored together must be given together.
    """
    stored = revert_weight_conversion(model, dict(tensors))
    return {key: tensor.contiguous() for key, tensor in stored.items()}
