"""How vLLM computes routed experts: those in layer form, those in grouped form, and those that stayed dense.

Layer form is vLLM's own fused experts kernel at width R between two projections. Grouped form is the module of this package
(`LatentExperts`) with vLLM's routing. Shape suffixes: see `molae_compress.tensors`; W is R rounded up to `KERNEL_WIDTH`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from molae_compress.errors import CheckpointError, ModelError
from molae_compress.kernels import cpu_experts
from molae_compress.serving.artifact import EXPAND, Module, ServedArtifact, empty_share, kernel_computes
from molae_compress.serving.share import Share, cut_layer_form
from molae_compress.tensors import ExpertsSpec, LatentShape

KERNEL_WIDTH = 64  # fused kernels take hidden sizes that are multiples of it; what is added to R is zeros


def share_of(layer: Any, spec: ExpertsSpec) -> Share:
    """What of a module this process holds, as vLLM has divided it; raises `ModelError` where it cannot be served so."""
    moe = layer.moe_config
    sizes = {
        "experts": (moe.num_logical_experts, spec.num_experts),
        "hidden size": (moe.hidden_dim, spec.hidden),
        "width of an expert": (moe.intermediate_size, spec.intermediate),
    }
    for what, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise _refused(layer, f"{what} is {theirs} in vLLM and {ours} in the artifact")
    if moe.num_experts != moe.num_logical_experts or layer.expert_map_manager.num_fused_shared_experts:
        raise _refused(layer, "vLLM keeps redundant or shared experts among the routed ones")
    if spec.has_output_norm:
        raise _refused(layer, "the model normalises the output of each expert")
    if moe.is_lora_enabled:
        raise _refused(layer, "LoRA adapters are enabled, which know dense experts only")
    per_rank = spec.intermediate // moe.tp_size
    channels = range(moe.tp_rank * per_rank, (moe.tp_rank + 1) * per_rank)
    return Share(tuple(layer.expert_map_manager.get_local_expert_ids()), channels, adds_bias=moe.tp_rank == 0)


def _refused(layer: Any, why: str) -> ModelError:
    return ModelError(f"The compressed experts '{layer.layer_name}' cannot be served by vLLM.", why=f"{why}.", remedy=EXPAND)


class DenseMethod(UnquantizedFusedMoEMethod):
    """Experts that stayed dense: vLLM's own method, and an error where the stream of weights did not hold them all.

    For a model with a quantization method vLLM does not check that itself.
    """

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        for parameter in _weights(layer).values():
            parameter.data.fill_(float("nan"))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Refuses numbers that were never written; those that pad a kernel's width are zero."""
        moe = layer.moe_config
        padding = moe.intermediate_size_per_partition != moe.intermediate_size_per_partition_unpadded
        for name, parameter in _weights(layer).items():
            unwritten = torch.isnan(parameter)
            if not padding and bool(unwritten.any()):
                raise CheckpointError(
                    f"The experts '{layer.layer_name}' are dense, but the checkpoint does not hold all of them ('{name}').",
                    why="Numbers of it were not written, or are NaN.",
                    remedy="Fetch the artifact again; `molae-compress verify` tells whether it is whole.",
                )
            parameter.data.masked_fill_(unwritten, 0.0)
        super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared: Any) -> Any:
        """[T,H] from inputs [T,H] and vLLM's routing [T,K]."""
        return super().apply(layer, x, *_kernel_slots(layer, topk_weights, topk_ids), **shared)


