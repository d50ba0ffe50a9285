"""What a stock routed-experts module of transformers is made of: its flags, tensors and activation.

Relies on the contract of every class decorated with `use_experts_implementation`, not on class names: flags on the
instance (`has_gate`, `has_bias`, `is_transposed`, `is_concatenated`), fused tensors `gate_up_proj` (or `up_proj`) and
`down_proj`, the gate in `_apply_gate`, routing weights applied after the second projection. Shape suffixes: see
`molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from molae_compress.errors import ModelError
from molae_compress.tensors import DenseExperts, ExpertsSpec

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
REMEDY = "Report the model class to the project; until it is supported this model cannot be compressed."


def is_stock_experts(module: nn.Module) -> bool:
    """Whether `module` carries the flags of a decorated experts class (the decorator sets them on the instance)."""
    return all(flag in module.__dict__ for flag in FLAGS)


def expert_parameter_names(spec: ExpertsSpec) -> tuple[str, ...]:
    """The parameter names of the stock module: first projection, second projection, then their biases if it has any."""
    first = "gate_up_proj" if spec.has_gate else "up_proj"
    names = (first, "down_proj")
    return (*names, *(f"{name}_bias" for name in names)) if spec.has_bias else names


def bare_copy(module: nn.Module) -> nn.Module:
    """The same module without its own parameters, buffers and hooks: what remains is the configuration and the gate."""
    bare = type(module).__new__(type(module))
    nn.Module.__init__(bare)
    # Everything else in the instance dictionary is configuration: flags, limits, `config`.
    for key, value in vars(module).items():
        if key not in vars(bare) and key not in ("forward", "_old_forward", "_hf_hook"):
            bare.__dict__[key] = value
    bare._modules.update(module._modules)
    return bare.train(module.training)


def activation(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module's own map from the first projection `[N,J]` to `[N,I]`, free of its parameters, for any device."""
    bare = bare_copy(module)
    return cast(Callable[[Tensor], Tensor], bare._apply_gate if bare.__dict__["has_gate"] else bare.act_fn)


def describe(module: nn.Module, name: str, *, layer: int = 0, top_k: int = 1) -> ExpertsSpec:
    """Reads the `ExpertsSpec` of one stock experts module, on any device including meta.

    Args:
        module: the experts module.
        name: its path inside the model.
        layer: index of its decoder layer.
        top_k: experts per token.

    Raises:
        ModelError: the module is not a decorated experts class, or is one in a form that is not understood.
    """
    if not is_stock_experts(module):
        raise _refusal(module, name, "does not carry the flags of a transformers experts class")
    flags = module.__dict__
    if flags.get("has_post_expert_norm"):
        raise _refusal(module, name, "normalises the output of each expert, which no shared output basis can follow")
    if flags.get("_is_expert_parallel"):
        raise ModelError(
            f"The experts '{name}' are split over several devices (expert parallelism).",
            why="Each device holds only some of the experts.",
            remedy="Load the model without expert parallelism.",
        )
    has_gate, has_bias, is_transposed = (bool(flags[flag]) for flag in FLAGS[:3])
    first = "gate_up_proj" if has_gate else "up_proj"
    wanted = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if has_bias else set())
    found = dict(module.state_dict(keep_vars=True))
    if found.keys() != wanted:
        raise _refusal(module, name, f"holds the tensors {sorted(found)} where {sorted(wanted)} were expected")
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    if any(len(shapes[key]) != 3 for key in (first, "down_proj")):
        raise _refusal(module, name, f"holds tensors of shapes {shapes} where stacks of matrices were expected")
    E, J, H = _canonical_shape(shapes[first], is_transposed)
    I = J // 2 if has_gate else J
    if _canonical_shape(shapes["down_proj"], is_transposed) != (E, H, I) or (has_gate and J % 2):
        raise _refusal(module, name, f"holds tensors of shapes {shapes}, which do not fit together")
    if has_bias and (shapes[f"{first}_bias"] != (E, J) or shapes["down_proj_bias"] != (E, H)):
        raise _refusal(module, name, f"holds tensors of shapes {shapes}, which do not fit together")
    spec = ExpertsSpec(
        name=name,
        layer=layer,
        num_experts=E,
        hidden=H,
        intermediate=I,
        has_gate=has_gate,
        has_bias=has_bias,
        is_transposed=is_transposed,
        interleaved=has_gate and not flags["is_concatenated"],
        top_k=top_k,
    )
    _check_gate(module, spec)
    return spec


