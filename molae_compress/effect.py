"""What a change of one experts module does to the residual stream, measured on held-out calibration tokens.

Between experts and residual stream lies whatever the architecture puts there: norms, factors, projections out of a narrower
space. None of it has to be known, because the tokens go through the layer once more with the one module changed.
Shape suffixes: N rows of one sample; the rest as in `tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from molae_compress.solver.layer import LayerError, layer_error
from molae_compress.solver.packing import Packed
from molae_compress.solver.population import ROWS, Calibrated
from molae_compress.source import Source
from molae_compress.stream import HeldOut, stand_in
from molae_compress.tensors import AnyShape, DenseExperts, ExpertsSpec

# Of the change, relative to an expert's output: small, but not lost where sixteen bits round the residual stream.
_CHANGE, _CHANGE_IN_16_BIT = 0.01, 0.3
_SHUFFLES = 4  # of an output's coordinates in one change, so that a few large ones do not decide it


@dataclass(frozen=True)
class Effect:
    """One experts module in its layer, on held-out tokens.

    Attributes:
        source: the dense model.
        held_out: the tokens, before the layer.
        spec: the module.
        layer: all dense experts of its layer, by path.
        samples: what the module saw of these tokens.
    """

    source: Source
    held_out: HeldOut
    spec: ExpertsSpec
    layer: Mapping[str, DenseExperts]
    samples: Calibrated

    def error(self, tensors: Mapping[str, Tensor], shape: AnyShape) -> LayerError:
        """Errors with the module in its latent form: `relative` of its own output, `err_h` of its layer's."""
        dense = self.layer[self.spec.name]
        latent = LatentRun.of(dense, tensors, shape)
        with self.source.layer(self.source.layers.of(self.spec.name)) as module:
            own = layer_error(dense, dict(tensors), shape, self.samples)
            err_h = self._changed(module, stand_in(self.source, self.spec, latent))
        return replace(own, err_h=err_h, tokens=self.held_out.tokens)

    def gain(self) -> float:
        """Squared error in the residual stream for a squared error in the outputs of single experts.

        A change in proportion to each output is added there, before norms and routing weights; what the layer makes of it is
        compared with what the solver's weights of slots make of it. That is 1, up to chance, where the layer adds up its
        experts and nothing else.
        """
        dense = self.layer[self.spec.name]
        size = _CHANGE if self.source.model.dtype.itemsize > 2 else _CHANGE_IN_16_BIT
        disturbed = _Disturbed(**vars(dense), size=size)
        with self.source.layer(self.source.layers.of(self.spec.name)) as module:
            found = self._changed(module, stand_in(self.source, self.spec, disturbed))
        expected = size**2 * _weighed_outputs(dense, self.samples)
        return found / expected if expected else 1.0

    def _changed(self, module: nn.Module, changed: nn.Module) -> float:
        """Mean over tokens of |dh|^2 / |h|^2 with `changed` in place of the experts."""
        plain = {spec.name: stand_in(self.source, spec, self.layer[spec.name]) for spec in self._specs()}
        change_T, energy_T = self.held_out.changes(module, plain, plain | {self.spec.name: changed})
        return float((change_T / energy_T.clamp_min(1e-6 * float(energy_T.mean()))).mean())

    def _specs(self) -> list[ExpertsSpec]:
        return [spec for spec in self.source.specs if spec.name in self.layer]


@dataclass
class LatentRun(DenseExperts):
    """Experts that compute as their latent form does: one at a time, so that it is never in memory in float32."""

    banks: Mapping[int, Packed] = field(default_factory=dict)

    @classmethod
    def of(cls, dense: DenseExperts, tensors: Mapping[str, Tensor], shape: AnyShape) -> LatentRun:
        """In place of `dense`, which gives activation, norms and biases."""
        own = {name: tensor.to(dense.w_in_EJH.device) for name, tensor in tensors.items()}
        return cls(**vars(dense), banks=Packed.all_of(dense.spec, shape, own))

    def intermediate(self, expert: int, x_NH: Tensor) -> Tensor:
        """See `DenseExperts`."""
        bias_J = None if self.bias_in_EJ is None else self.bias_in_EJ[expert]
        return self.activate(self.banks[expert].intermediate(expert, x_NH, bias_J))

    def output(self, expert: int, z_NI: Tensor) -> Tensor:
        """See `DenseExperts`."""
        y_NH = self.banks[expert].output(expert, z_NI)
        return y_NH if self.bias_out_EH is None else y_NH + self.bias_out_EH[expert].to(y_NH.dtype)


@dataclass
class _Disturbed(DenseExperts):
    """Experts to whose outputs a change of `size` times their own length is added, in another direction for each expert.

    The direction is a sum of the output's own coordinates, put into another order with other signs: it follows from the
    output alone, so that it does not matter how tokens are put into batches.
    """

    size: float = 0.0

    def output(self, expert: int, z_NI: Tensor) -> Tensor:
        """See `DenseExperts`."""
        y_NH = super().output(expert, z_NI)
        wide_NH, generator = y_NH.float(), torch.Generator().manual_seed(expert)
        change_NH = torch.zeros_like(wide_NH)
        for _ in range(_SHUFFLES):
            order_H = torch.randperm(y_NH.shape[1], generator=generator).to(y_NH.device)
            sign_H = 2.0 * torch.randint(0, 2, order_H.shape, generator=generator).to(wide_NH) - 1.0
            change_NH += sign_H * wide_NH[:, order_H]
        lengths_N1 = [part_NH.norm(dim=1, keepdim=True) for part_NH in (wide_NH, change_NH)]
        change_NH *= self.size * lengths_N1[0] / lengths_N1[1].clamp_min(torch.finfo(torch.float32).tiny)
        return (wide_NH + change_NH).to(y_NH.dtype)


def _weighed_outputs(dense: DenseExperts, samples: Calibrated) -> float:
    """Sum over slots of |y|^2 in the solver's weights, y the output of one expert before norms and routing weights."""
    total = 0.0
    for expert in range(dense.spec.num_experts):
        for tokens_N, weight_N in zip(*(array.split(ROWS) for array in samples.rows(expert)), strict=True):
            x_NH = samples.inputs(tokens_N)
            y_NH = dense.output(expert, dense.intermediate(expert, x_NH))
            total += float(y_NH.double().square().sum(1) @ weight_N)
    return total