class LayerFormMethod(UnquantizedFusedMoEMethod):
    """Experts in layer form."""

    def __init__(self, layer: Any, artifact: ServedArtifact, module: Module) -> None:
        spec, moe = module.spec, layer.moe_config
        self._artifact, self._module, self._share = artifact, module, share_of(layer, spec)
        assert isinstance(module.shape, LatentShape)
        self._rank = module.shape.rank_in
        self._cuts = cut_layer_form(spec, module.shape, self._share)
        self._width = -(-self._rank // KERNEL_WIDTH) * KERNEL_WIDTH
        if not kernel_computes(module, moe.activation.value):
            raise _refused(
                layer, f"its kernel for the activation '{moe.activation.value}' computes something else than the model"
            )
        # The kernel sees the latent width. The layer keeps the full one, to which vLLM pads or cuts what goes into it.
        latent = dataclasses.replace(moe, hidden_dim=self._width, hidden_dim_unpadded=self._width)
        try:
            super().__init__(latent)
        except NotImplementedError as error:
            raise _refused(layer, f"it has no kernel for them: {error}") from error
        if self.is_monolithic and spec.has_bias:
            raise _refused(layer, "its kernel routes by itself, which output biases need to know of")
        self.supports_pre_processed_weights = False

    @property
    def supports_eplb(self) -> bool:
        """Experts stay where they are."""
        return False

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate: int, act_dtype: torch.dtype, parallel: Any
    ) -> tuple[int, int]:
        """The kernel's width is this method's own; its padding of channels is kept."""
        width, padded = super().maybe_roundup_sizes(self._width, intermediate, act_dtype, parallel)
        if width != self._width:
            raise ModelError(
                f"vLLM wants the latent width {self._width} rounded up to {width}.",
                why="The communication between experts that was chosen takes no other.",
                remedy="Serve without `--enable-expert-parallel`, or expand the model.",
            )
        self.moe.intermediate_size_per_partition = padded
        return hidden_size, padded

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        super().create_weights(layer, num_experts, self._width, intermediate_size_per_partition, params_dtype, **more)
        sizes = {"encode": (self._width, hidden_size), "decode": (hidden_size, self._width)}
        if self._module.spec.has_bias:
            sizes["decode_bias"] = (num_experts, hidden_size)
        for name, size in sizes.items():
            layer.register_parameter(name, nn.Parameter(torch.empty(size, dtype=params_dtype), requires_grad=False))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Reads the tensors of this process, and puts zeros around them where the kernel is wider."""
        spec, R = self._module.spec, self._rank
        found = self._artifact.read(self._module, self._cuts)
        first = "core.gate_up_proj" if spec.has_gate else "core.up_proj"
        core_in, core_out = found[first], found["core.down_proj"]
        if spec.is_transposed:
            core_in, core_out = core_in.transpose(1, 2), core_out.transpose(1, 2)
        rows = self._kernel_rows(layer.w13_weight.shape[1], core_in.shape[1])
        for parameter in (*_weights(layer).values(), layer.encode, layer.decode):
            parameter.data.zero_()
        layer.w13_weight.data[:, rows, :R] = core_in.to(layer.w13_weight)
        layer.w2_weight.data[:, :R, : core_out.shape[2]] = core_out.to(layer.w2_weight)
        layer.encode.data[:R] = found["encode.weight"]
        layer.decode.data[:, :R] = found["decode.weight"]
        if spec.has_bias:
            layer.w13_bias.data[:, rows] = found[f"{first}_bias"].to(layer.w13_bias)
            layer.decode_bias.data.copy_(found["decode_bias"] * self._share.adds_bias)
        super().process_weights_after_loading(layer)

    def _kernel_rows(self, padded: int, rows: int) -> Tensor:
        """Where in the kernel's rows those of the share go: gate and up halves are padded each for itself."""
        rows_J = torch.arange(rows)
        if not self._module.spec.has_gate or self._module.spec.interleaved:
            return rows_J
        return rows_J + (rows_J >= rows // 2) * (padded - rows) // 2

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared: Any) -> Tensor:
        """[T,H] from inputs [T,H] and vLLM's routing [T,K]."""
        z_TW = _linear(x, layer.encode)
        y_TW = super().apply(layer, z_TW, *_kernel_slots(layer, topk_weights, topk_ids), **shared)
        y_TH = _linear(y_TW, layer.decode)
        if self._module.spec.has_bias:
            own_weights, own_ids = _own_slots(layer, topk_weights, topk_ids)
            routing_TE = own_weights.new_zeros(x.shape[0], layer.decode_bias.shape[0]).scatter_add(1, own_ids, own_weights)
            y_TH = y_TH + routing_TE.to(y_TH.dtype) @ layer.decode_bias
        return y_TH

    def apply_monolithic(self, layer: Any, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """The same where the kernel routes by itself."""
        y_TW = super().apply_monolithic(layer, _linear(x, layer.encode), router_logits, input_ids)
        return _linear(y_TW, layer.decode)


def _linear(x_TN: Tensor, weight_MN: Tensor) -> Tensor:
    """[T,M]: a projection of the layer form."""
    if not current_platform.is_cpu():
        return F.linear(x_TN, weight_MN)
    y_TM: Tensor = torch.ops.molae_compress.served_projection(x_TN, weight_MN)
    return y_TM


def _weights(layer: nn.Module) -> dict[str, nn.Parameter]:
    """What vLLM's kernel reads; a layer may hold parameters of its router too."""
    return {name: parameter for name, parameter in layer.named_parameters() if name.startswith(("w13_", "w2_"))}


def _own_slots(layer: Any, weight_TK: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Routing over the experts of this process by their places in it; other slots get the first one, with weight zero."""
    index_TK = index_TK.long()
    if layer._expert_map is None:
        return weight_TK, index_TK
    place_TK = layer._expert_map[index_TK].long()
    return weight_TK.masked_fill(place_TK < 0, 0.0), place_TK.clamp(min=0)


def _kernel_slots(layer: Any, weight_TK: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Routing as vLLM's kernel takes it: the one for CPUs has no notion of experts of other processes."""
    if not current_platform.is_cpu():
        return weight_TK, index_TK
    own_TK, place_TK = _own_slots(layer, weight_TK, index_TK)
    return own_TK, place_TK.to(index_TK.dtype)


class GroupedFormMethod(FusedMoEMethodBase):
    """Experts in grouped form."""

    def __init__(self, layer: Any, artifact: ServedArtifact, module: Module) -> None:
        super().__init__(layer.moe_config)
        self._artifact, self._module, self._share = artifact, module, share_of(layer, module.spec)

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate: int, act_dtype: torch.dtype, parallel: Any
    ) -> tuple[int, int]:
        """The sizes of the model, whatever kernels of vLLM would like."""
        return hidden_size, intermediate

    def create_weights(self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **more: Any) -> None:
        """The latent module, empty, so that vLLM counts its memory."""
        device = torch.get_default_device()
        layer.latent, self._cuts = empty_share(self._module, self._share, params_dtype, device)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Reads the tensors of this process."""
        tensors = self._artifact.read(self._module, self._cuts)
        if not self._share.adds_bias:
            tensors |= {name: torch.zeros_like(tensor) for name, tensor in tensors.items() if name.endswith("decode_bias")}
        layer.latent.load_latent_(tensors)
        layer.latent.requires_grad_(False)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """No kernel of vLLM is made."""
        return None

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared: Any) -> Tensor:
        """[T,H] from inputs [T,H] and vLLM's routing [T,K]."""
        if layer.apply_router_weight_on_input:  # with one expert a token
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        answer: Tensor = torch.ops.molae_compress.served_experts(x, topk_weights, topk_ids, layer.layer_name)
        return answer


# Operators, into which a compiler does not look: the addresses of tensors are for calls only.
@torch.library.custom_op("molae_compress::served_projection", mutates_args=())
def served_projection(x_TN: Tensor, weight_MN: Tensor) -> Tensor:
    """[T,M]: `x weight^T` on a CPU, by the operator library where it is the faster one."""
    if cpu_experts.pays(x_TN.dtype, x_TN.shape[0], 1) and cpu_experts.can_run(x_TN, [weight_MN]):
        return cpu_experts.product(x_TN, weight_MN, transposed=False)
    return F.linear(x_TN, weight_MN)


@served_projection.register_fake
def _(x_TN: Tensor, weight_MN: Tensor) -> Tensor:
    return x_TN.new_empty(x_TN.shape[0], weight_MN.shape[0])


# And here how many rows an expert has depends on the data.
@torch.library.custom_op("molae_compress::served_experts", mutates_args=())
def served_experts(x_TH: Tensor, weight_TK: Tensor, index_TK: Tensor, layer: str) -> Tensor:
    """[T,H]: what the latent experts of the layer of that name add."""
    latent = get_forward_context().no_compile_layers[layer].routed_experts.latent
    y_TH: Tensor = latent.routed(x_TH, index_TK.long(), weight_TK)
    return y_TH.to(x_TH.dtype)


@served_experts.register_fake
def _(x_TH: Tensor, weight_TK: Tensor, index_TK: Tensor, layer: str) -> Tensor:
    return torch.empty_like(x_TH)
