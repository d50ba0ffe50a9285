"""An artifact as a serving engine sees it: its compressed modules, and what a process holds of each.

Knows transformers and the files of the artifact, and nothing of any engine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from molae_compress.adapters.skeleton import drop_quantization_, skeleton
from molae_compress.checkpoint import Checkpoint
from molae_compress.errors import ModelError
from molae_compress.layouts import Layout, describe_in, layout_of
from molae_compress.modeling.latent import LatentExperts, check_shape
from molae_compress.serving.share import Cut, Share, cut_grouped_form
from molae_compress.serving.stored import find_tensors, module_of, read_cuts
from molae_compress.tensors import AnyShape, ExpertsSpec

EXPAND = "Expand the model with `molae-compress expand`, and serve the result."


class Module(NamedTuple):
    """One compressed module.

    Attributes:
        stock: the experts of the original on the meta device, for their activation.
        layout: how these store weights.
        spec: what they are.
        shape: how they are stored in the artifact.
    """

    stock: nn.Module
    layout: Layout
    spec: ExpertsSpec
    shape: AnyShape


class ServedArtifact:
    """The compressed modules of an artifact.

    Args:
        config: configuration of the original model.
        shapes: experts module path -> how it is stored.
        folder: finds the files; called when the first tensor is wanted, after an engine has fetched them.
        implementation: experts implementation of transformers by which latent experts compute.
        is_whole: the engine has built all layers of the model, by the time the first tensor is read.
        trust_remote_code: allow code of the model folder.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        shapes: Mapping[str, AnyShape],
        folder: Callable[[], Path],
        *,
        implementation: str,
        is_whole: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        self._shapes, self._folder, self._is_whole = dict(shapes), folder, is_whole
        self._owner: dict[str, str] = {}
        config = copy.deepcopy(config)
        drop_quantization_(config)
        self._skeleton = skeleton(config, trust_remote_code=trust_remote_code)
        self._skeleton.config._experts_implementation = implementation

    def claim(self, prefix: str) -> Module | None:
        """The compressed module that the engine's experts at `prefix` are; None if they stayed dense.

        Raises:
            ModelError: two layers of the engine claim one module, or it is none that the artifact can hold.
        """
        name = module_of(prefix, self._shapes)
        if name is None:
            return None
        if self._owner.setdefault(name, prefix) != prefix:
            raise ModelError(
                f"The experts '{self._owner[name]}' and '{prefix}' of the engine are both the compressed module '{name}'.",
                remedy=EXPAND,
            )
        try:
            stock = self._skeleton.get_submodule(name)
            spec = describe_in(self._skeleton, name)
        except AttributeError as error:
            raise ModelError(
                f"{type(self._skeleton).__name__} has no module '{name}'.",
                why="The model and the list of compressed modules do not belong together.",
                remedy="Use the config.json that was written with the weights.",
            ) from error
        layout = layout_of(name, stock)
        assert layout is not None
        check_shape(spec, self._shapes[name])
        return Module(stock, layout, spec, self._shapes[name])

    def read(self, module: Module, cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
        """Tensors of a share of a module.

        Raises:
            ModelError: the engine has built its layers, and some compressed modules are in none of them.
            CheckpointError: the files do not hold the whole module.
        """
        left = [name for name in self._shapes if name not in self._owner]
        if self._is_whole and left:
            raise ModelError(
                f"The engine has no experts for the compressed modules {', '.join(left)}.",
                why="It builds the model without them, or the model and the list of modules do not belong together.",
                remedy=EXPAND,
            )
        stored = find_tensors(self._checkpoint, module.spec.name, module.spec, module.shape)
        return read_cuts(self._checkpoint, stored, cuts)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self._folder())


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h_NJ: act(h_NJ.chunk(2, dim=-1)[0]) * h_NJ.chunk(2, dim=-1)[1]


def _swiglu_oai(h_NJ: Tensor) -> Tensor:
    gate_NI, up_NI = h_NJ[:, ::2].clamp(max=7.0), h_NJ[:, 1::2].clamp(-7.0, 7.0)
    return (up_NI + 1) * gate_NI * torch.sigmoid(1.702 * gate_NI)


# What fused experts kernels compute between the projections, by vLLM's names for it.
_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _gated(F.silu),
    "gelu": _gated(F.gelu),
    "gelu_tanh": _gated(lambda gate_NI: F.gelu(gate_NI, approximate="tanh")),
    "swigluoai": _swiglu_oai,
    "silu_no_mul": F.silu,
    "gelu_no_mul": F.gelu,
    "gelu_tanh_no_mul": lambda h_NI: F.gelu(h_NI, approximate="tanh"),
    "relu2_no_mul": lambda h_NI: F.relu(h_NI).square(),
}


def kernel_computes(module: Module, kernel: str) -> bool:
    """Whether a kernel for the activation `kernel` computes what the model does, the order of rows and clamps included."""
    with torch.device("cpu"), torch.no_grad():
        h_NJ = torch.linspace(-12.0, 12.0, 31 * module.spec.rows, dtype=torch.float32)
        h_NJ = h_NJ[torch.randperm(len(h_NJ), generator=torch.Generator().manual_seed(0))].view(31, -1)
        theirs = _KERNELS.get(kernel)
        if theirs is None or theirs(h_NJ).shape[1] != module.spec.intermediate:
            return False
        ours_NI = module.layout.activation(module.stock)(h_NJ)
        return torch.allclose(ours_NI, theirs(h_NJ), rtol=1e-4, atol=1e-4)


def empty_share(
    module: Module, share: Share, dtype: torch.dtype, device: torch.device
) -> tuple[LatentExperts, dict[str, Cut]]:
    """What a process holds of a module in grouped form, with empty parameters, and where its tensors lie."""
    spec, shape, cuts = cut_grouped_form(module.spec, module.shape, share)
    latent = LatentExperts(module.stock, module.layout, spec, shape).to(dtype).to_empty(device=device)
    return latent.eval().requires_grad_(False), cuts
