"""What a family of routed-experts classes stores, and how it is called: the layer between model classes and everything else.

The rest of the package knows one way to hold experts (`DenseExperts`: matrices in canonical orientation) and one way to call
them: inputs `x [T,H]`, the experts of each token `index [T,K]` and their routing weights `weight [T,K]`. A `Layout`
translates both ways between that and one family of classes. Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molae_compress.errors import ModelError
from molae_compress.tensors import DenseExperts, ExpertsSpec

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
REMEDY = "Write a layout for the class (see docs/adapters.md), or report it to the project."
_HOOKS = ("forward", "_old_forward", "_hf_hook")


class Weights(NamedTuple):
    """All weights of one experts module in canonical orientation."""

    w_in_EJH: Tensor
    w_out_EHI: Tensor
    bias_in_EJ: Tensor | None = None
    bias_out_EH: Tensor | None = None


class Call(NamedTuple):
    """One call of an experts module in the standard contract.

    Attributes:
        x_TH: inputs.
        index_TK: int64 expert of each slot, always a real one: a slot without an expert has expert 0 and weight 0.
        weight_TK: routing weight of each slot.
        leave: turns the routed sums [T,H] into what the caller expects back.
    """

    x_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    leave: Callable[[Tensor], Any]


@dataclass(frozen=True)
class Traits:
    """What a layout says about a module besides the shapes of its weights; see `ExpertsSpec`."""

    has_gate: bool = True
    is_transposed: bool = False
    interleaved: bool = False
    has_output_norm: bool = False


class Layout(ABC):
    """How a family of experts classes stores its weights and is called.

    A subclass is stateless: every method gets the module it speaks of. In `enter` and `after_expert` that may be the
    latent module which stands for the original; it has the original's plain attributes and all of its submodules and
    parameters that are not experts' weights, under their own names.

    Attributes:
        rule: one sentence for `inspect`: how modules of this layout are told from everything else.
        arguments: names of the first three arguments of `forward`, for calls by keyword.
        called_one_by_one: the model takes single experts out of the module and calls them itself.
        own_core: the class itself, at hidden width R, can be the core of the layer form.
    """

    rule: str
    arguments: tuple[str, ...] = ("hidden_states", "top_k_index", "top_k_weights")
    called_one_by_one: bool = False
    own_core: bool = False

    @abstractmethod
    def matches(self, name: str, module: nn.Module) -> bool:
        """Whether the module at path `name` is experts of this layout; on any device, without computing with its weights."""

    def belongs(self, name: str, module: nn.Module, parent: nn.Module) -> bool:
        """Whether what lies beside a matching module in `parent` bears out that it is routed experts."""
        return True

    @abstractmethod
    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        """Parameters of the module (paths inside it) that are experts' weights; what is not among them stays as it is."""

    @abstractmethod
    def canonical(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Weights:
        """The weights in canonical orientation, as views where possible; meta tensors too.

        Args:
            module: the experts module, of which only plain attributes may be used.
            tensors: one for each of `weight_names`, of the shape of the parameter.
        """

    @abstractmethod
    def stored(self, module: nn.Module, weights: Weights) -> dict[str, Tensor]:
        """The way back from `canonical`: tensors by the names of `weight_names`."""

    @abstractmethod
    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The model's own map from the first projection `[N,J]` to `[N,I]`; it must not hold on to weights."""

    def traits(self, module: nn.Module) -> Traits:
        """What the shapes of the weights do not tell."""
        return Traits()

    def top_k(self, module: nn.Module) -> int | None:
        """Experts per token, where neither the router beside the module nor the configuration tells."""
        return None

    def after_expert(self, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What the model does to every expert's output `[N,H]` before routing weights are applied."""
        return None

    def refusal(self, module: nn.Module) -> str | None:
        """Why this very module cannot be compressed though it is of this layout: the end of a sentence about it."""
        return None

    def enter(self, module: nn.Module, spec: ExpertsSpec, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """One call of the module, normalised. By default it is `forward(x, index, weight)` with routing weights per slot.

        Indices from E on are slots without an expert.
        """
        x, index, weight = self.bind(args, kwargs)
        index_TK, weight_TK = index.reshape(-1, index.shape[-1]), weight.reshape(-1, weight.shape[-1])
        index_TK, weight_TK = without_strangers(index_TK, weight_TK, spec.num_experts)
        return Call(x.reshape(-1, spec.hidden), index_TK, weight_TK, lambda y_TH: y_TH.reshape(x.shape))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The values of `arguments` in their order, however they were passed."""
        return (*args, *(kwargs[name] for name in self.arguments[len(args) :]))[: len(self.arguments)]

    def describe(self, module: nn.Module, name: str, *, layer: int = 0, top_k: int = 1) -> ExpertsSpec:
        """Reads the `ExpertsSpec` of a module, on any device including meta.

        Args:
            module: an experts module that this layout matches.
            name: its path inside the model.
            layer: index of its decoder layer.
            top_k: experts per token.

        Raises:
            ModelError: its weights do not fit together, or it is in a form that is not understood.
        """
        reason = self.refusal(module)
        if reason is not None:
            raise refused(module, name, reason)
        held = {key: module.get_parameter(key).to("meta") for key in self.weight_names(module)}
        shapes = {key: tuple(tensor.shape) for key, tensor in held.items()}
        shown = str(shapes if len(shapes) <= 4 else dict(list(shapes.items())[:4]))
        try:
            weights, traits = self.canonical(module, held), self.traits(module)
            E, J, H = weights.w_in_EJH.shape
            I = J // 2 if traits.has_gate else J
            whole = (2 * I if traits.has_gate else I) == J
        except (RuntimeError, ValueError, KeyError) as error:
            raise refused(module, name, f"holds tensors of shapes {shown}, which do not fit together ({error})") from error
        biases = [None if bias is None else tuple(bias.shape) for bias in weights[2:]]
        if not whole or weights.w_out_EHI.shape != (E, H, I) or biases not in ([None, None], [(E, J), (E, H)]):
            raise refused(module, name, f"holds tensors of shapes {shown}, which do not fit together")
        spec = ExpertsSpec(
            name=name,
            layer=layer,
            num_experts=E,
            hidden=H,
            intermediate=I,
            has_gate=traits.has_gate,
            has_bias=weights.bias_in_EJ is not None,
            is_transposed=traits.is_transposed,
            interleaved=traits.interleaved,
            has_output_norm=traits.has_output_norm,
            top_k=top_k,
        )
        _check_gate(self.activation(module), module, spec)
        return spec

    def dense(self, module: nn.Module, spec: ExpertsSpec, weights: Mapping[str, Tensor] | None = None) -> DenseExperts:
        """Canonical view of the experts' weights.

        Args:
            module: the experts module; it may be on meta when `weights` are given.
            spec: its description.
            weights: tensors by the module's own parameter names; by default the module's. Others are ignored.

        Raises:
            ModelError: a tensor is missing, has another shape than the module's, or is on the meta device.
        """
        picked: dict[str, Tensor] = {}
        for key in self.weight_names(module):
            held = module.get_parameter(key)
            tensor = held if weights is None else weights.get(key)
            if tensor is None or tensor.is_meta:
                raise ModelError(
                    f"The weights '{spec.name}.{key}' are not in memory.",
                    remedy="Load the model without offloading, or compress the checkpoint from disk.",
                )
            if tensor.shape != held.shape:
                raise ModelError(
                    f"The weights '{spec.name}.{key}' have shape {tuple(tensor.shape)} "
                    f"where the model expects {tuple(held.shape)}.",
                    why="The checkpoint and its config.json do not belong together.",
                    remedy="Fetch the checkpoint again.",
                )
            picked[key] = tensor.detach()
        canonical = self.canonical(module, picked)
        return DenseExperts(
            spec,
            canonical.w_in_EJH,
            canonical.w_out_EHI,
            self.activation(module),
            canonical.bias_in_EJ,
            canonical.bias_out_EH,
            self.after_expert(module),
        )

    def store_(self, module: nn.Module, dense: DenseExperts) -> nn.Module:
        """Puts canonical weights into an experts module as its parameters, in the layout of its class.

        The parameters are replaced, whatever their device or width was, or made where the module has none; the tensors are
        shared with `dense` where the layouts agree.
        """
        weights = Weights(dense.w_in_EJH, dense.w_out_EHI, dense.bias_in_EJ, dense.bias_out_EH)
        for name, tensor in self.stored(module, weights).items():
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent).register_parameter(leaf, nn.Parameter(tensor.detach().contiguous()))
        return module


def without_strangers(index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Slots whose index is no expert's get expert 0 and weight 0."""
    absent_TK = index_TK >= num_experts
    return index_TK.masked_fill(absent_TK, 0), weight_TK.masked_fill(absent_TK, 0)


def bare_copy(module: nn.Module, weights: Iterable[str] = ()) -> nn.Module:
    """The same module without experts' weights, hooks, and its own parameters and buffers: configuration and submodules.

    Args:
        module: left as it is.
        weights: parameters inside submodules that are left out too (paths); the submodules that hold none are shared.
    """
    bare = type(module).__new__(type(module))
    nn.Module.__init__(bare)
    # Everything else in the instance dictionary is configuration: flags, limits, `config`.
    for key, value in vars(module).items():
        if key not in vars(bare) and key not in _HOOKS:
            bare.__dict__[key] = value
    # What the class leaves out itself, such as the bias of a linear layer, is asked for in its forward.
    bare._parameters.update({name: None for name, parameter in module._parameters.items() if parameter is None})
    inside: dict[str, list[str]] = {}
    for name in weights:
        child, _, rest = name.partition(".")
        if rest:
            inside.setdefault(child, []).append(rest)
    for child, submodule in module._modules.items():
        bare._modules[child] = submodule if child not in inside or submodule is None else bare_copy(submodule, inside[child])
    bare.training = module.training
    return bare


def gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`act(gate) * up` of the first and second half of its input: the activation of classes that write it into `forward`."""

    def activate(h_NJ: Tensor) -> Tensor:
        gate_NI, up_NI = h_NJ.chunk(2, dim=-1)
        return act(gate_NI) * up_NI

    return activate


def refused(module: nn.Module, name: str, reason: str) -> ModelError:
    """The refusal of one experts module; `reason` ends a sentence about it."""
    return ModelError(f"The experts module '{name}' of class {type(module).__name__} {reason}.", remedy=REMEDY)


def _check_gate(activate: Callable[[Tensor], Tensor], module: nn.Module, spec: ExpertsSpec) -> None:
    """Asks the activation itself which rows feed which channel: a wrong flag would scramble gate and up silently."""
    # Small positive inputs stay clear of clamps; the contexts undo those that models are built in.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        h_J = torch.linspace(0.01, 0.09, spec.rows, dtype=torch.float32, requires_grad=True)
        out_I = activate(h_J[None])[0]
        fits = out_I.shape == (spec.intermediate,)
        for channel in {0, spec.intermediate // 2, spec.intermediate - 1} if fits else ():
            (grad_J,) = torch.autograd.grad(out_I[channel], h_J, retain_graph=True)
            fits = fits and torch.equal(grad_J.nonzero()[:, 0], (spec.channel_of_row() == channel).nonzero()[:, 0])
    if not fits:
        order = "alternate" if spec.interleaved else "follow each other"
        raise refused(module, spec.name, f"has an activation that does not read gate and up rows as they {order}")
