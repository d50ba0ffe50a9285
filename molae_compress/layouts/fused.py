"""Experts stacked in 3-D parameters of one module, as transformers writes nearly all of them.

Shape suffixes: see `molae_compress.tensors`; Z identity experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from molae_compress.layouts.base import FLAGS, Call, Layout, Traits, Weights, bare_copy, gated
from molae_compress.tensors import ExpertsSpec


class Decorated(Layout):
    """Every class decorated with `use_experts_implementation`: its flags say all there is to know.

    Fused tensors `gate_up_proj` (or `up_proj`) and `down_proj`, the gate in `_apply_gate`, routing weights applied after
    the second projection.
    """

    rule = f"the flags that transformers sets on a fused experts class ({', '.join(FLAGS[:4])})"
    own_core = True

    def matches(self, name: str, module: nn.Module) -> bool:
        return all(flag in module.__dict__ for flag in FLAGS[:4])

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        first = "gate_up_proj" if module.has_gate else "up_proj"
        names = (first, "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if module.has_bias else names

    def refusal(self, module: nn.Module) -> str | None:
        if module.__dict__.get("_is_expert_parallel"):
            return "is split over several devices (expert parallelism), so that each holds only some of the experts"
        found, wanted = set(_own_tensors(module)), set(self.weight_names(module))
        if found != wanted:
            return f"holds the tensors {sorted(found)} where {sorted(wanted)} were expected"
        shapes = {name: tuple(tensor.shape) for name, tensor in _own_tensors(module).items()}
        if any(len(shape) != (2 if name.endswith("_bias") else 3) for name, shape in shapes.items()):
            return f"holds tensors of shapes {shapes} where stacks of matrices were expected"
        if module.__dict__.get("has_post_expert_norm") and (module.has_bias or not hasattr(module, "post_expert_norm")):
            return "normalises the output of each expert in a way that is not understood"
        return None

    def traits(self, module: nn.Module) -> Traits:
        flags = module.__dict__
        has_gate = bool(flags["has_gate"])
        return Traits(
            has_gate=has_gate,
            is_transposed=bool(flags["is_transposed"]),
            interleaved=has_gate and not flags["is_concatenated"],
            has_output_norm=bool(flags.get("has_post_expert_norm")),
        )

    def canonical(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Weights:
        w_in, w_out, *biases = (tensors[name] for name in self.weight_names(module))
        if module.is_transposed:
            w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
        return Weights(w_in, w_out, *biases)

    def stored(self, module: nn.Module, weights: Weights) -> dict[str, Tensor]:
        w_in, w_out, *biases = weights
        if module.is_transposed:
            w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
        tensors = (w_in, w_out, *(bias for bias in biases if bias is not None))
        return dict(zip(self.weight_names(module), tensors, strict=True))

    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        bare = bare_copy(module)
        return cast(Callable[[Tensor], Tensor], bare._apply_gate if bare.__dict__["has_gate"] else bare.act_fn)

    def after_expert(self, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
        return cast(Callable[[Tensor], Tensor] | None, getattr(module, "post_expert_norm", None))


class Undecorated(Layout):
    """Classes without the decorator that are laid out and called like those with it; the gate is their own."""

    rule = "the class Step3p7Experts: fused 3-D tensors without transformers' flags"
    classes: tuple[str, ...] = ("Step3p7Experts",)

    def matches(self, name: str, module: nn.Module) -> bool:
        return type(module).__name__ in self.classes

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return "gate_up_proj", "down_proj"

    def refusal(self, module: nn.Module) -> str | None:
        found, wanted = set(_own_tensors(module)), set(self.weight_names(module))
        return f"holds the tensors {sorted(found)} where {sorted(wanted)} were expected" if found != wanted else None

    def canonical(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Weights:
        return Weights(tensors["gate_up_proj"], tensors["down_proj"])

    def stored(self, module: nn.Module, weights: Weights) -> dict[str, Tensor]:
        return {"gate_up_proj": weights.w_in_EJH, "down_proj": weights.w_out_EHI}

    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return cast(Callable[[Tensor], Tensor], bare_copy(module)._apply_gate)


class WithIdentityExperts(Undecorated):
    """LongCat Flash: the last Z experts return their input, and have rows in the first projection that nothing reads."""

    rule = "the class LongcatFlashExperts: fused 3-D tensors, the last experts being identities"
    classes = ("LongcatFlashExperts",)

    def refusal(self, module: nn.Module) -> str | None:
        return "has identity experts only" if not module.num_routed_experts else super().refusal(module)

    def canonical(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Weights:
        return Weights(tensors["gate_up_proj"][: cast(int, module.num_routed_experts)], tensors["down_proj"])

    def stored(self, module: nn.Module, weights: Weights) -> dict[str, Tensor]:
        w_in_EJH = weights.w_in_EJH
        unread_ZJH = w_in_EJH.new_zeros(cast(int, module.zero_expert_num), *w_in_EJH.shape[1:])
        return {"gate_up_proj": torch.cat((w_in_EJH, unread_ZJH)), "down_proj": weights.w_out_EHI}

    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return gated(cast(Callable[[Tensor], Tensor], module.act_fn))

    def enter(self, module: nn.Module, spec: ExpertsSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        call = super().enter(module, spec, args, kwargs)
        _, index, weight = self.bind(args, kwargs)
        identity_TK = (index >= spec.num_experts).reshape(call.index_TK.shape)
        passed_T1 = (weight.reshape(identity_TK.shape) * identity_TK).sum(1, keepdim=True)
        same_TH = (call.x_TH * passed_T1).to(call.x_TH.dtype)
        return call._replace(leave=lambda y_TH: call.leave(y_TH + same_TH))


class ExpertMajor(Undecorated):
    """Llama 4: transposed, and called with the tokens of all experts one after the other, scaled before the experts.

    Rows of experts that a token does not use are zero, and stay so: there is no bias.
    """

    rule = "the class Llama4TextExperts: fused 3-D tensors stored transposed, called with rows sorted by expert"
    classes = ("Llama4TextExperts",)
    arguments = ("hidden_states",)

    def canonical(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Weights:
        return Weights(tensors["gate_up_proj"].transpose(1, 2), tensors["down_proj"].transpose(1, 2))

    def stored(self, module: nn.Module, weights: Weights) -> dict[str, Tensor]:
        return {"gate_up_proj": weights.w_in_EJH.transpose(1, 2), "down_proj": weights.w_out_EHI.transpose(1, 2)}

    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return gated(cast(Callable[[Tensor], Tensor], module.act_fn))

    def enter(self, module: nn.Module, spec: ExpertsSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        (x,) = self.bind(args, kwargs)
        x_ETH = x.reshape(spec.num_experts, -1, spec.hidden)
        # The rows that are not zero, found by their size: one call row for each of a token's experts, of weight 1.
        index_KT = x_ETH.abs().amax(-1).topk(spec.top_k, dim=0).indices
        index_KTH = index_KT[..., None].expand(-1, -1, spec.hidden)
        x_SH = x_ETH.gather(0, index_KTH).reshape(-1, spec.hidden)
        index_S1 = index_KT.reshape(-1, 1)

        def leave(y_SH: Tensor) -> Tensor:
            return torch.zeros_like(x_ETH).scatter(0, index_KTH, y_SH.view(index_KTH.shape)).reshape(x.shape)

        return Call(x_SH, index_S1, torch.ones_like(x_SH[:, :1]), leave)


class Stacked(Layout):
    """DBRX: every projection one matrix with the experts below each other, in a submodule."""

    rule = "the class DbrxExperts: matrices w1, v1, w2 with the experts below each other"

    def matches(self, name: str, module: nn.Module) -> bool:
        return type(module).__name__ == "DbrxExperts"

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return "mlp.w1", "mlp.v1", "mlp.w2"

    def canonical(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Weights:
        gate_EIH, up_EIH, down_EIH = (
            tensors[name].view(cast(int, module.num_experts), -1, tensors[name].shape[1])
            for name in self.weight_names(module)
        )
        return Weights(torch.cat((gate_EIH, up_EIH), dim=1), down_EIH.transpose(1, 2))

    def stored(self, module: nn.Module, weights: Weights) -> dict[str, Tensor]:
        gate_EIH, up_EIH = weights.w_in_EJH.chunk(2, dim=1)
        parts = (gate_EIH, up_EIH, weights.w_out_EHI.transpose(1, 2))
        return {name: part.flatten(0, 1) for name, part in zip(self.weight_names(module), parts, strict=True)}

    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return gated(cast(Callable[[Tensor], Tensor], module.get_submodule("mlp").activation_fn))

    def enter(self, module: nn.Module, spec: ExpertsSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        call = super().enter(module, spec, args, kwargs)
        batch = self.bind(args, kwargs)[0].shape[0]
        return call._replace(leave=lambda y_TH: y_TH.view(batch, -1, spec.hidden))


class WholeBlock(Layout):
    """JetMoe: one module is router, experts, and a bias after the routed sum; router and bias stay as they are."""

    rule = "the class JetMoeMoE: a block of input_linear and output_linear with its own router"
    arguments = ("layer_input",)

    def matches(self, name: str, module: nn.Module) -> bool:
        return type(module).__name__ == "JetMoeMoE"

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return "input_linear.weight", "output_linear.weight"

    def canonical(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Weights:
        return Weights(*(tensors[name] for name in self.weight_names(module)))

    def stored(self, module: nn.Module, weights: Weights) -> dict[str, Tensor]:
        return dict(zip(self.weight_names(module), weights[:2], strict=True))

    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return gated(cast(Callable[[Tensor], Tensor], module.activation))

    def top_k(self, module: nn.Module) -> int | None:
        return cast(int, module.get_submodule("router").top_k)

    def enter(self, module: nn.Module, spec: ExpertsSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        (x_BLH,) = self.bind(args, kwargs)
        x_TH = x_BLH.reshape(-1, spec.hidden)
        # What the router returns is sorted by expert, with gates in that order; undone by the slot each row came from.
        slot_S, _, gate_S, sizes_E, _ = module.get_submodule("router")(x_TH)
        expert_S = torch.arange(spec.num_experts, device=x_TH.device).repeat_interleave(
            torch.tensor(sizes_E, device=x_TH.device), output_size=slot_S.shape[0]
        )
        index_TK = torch.empty_like(expert_S).scatter(0, slot_S, expert_S).view(x_TH.shape[0], -1)
        weight_TK = torch.empty_like(gate_S).scatter(0, slot_S, gate_S).view(index_TK.shape)
        bias_H = module.get_parameter("bias")
        return Call(x_TH, index_TK, weight_TK, lambda y_TH: y_TH.view(x_BLH.shape) + bias_H)


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the module itself, by name."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if "." not in name}
