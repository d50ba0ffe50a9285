"""What MoBE and SLBF share: W_i ~ A_i f(F_i), the bases F_i mixed from a few matrices, fitted to the weights by Adam.

All matrices of one shape are fitted side by side: their losses are independent and so is every coordinate of Adam. The
second projection takes part transposed, its bases on the output side, which is the better side for it.
Setting: targets divided by their standard deviation per layer and projection; cosine schedule after a short warm-up; after
the last step the A_i are solved by least squares on the rounded bases, which stands in for the thousands of steps more that
the authors take. Shape suffixes: N layers x projections, P rows, D columns, R rank of A, M bases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molae_compress.errors import ModelError

from .common import Layer, Setting

Parameters = dict[str, Tensor]


class Shape(Protocol):
    """Sizes of the factors of one projection of a layer."""

    def numel(self, E: int, P: int, D: int) -> int:
        """Numbers stored for E experts of P x D."""


S = TypeVar("S", bound=Shape)
WARM_UP = 0.05
PROBE, PROBE_STEPS = 0.15, 90  # how long each candidate shape is tried: of the steps, and at most
RIDGE = 1e-6


def stacked(layers: Sequence[Layer], names: Sequence[str]) -> Tensor:
    """[N,E,P,D]: projections of all layers, the second one transposed."""
    each = [
        layer.down_EHI.transpose(1, 2) if name == "down" else getattr(layer, f"{name}_EIH")
        for layer in layers
        for name in names
    ]
    return torch.stack(each)


def unstacked(layers: Sequence[Layer], names: Sequence[str], w_NEPD: Tensor) -> None:
    """The way back."""
    for n, (layer, name) in enumerate((layer, name) for layer in layers for name in names):
        if name == "down":
            layer.down_EHI.copy_(w_NEPD[n].transpose(1, 2))
        else:
            getattr(layer, f"{name}_EIH").copy_(w_NEPD[n])


def group_bases(w_NEPD: Tensor, groups: int, rank: int) -> Tensor:
    """[N,G,R,D]: orthonormal leading right singular vectors of the stacked experts of groups by index."""
    E = w_NEPD.shape[1]
    bounds = [round(g * E / groups) for g in range(groups + 1)]
    found = []
    for start, stop in pairwise(bounds):
        gram_NDD = torch.einsum("nepd,nepc->ndc", *(2 * [w_NEPD[:, start:stop].double()]))
        found.append(torch.linalg.eigh(gram_NDD).eigenvectors.flip(-1)[..., :rank].mT.float())
    return torch.stack(found, 1)


def least_squares(w_NEPD: Tensor, f_NERD: Tensor) -> Tensor:
    """[N,E,P,R]: A nearest to A F = W, in float64."""
    f = f_NERD.double()
    gram_NERR = f @ f.mT
    level = gram_NERR.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-12)
    gram_NERR = gram_NERR + RIDGE * level * torch.eye(f.shape[-2], dtype=f.dtype)
    a_NERP: Tensor = torch.linalg.solve(gram_NERR, f @ w_NEPD.double().mT)
    return a_NERP.mT.float()


def descend(
    w_NEPD: Tensor,
    parameters: Parameters,
    mixed: Callable[[Parameters], Tensor],
    steps: int,
    rate: float,
    decay: float = 0.0,
) -> Parameters:
    """The parameters of the bases after `steps` of Adam(W) on |W - A F|^2, the A_i trained beside them."""
    held = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    with torch.no_grad():
        a_NEPR = least_squares(w_NEPD, mixed(held))
    a_NEPR.requires_grad_()
    optimiser = torch.optim.AdamW([a_NEPR, *held.values()], lr=rate, betas=(0.9, 0.99), weight_decay=decay)
    warm = max(1, round(WARM_UP * steps))
    for step in range(steps):
        scale = (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        optimiser.param_groups[0]["lr"] = rate * scale
        optimiser.zero_grad(set_to_none=True)
        loss = (w_NEPD - a_NEPR @ mixed(held)).square().sum()
        loss.backward()
        optimiser.step()
    return {name: tensor.detach() for name, tensor in held.items()}


def error(w_NEPD: Tensor, f_NERD: Tensor, setting: Setting) -> tuple[float, Tensor]:
    """Relative squared error, and the matrices [N,E,P,D] that rounded least-squares A_i make of finished bases."""
    found = setting.stored(least_squares(w_NEPD, f_NERD)) @ f_NERD
    return float((found - w_NEPD).square().sum() / w_NEPD.square().sum()), found


def best(shapes: Sequence[S], w_NEPD: Tensor, tried: Callable[[S, Tensor], float]) -> S:
    """The shape of least error after a short fit to some of the matrices."""
    if len(shapes) == 1:
        return shapes[0]
    some = w_NEPD[:: max(1, len(w_NEPD) // 3)]
    return min(shapes, key=lambda shape: tried(shape, some))


def compressed(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    names: Sequence[str],
    shapes: Sequence[S],
    fitted: Callable[[Tensor, S, Setting, int], tuple[float, Tensor]],
    setting: Setting,
) -> int:
    """Fits some projections of all layers in the best of the shapes and writes them back; returns the numbers stored."""
    if not shapes:
        raise ModelError("The budget holds no basis.")
    w_NEPD = stacked(layers, names)
    std_N111 = w_NEPD.std((1, 2, 3), keepdim=True)
    w_NEPD = w_NEPD / std_N111
    probe = min(PROBE_STEPS, round(PROBE * setting.steps))
    shape = best(shapes, w_NEPD, lambda shape, w: fitted(w, shape, setting, probe)[0])
    unstacked(layers, names, fitted(w_NEPD, shape, setting, setting.steps)[1] * std_N111)
    for layer in layers:
        layer.write(model)
    N, *sizes = w_NEPD.shape
    return N * shape.numel(*sizes)
