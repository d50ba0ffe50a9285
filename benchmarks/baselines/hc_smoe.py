"""HC-SMoE (Chen et al., arXiv 2410.08589): experts of similar output are merged, without retraining.

The feature of an expert is its mean output over calibration tokens of the layer, all of them, whether routed to it or not;
hierarchical clustering with average linkage and Euclidean distance joins experts until as many clusters are left as the
budget holds; a cluster becomes the mean of its members weighted by how often they are used. Routers stay as they are.
Stored are one expert a cluster and the cluster of each expert. Setting: features from 8192 evenly spaced tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molae_compress.errors import ModelError

from .common import Layer, Setting, budget, evenly, observed

TOKENS = 8192


def features(layer: Layer) -> Tensor:
    """[E,H]: mean outputs."""
    x_TH = layer.tokens.x_TH
    x_NH = x_TH[torch.arange(size := min(TOKENS, len(x_TH))) * len(x_TH) // size]
    return torch.stack([layer.output(expert, x_NH).mean(0) for expert in range(layer.spec.num_experts)])


def clusters(features_EH: Tensor, count: int) -> list[list[int]]:
    """Average linkage: joins the two clusters of smallest mean distance between members until `count` are left."""
    distance_EE = torch.cdist(features_EH.double(), features_EH.double(), compute_mode="donot_use_mm_for_euclid_dist")
    found = [[expert] for expert in range(len(features_EH))]
    while len(found) > count:
        pairs = [(i, j) for i in range(len(found)) for j in range(i)]
        i, j = min(pairs, key=lambda pair: float(distance_EE[found[pair[0]]][:, found[pair[1]]].mean()))
        found[j] += found.pop(i)
    return found


def hc_smoe(model: PreTrainedModel, windows_NL: Tensor, setting: Setting) -> int:
    """Every expert is overwritten by its cluster's."""
    layers = observed(model, windows_NL)
    E = layers[0].spec.num_experts
    each = layers[0].numel // E
    indices = E * len(layers)
    counts = evenly((budget(layers, setting) - indices) // each, len(layers), E)
    if min(counts) < 1:
        raise ModelError("The budget holds less than one expert a layer.")
    for layer, count in zip(layers, counts, strict=True):
        used_E = layer.tokens.counts_E.float()
        for members in clusters(features(layer), count):
            share_M = used_E[members] if used_E[members].any() else torch.ones(len(members))
            share_M11 = (share_M / share_M.sum())[:, None, None]
            for stack in (layer.gate_EIH, layer.up_EIH, layer.down_EHI):
                stack[members] = setting.stored((stack[members] * share_M11).sum(0)) if len(members) > 1 else stack[members]
        layer.write(model)
    return sum(counts) * each + indices