def dense_experts(module: nn.Module, spec: ExpertsSpec, weights: Mapping[str, Tensor] | None = None) -> DenseExperts:
    """Canonical view of the experts' weights, without a copy.

    Args:
        module: the stock experts module; it may be on meta when `weights` are given.
        spec: its description.
        weights: tensors by the module's own parameter names (`expert_parameter_names`); by default the module's.

    Raises:
        ModelError: a tensor is missing, has another shape than the module's, or is on the meta device.
    """
    held = dict(module.named_parameters(recurse=False))
    source: Mapping[str, Tensor] = held if weights is None else weights
    picked: dict[str, Tensor] = {}
    for key in expert_parameter_names(spec):
        if key not in source or source[key].is_meta:
            raise ModelError(
                f"The weights '{spec.name}.{key}' are not in memory.",
                remedy="Load the model without offloading, or compress the checkpoint from disk.",
            )
        if source[key].shape != held[key].shape:
            raise ModelError(
                f"The weights '{spec.name}.{key}' have shape {tuple(source[key].shape)} "
                f"where the model expects {tuple(held[key].shape)}.",
                why="The checkpoint and its config.json do not belong together.",
                remedy="Fetch the checkpoint again.",
            )
        picked[key] = source[key].detach()
    w_in, w_out, *biases = picked.values()
    if spec.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    return DenseExperts(spec, w_in, w_out, activation(module), *biases)


def store_dense_(module: nn.Module, dense: DenseExperts) -> nn.Module:
    """Puts canonical weights into a stock experts module as its parameters, in the layout of its class.

    The parameters of the module are replaced (whatever their device or width was); the tensors are shared with `dense`
    where the layouts agree.
    """
    w_in, w_out = dense.w_in_EJH, dense.w_out_EHI
    if dense.spec.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    tensors = (w_in, w_out, dense.bias_in_EJ, dense.bias_out_EH)
    for name, tensor in zip(expert_parameter_names(dense.spec), tensors, strict=False):
        assert tensor is not None
        module.register_parameter(name, nn.Parameter(tensor.detach().contiguous()))
    return module


def _canonical_shape(shape: tuple[int, ...], is_transposed: bool) -> tuple[int, int, int]:
    stack, rows, columns = shape
    return (stack, columns, rows) if is_transposed else (stack, rows, columns)


def _check_gate(module: nn.Module, spec: ExpertsSpec) -> None:
    """Asks the activation itself which rows feed which channel: a wrong flag would scramble gate and up silently."""
    # Small positive inputs stay clear of clamps; the contexts undo those that models are built in.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        h_J = torch.linspace(0.01, 0.09, spec.rows, dtype=torch.float32, requires_grad=True)
        out_I = activation(module)(h_J[None])[0]
        fits = out_I.shape == (spec.intermediate,)
        for channel in {0, spec.intermediate // 2, spec.intermediate - 1} if fits else ():
            (grad_J,) = torch.autograd.grad(out_I[channel], h_J, retain_graph=True)
            fits = fits and torch.equal(grad_J.nonzero()[:, 0], (spec.channel_of_row() == channel).nonzero()[:, 0])
    if not fits:
        order = "alternate" if spec.interleaved else "follow each other"
        raise _refusal(module, spec.name, f"has an activation that does not read gate and up rows as they {order}")


def _refusal(module: nn.Module, name: str, reason: str) -> ModelError:
    return ModelError(f"The experts module '{name}' of class {type(module).__name__} {reason}.", remedy=REMEDY)
