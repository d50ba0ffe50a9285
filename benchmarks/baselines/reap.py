"""REAP (Lasby et al., arXiv 2510.13999): whole experts are pruned, one shot.

The saliency of an expert is the mean of g |f(x)| over the tokens routed to it, with the model's own routing weights; those
of lowest saliency go, equally many in every layer, and their rows of the router with them, so that the model's own
top-k and its renormalisation run over those that stay. Stored are the experts that stay; a shorter router adds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molae_compress.errors import ModelError

from .common import Layer, Setting, budget, evenly, observed


def saliency(layer: Layer) -> Tensor:
    """[E]: mean routing weight times norm of the output; 0 for experts without a token."""
    sums_E = torch.zeros(layer.spec.num_experts)
    for expert in range(layer.spec.num_experts):
        for _, x_NH, gate_N in layer.tokens.routed(expert):
            sums_E[expert] += float(gate_N @ layer.output(expert, x_NH).norm(dim=1))
    return sums_E / layer.tokens.counts_E.clamp_min(1)


def router(model: nn.Module, layer: Layer) -> nn.Module:
    """The module beside the experts that holds one row per expert and nothing else that is per expert.

    Raises:
        ModelError: there is none, or it holds more.
    """
    parent, wanted = layer.spec.name.rpartition(".")[0], (layer.spec.num_experts, layer.spec.hidden)
    for module in model.get_submodule(parent).modules():
        held = [*module.named_parameters(), *module.named_buffers()]
        if [(name, tensor.shape) for name, tensor in held] == [("weight", wanted)]:
            return module
    raise ModelError(f"The router beside '{layer.spec.name}' is more than a matrix, so that its rows cannot be pruned.")


def reap(model: PreTrainedModel, windows_NL: Tensor, setting: Setting) -> int:
    """Experts that stay move to the front, where the shorter router finds them; the places behind are never read."""
    layers = observed(model, windows_NL)
    spec = layers[0].spec
    each = layers[0].numel // spec.num_experts
    counts = evenly(budget(layers, setting) // each, len(layers), spec.num_experts)
    for layer, count in zip(layers, counts, strict=True):
        if count < spec.top_k:
            raise ModelError(f"{count} experts stay of '{layer.spec.name}', and a token uses {spec.top_k}.")
        kept_E = saliency(layer).topk(count).indices.sort().values
        for name in ("gate_EIH", "up_EIH", "down_EHI"):
            stack = torch.zeros_like(getattr(layer, name))
            stack[:count] = getattr(layer, name)[kept_E]
            setattr(layer, name, stack)
        layer.write(model)
        module = router(model, layer)
        assert isinstance(module.weight, nn.Parameter)
        module.weight = nn.Parameter(module.weight.detach()[kept_E])
    return sum(counts) * each
