"""D2-MoE (Gu et al., arXiv 2502.17298): one base matrix a layer and projection, and low-rank deltas of the experts.

The base is the mean of the experts weighted by Fisher information (mean squared gradient of the language-model loss)
times how often they are used; the deltas W_i - base are truncated by SVD in the metric of the expert's own inputs, all to
the same rank. Setting: Fisher information from 64 windows; as for SVD-LLM otherwise. The base is not pruned: the
paper does so with 1/8 to 1/64 of the parameters, here it would free a few hundredths.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molae_compress.errors import ModelError

from .common import Setting, budget, observed, opened, sums
from .svd_llm import Matrix, choose, levels, plain

WINDOWS, BATCH = 64, 8
STACKS = ("gate_EIH", "up_EIH", "down_EHI")


def fisher(model: PreTrainedModel, windows_NL: Tensor) -> list[Tensor]:
    """Per layer [3,E]: mean squared gradients of each expert's projections."""
    sums_L3E: list[Tensor] = []
    for ids_BL in windows_NL[:WINDOWS].split(BATCH):
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()
        layers = opened(model, gradients=True)
        found = [torch.stack([getattr(layer, name).square().mean((1, 2)) for name in STACKS]) for layer in layers]
        sums_L3E = [a + b for a, b in zip(sums_L3E, found, strict=True)] if sums_L3E else found
    model.zero_grad(set_to_none=True)
    return sums_L3E


@torch.no_grad()
def d2_moe(model: PreTrainedModel, windows_NL: Tensor, setting: Setting) -> int:
    """Base plus deltas, written back as dense experts."""
    importance = fisher(model, windows_NL)
    layers = observed(model, windows_NL)
    bases = sum(layer.numel // layer.spec.num_experts for layer in layers)
    allowed = budget(layers, setting) - bases
    if allowed <= 0:
        raise ModelError("The budget holds no deltas.")
    share, stored = allowed / sum(layer.numel for layer in layers), bases
    X, Y = layers[0].gate_EIH.shape[1:]
    steps = levels(X, Y, lambda rank: rank * (X + Y))
    picked = iter(choose([share] * (3 * len(layers) * layers[0].spec.num_experts), steps, allowed))
    for layer, fisher_3E in zip(layers, importance, strict=True):
        weight_3E = fisher_3E * layer.tokens.counts_E + 1e-30
        base_3 = [_mean(getattr(layer, name), weight_E, setting) for name, weight_E in zip(STACKS, weight_3E, strict=True)]
        for expert in range(layer.spec.num_experts):
            c_HH, c_II = sums(layer, expert)  # of the original expert, none of whose projections has changed yet
            for name, base_XY, c_YY in zip(STACKS, base_3, (c_HH, c_HH, c_II), strict=True):
                delta_XY = getattr(layer, name)[expert] - base_XY
                k = next(picked)
                stored += steps[k]
                kept_XY = plain(Matrix.whitened(delta_XY, c_YY), k, setting) if k < len(steps) - 1 else delta_XY
                getattr(layer, name)[expert] = base_XY + kept_XY
        layer.write(model)
    return stored


def _mean(stack_EXY: Tensor, weight_E: Tensor, setting: Setting) -> Tensor:
    return setting.stored((stack_EXY * (weight_E / weight_E.sum())[:, None, None]).sum(0))
