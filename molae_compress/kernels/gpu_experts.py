"""The kernels as an experts implementation of transformers: `experts_implementation="molae"`.

It serves stock fused experts classes and latent experts alike: on a CUDA device by GPU kernels, on a CPU by the operator
library (`cpu_experts`). Where neither can run (a gradient is wanted, a graph is compiled, an activation they do not know,
nothing was compiled) the answer is that of `grouped_mm`. triton is imported when a kernel is first wanted. Shape suffixes:
see `molae_compress.tensors`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Not part of its public interface either; the fallback has to be the very function that it registers.
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from molae_compress.kernels import cpu_experts
from molae_compress.kernels.activation import Activation, find_activation
from molae_compress.kernels.gpu_operands import Matrices
from molae_compress.kernels.gpu_problem import LatentExpertsProblem, LatentTensors
from molae_compress.kernels.gpu_tiles import MAX_GROUPS
from molae_compress.tensors import ExpertsSpec, LatentShape

NAME = "molae"
_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_KEPT = "_molae_activation"


def register_experts() -> None:
    """Makes transformers know the implementation; registering twice changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of a fused experts class: `[T,H]` from inputs `[T,H]`, experts `[T,K]` and routing weights `[T,K]`."""
    weights, number = list(experts.parameters()), experts.__dict__["num_experts"]
    # Asked last: in a compiled graph the answer would tie it to a number of tokens.
    on_cpu = cpu_experts.can_run(hidden_states, weights, top_k_weights) and cpu_experts.pays(
        hidden_states.dtype, top_k_index.numel(), number
    )
    if on_cpu or can_run(hidden_states, weights, number, top_k_weights):
        found = stock_experts(experts, hidden_states, top_k_index, top_k_weights)
        if found is not None:
            return found
    answer: Tensor = grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    return answer


def can_run(x_TH: Tensor, weights: Iterable[Tensor], experts: int, *more: Tensor) -> bool:
    """Whether the GPU kernels can take these tensors: on a CUDA device, of one type, contiguous, and without a gradient."""
    if not x_TH.is_cuda or cpu_experts.is_recorded() or importlib.util.find_spec("triton") is None:
        return False
    held = [x_TH, *weights]
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*held, *more))
    fits = all(tensor.device == x_TH.device and tensor.is_contiguous() for tensor in held[1:])
    same = x_TH.dtype in _TYPES and all(tensor.dtype == x_TH.dtype for tensor in held if tensor.is_floating_point())
    recent = torch.cuda.get_device_capability(x_TH.device) >= (8, 0)
    return fits and same and recent and not wants_gradient and experts < MAX_GROUPS


def stock_experts(experts: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor | None:
    """What a fused experts class of transformers computes, by the kernels; None if its activation is not one of theirs."""
    matrices = stock_matrices(experts)
    if matrices is None:
        return None
    bias_EH = experts.down_proj_bias if experts.has_bias else None
    if not x_TH.is_cuda:
        return cpu_experts.dense_experts(x_TH, index_TK, weight_TK, *matrices, bias_EH)
    from molae_compress.kernels.gpu_latent import dense_experts

    return dense_experts(x_TH.contiguous(), index_TK.contiguous(), weight_TK.contiguous(), *matrices, bias_EH)


def stock_matrices(experts: Any) -> tuple[Matrices, Matrices] | None:
    """The matrices of a fused experts class; None if the kernels do not know what it computes between them."""
    interleaved = experts.has_gate and not experts.is_concatenated
    activation = None
    if not getattr(experts, "has_post_expert_norm", False):
        activate = experts._apply_gate if experts.has_gate else experts.act_fn
        activation = known_activation(experts, activate, gated=experts.has_gate, interleaved=interleaved)
    if activation is None:
        return None
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    first = Matrices(
        getattr(experts, name),
        transposed=experts.is_transposed,
        gated=experts.has_gate,
        interleaved=interleaved,
        bias=getattr(experts, f"{name}_bias") if experts.has_bias else None,
        activation=activation,
    )
    return first, Matrices(experts.down_proj, transposed=experts.is_transposed)


def layer_bank(held: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor | None:
    """`[T,H]`: what experts in layer form add, without output biases; None where they are no matter for the CPU's library.

    Args:
        held: the module that holds `core`, a stock experts class, and the linear maps `encode` and `decode`.
        x_TH: inputs.
        index_TK: expert of each slot.
        weight_TK: routing weights.
    """
    encode_RH, decode_HR = held.encode.weight, held.decode.weight
    if not cpu_experts.can_run(x_TH, (encode_RH, decode_HR, *held.core.parameters()), weight_TK):
        return None
    matrices = stock_matrices(held.core)
    if matrices is None:
        return None
    return cpu_experts.dense_experts(x_TH, index_TK, weight_TK, *matrices, encode_RH=encode_RH, decode_HR=decode_HR)


def latent_bank(
    held: Any, spec: ExpertsSpec, shape: LatentShape, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> Tensor | None:
    """`[T,H]`: what one bank in grouped form adds, without output biases; None where no kernels run it.

    Args:
        held: the module that holds `core`, `decode` and the bases of `shape`.
        spec: the experts of the bank.
        shape: how they are stored.
        x_TH: inputs.
        index_TK: expert of each slot, E where it is none of this bank.
        weight_TK: routing weights.
    """
    weights = list(held.parameters())
    on_cpu = cpu_experts.can_run(x_TH, weights, weight_TK)
    if not on_cpu and not can_run(x_TH, weights, spec.num_experts, weight_TK):
        return None
    problem = bank_problem(held, spec, shape, x_TH, index_TK, weight_TK)
    if problem is None:
        return None
    if on_cpu:
        return cpu_experts.latent_experts(problem)
    from molae_compress.kernels.gpu_latent import latent_experts

    return latent_experts(problem)


def bank_problem(
    held: Any, spec: ExpertsSpec, shape: LatentShape, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> LatentExpertsProblem | None:
    """The call of the operator that a bank in grouped form makes; None if the kernels do not know its activation."""
    core = held.core
    activation = known_activation(core, core.activate, gated=spec.has_gate, interleaved=spec.interleaved)
    if activation is None:
        return None
    bases = [getattr(held, basis) for basis, _ in shape.branches()]
    cores = [getattr(core, name).detach() for _, name in shape.branches()]
    decode = held.decode if shape.rank_out is not None else None
    tensors = LatentTensors(
        encode=bases[0].weight,
        encode_pivots=bases[0].pivots,
        core=cores[0],
        up_encode=bases[1].weight if len(bases) == 2 else None,
        up_encode_pivots=bases[1].pivots if len(bases) == 2 else None,
        core_up=cores[1] if len(cores) == 2 else None,
        core_bias=core.bias,
        down=core.down,
        decode=None if decode is None else decode.weight,
        decode_pivots=None if decode is None else decode.pivots,
    )
    return LatentExpertsProblem(
        x_TH.contiguous(),
        index_TK.contiguous(),
        weight_TK.contiguous(),
        tensors,
        num_experts=spec.num_experts,
        input_group=shape.input_group,
        output_group=shape.output_group,
        rank_in=shape.rank_in,
        rank_out=shape.rank_out or 0,
        gated=spec.has_gate,
        interleaved=spec.interleaved,
        activation=activation,
    )


def known_activation(
    holder: nn.Module, activate: Callable[[Tensor], Tensor], *, gated: bool, interleaved: bool
) -> Activation | None:
    """`find_activation`, asked once for each module and kept there."""
    kept = holder.__dict__.get(_KEPT, False)
    if kept is False:
        kept = find_activation(activate, gated=gated, interleaved=interleaved)
        holder.__dict__[_KEPT] = kept
    found: Activation | None = kept
    return found
