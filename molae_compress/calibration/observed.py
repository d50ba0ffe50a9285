"""What an experts module sees of calibration tokens: a stand-in that computes what it would, and keeps what it is given.

Shape suffixes: N rows of one expert; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molae_compress.errors import ModelError
from molae_compress.layouts import Call
from molae_compress.tensors import DenseExperts, ExpertsSpec

Enter = Callable[[tuple[Any, ...], Mapping[str, Any]], Call]  # the arguments of one call, normalised
Allocate = Callable[[tuple[int, int]], Tensor]  # zeros, float32


@dataclass
class RoutedTokens:
    """What one experts module saw of the calibration tokens.

    Attributes:
        x_TH: inputs, float32.
        index_TK: int64 expert of each slot.
        gate_TK: float32 routing weights as the model computed them.
        energy_T: float32 |h|^2 of the residual stream after the layer.
    """

    x_TH: Tensor
    index_TK: Tensor
    gate_TK: Tensor
    energy_T: Tensor


class ObservedExperts(nn.Module):
    """Stands in for an experts module while calibration tokens pass: computes what it would, and keeps what it saw.

    The dense weights stay in the precision of the checkpoint; one expert at a time is widened.

    Args:
        dense: what it computes.
        enter: how it is called.
        record: told inputs, experts (E where a slot has none) and routing weights of every call.
    """

    def __init__(self, dense: DenseExperts, enter: Enter, record: Callable[[Tensor, Tensor, Tensor], None] | None) -> None:
        super().__init__()
        self.dense, self._enter, self._record = dense, enter, record

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call, dense = self._enter(args, kwargs), self.dense
        x_TH, weight_TK = call.x_TH, call.weight_TK
        index_TK = call.index_TK.masked_fill(weight_TK == 0, dense.spec.num_experts)  # slots without an expert
        if self._record is not None:
            self._record(x_TH, index_TK, weight_TK)
        y_TH = torch.zeros_like(x_TH)
        for expert in index_TK.unique().tolist():
            if expert >= dense.spec.num_experts:
                continue
            tokens_N, slots_N = (index_TK == expert).nonzero(as_tuple=True)
            out_NH = dense.output(expert, dense.intermediate(expert, x_TH[tokens_N]))
            out_NH = out_NH if dense.after is None else dense.after(out_NH)
            y_TH.index_add_(0, tokens_N, (out_NH * weight_TK[tokens_N, slots_N, None]).to(x_TH.dtype))
        return call.leave(y_TH)


class Recorder:
    """Collects `RoutedTokens` of one experts module into arrays of their final size, which `allocate` makes.

    A module may be called with several rows for a token, one block of all tokens after the other (where routing weights
    are applied to inputs, these differ by expert). Each row then counts as a token of its own, of a share of the energy,
    so that errors of a token's experts add up as if they were uncorrelated.
    """

    def __init__(self, spec: ExpertsSpec, tokens: int, allocate: Allocate) -> None:
        self._hidden, self._tokens, self._allocate = spec.hidden, tokens, allocate
        self._filled = 0
        self._rows = 1
        self._x_TH: Tensor | None = None
        self._index_TK = torch.zeros(0, 0, dtype=torch.int64)
        self._gate_TK = torch.zeros(0, 0)
        self.batch = tokens

    def __call__(self, x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> None:
        """Appends what a call saw of `batch` tokens, in token order."""
        if not len(x_TH):
            return
        if self._x_TH is None:
            self._rows = max(1, len(x_TH) // self.batch)
            total = self._tokens * self._rows
            self._x_TH = self._allocate((total, self._hidden))
            self._index_TK = torch.zeros(total, index_TK.shape[1], dtype=torch.int64)
            self._gate_TK = torch.zeros(total, index_TK.shape[1])
        rows = slice(self._filled, self._filled + len(x_TH))
        if rows.stop <= len(self._x_TH) and len(x_TH) == self._rows * self.batch:
            held = (self._x_TH, self._index_TK, self._gate_TK)
            for array, seen in zip(held, (x_TH, index_TK, gate_TK), strict=True):
                array[rows] = seen.unflatten(0, (self._rows, self.batch)).transpose(0, 1).flatten(0, 1)
        self._filled = rows.stop

    def tokens(self, name: str, energy_T: Tensor) -> RoutedTokens | None:
        """Everything recorded; None if the module was never called.

        Raises:
            ModelError: it was called, but not once for every token.
        """
        if self._x_TH is None:
            return None
        if self._filled != len(energy_T) * self._rows:
            raise ModelError(
                f"Experts module '{name}' saw {self._filled} of {len(energy_T) * self._rows} calibration tokens.",
                why="The model does not send every token through it once, so what it saw cannot be matched to tokens.",
                remedy="List it under `ignore`, or compress data-free (no `calibration.data`).",
            )
        energy_T = (energy_T / self._rows).repeat_interleave(self._rows)
        return RoutedTokens(self._x_TH, self._index_TK, self._gate_TK, energy_T)
