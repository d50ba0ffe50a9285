"""What vLLM knows of an artifact: which of its experts are compressed, and how each module of them is computed.

vLLM reads `quantization_config` of config.json and asks what it makes of it for a method for every layer. Latent tensors are
taken out of the stream of weights that vLLM hands to its models, since the loaders of some would drop or rename them: each
compressed module reads its own from the files, and no more of them than its process needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper

from molae_compress.kernels.gpu_experts import NAME as KERNELS
from molae_compress.modeling.quantizer import METHOD, MolaeConfig
from molae_compress.serving.artifact import ServedArtifact
from molae_compress.serving.experts import DenseMethod, GroupedFormMethod, LayerFormMethod
from molae_compress.serving.stored import LATENT_NAME
from molae_compress.tensors import AnyShape, LatentShape


class MolaeServing(QuantizationConfig):
    """The `quantization_config` of an artifact, in vLLM.

    Args:
        shapes: experts module path -> how it is stored.
    """

    def __init__(self, shapes: Mapping[str, AnyShape]) -> None:
        super().__init__()
        self._shapes = dict(shapes)
        self._artifact: ServedArtifact | None = None

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MolaeServing:
        """Raises `ModelError` on an entry of another format."""
        return cls(MolaeConfig(**config).shapes())

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Leaves latent tensors out of the stream."""
        return WeightsMapper(orig_to_new_regex={re.compile(LATENT_NAME): None})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How `layer` is computed; None is what vLLM does by itself."""
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if not isinstance(layer, RoutedExperts):
            return None
        if self._artifact is None:
            self._artifact = _open(get_current_vllm_config(), self._shapes)
        module = self._artifact.claim(prefix)
        if module is None:
            return DenseMethod(layer.moe_config)
        if isinstance(module.shape, LatentShape) and module.shape.form == "layer":
            return LayerFormMethod(layer, self._artifact, module)
        return GroupedFormMethod(layer, self._artifact, module)


def _open(config: VllmConfig, shapes: Mapping[str, AnyShape]) -> ServedArtifact:
    model, load = config.model_config, config.load_config

    def folder() -> Path:
        if Path(model.model).is_dir():
            return Path(model.model)
        from huggingface_hub import snapshot_download

        # vLLM has fetched the weights by now.
        patterns = ["*.safetensors", "*.json"]
        return Path(
            snapshot_download(
                model.model,
                revision=model.revision,
                cache_dir=load.download_dir,
                allow_patterns=patterns,
                local_files_only=True,
            )
        )

    return ServedArtifact(
        model.hf_config,
        shapes,
        folder,
        implementation=KERNELS,
        is_whole=config.parallel_config.pipeline_parallel_size == 1,
        trust_remote_code=model.trust_remote_code,
    )


def register() -> None:
    """Makes vLLM know the method."""
    register_quantization_config(METHOD)(MolaeServing)
