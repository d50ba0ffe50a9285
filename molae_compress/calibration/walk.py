"""Calibration tokens carried through a model, one decoder layer at a time.

Each decoder layer is called outside the model's own forward, with the arguments the model would have given it: they
are recorded from the model itself, run with every layer replaced by a pass-through, so that masks, rotary tables and
per-layer-type arguments of hybrid models are right without knowing any of them. Recording costs one embedding and
one mask; nothing is kept between layers but the hidden states.
Shape suffixes: N windows, B windows of one batch, L tokens of one window; T = N*L; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molae_compress.errors import ModelError
from molae_compress.layouts import Call
from molae_compress.tensors import DenseExperts, ExpertsSpec

Enter = Callable[[tuple[Any, ...], Mapping[str, Any]], Call]  # the arguments of one call, normalised
_WRAPPINGS: tuple[Callable[[Tensor], Any], ...] = (
    lambda x: x,
    lambda x: (x,),
    lambda x: (x, None),
    lambda x: (x, None, None),
)


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
            out_NH = dense.intermediate(expert, x_TH[tokens_N]) @ dense.w_out_EHI[expert].to(x_TH.dtype).T
            if dense.bias_out_EH is not None:
                out_NH = out_NH + dense.bias_out_EH[expert].to(x_TH.dtype)
            out_NH = out_NH if dense.after is None else dense.after(out_NH)
            y_TH.index_add_(0, tokens_N, (out_NH * weight_TK[tokens_N, slots_N, None]).to(x_TH.dtype))
        return call.leave(y_TH)


class Recorder:
    """Collects `RoutedTokens` of one experts module into arrays of their final size, in memory or in a file."""

    def __init__(self, spec: ExpertsSpec, tokens: int, folder: Path | None) -> None:
        self._filled = 0
        self._x_TH = _array((tokens, spec.hidden), folder, f"{spec.name}.inputs")
        self._index_TK = torch.zeros(tokens, 0, dtype=torch.int64)
        self._gate_TK = torch.zeros(tokens, 0)

    def __call__(self, x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor) -> None:
        """Appends one batch's rows, in token order."""
        if self._filled == 0:
            self._index_TK = torch.zeros(len(self._x_TH), index_TK.shape[1], dtype=torch.int64)
            self._gate_TK = torch.zeros(len(self._x_TH), index_TK.shape[1])
        rows = slice(self._filled, self._filled + len(x_TH))
        if rows.stop <= len(self._x_TH):
            self._x_TH[rows], self._index_TK[rows], self._gate_TK[rows] = x_TH, index_TK, gate_TK
        self._filled = rows.stop

    def tokens(self, name: str, energy_T: Tensor) -> RoutedTokens:
        """Everything recorded; raises `ModelError` if the module was not called once for every token."""
        if self._filled != len(energy_T):
            raise ModelError(
                f"Experts module '{name}' saw {self._filled} of {len(energy_T)} calibration tokens.",
                why="The model does not send every token through it once, so what it saw cannot be matched to tokens.",
                remedy="List it under `ignore`, or compress data-free (no `calibration.data`).",
            )
        return RoutedTokens(self._x_TH, self._index_TK, self._gate_TK, energy_T)


def _array(shape: tuple[int, int], folder: Path | None, name: str) -> Tensor:
    if folder is None:
        return torch.zeros(shape)
    path, size = folder / f"{name}.bin", shape[0] * shape[1]
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * size)  # a disk that fills up under a mapped file would end the process
    mapped = torch.from_file(str(path), shared=True, size=size).view(shape)
    path.unlink()  # the space is given back with the tensor, or when the process is killed
    return mapped


class _Captured(Exception):
    """Carries a layer's arguments out of the model's forward."""


class _Stub(nn.Module):
    """A decoder layer that passes hidden states on, or hands its arguments over and stops the forward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)
        self.wrap = _WRAPPINGS[0]
        self.stop = False
        self.replacement: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)  # models read attributes such as attention_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.stop:
            raise _Captured((args, kwargs))
        hidden = args[0] if args else kwargs["hidden_states"]
        return self.wrap(hidden if self.replacement is None else self.replacement)


class LayerArguments:
    """Hidden states before the first decoder layer, and the other arguments of any layer, from the model itself."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, device: torch.device) -> None:
        self._model, self._layers, self._device = model, layers, device
        self._wrap: Callable[[Tensor], Any] | None = None

    def of(self, layer: int, ids_BL: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments the model gives decoder layer `layer` for these tokens."""
        cause: Exception | None = None
        for wrap in (self._wrap,) if self._wrap is not None else _WRAPPINGS:
            try:
                args, kwargs = self._capture(layer, ids_BL, wrap)
            except (AttributeError, TypeError, IndexError, ValueError) as error:
                cause = error  # this wrapping is not what the model expects of a layer
                continue
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor) and hidden.dim() == 3:
                if layer > 0:  # before layer 0 nothing has been wrapped yet
                    self._wrap = wrap
                return args, kwargs
        raise ModelError(
            f"The arguments of decoder layer {layer} could not be recorded from {type(self._model).__name__}.",
            why="Its layers pass more to each other than hidden states.",
            remedy="Compress data-free (no `calibration` section), or report the architecture.",
        ) from cause

    def _capture(self, layer: int, ids_BL: Tensor, wrap: Callable[[Tensor], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        with self._stubbed(wrap) as stubs:
            stubs[layer].stop = True
            try:
                self._model(input_ids=ids_BL.to(self._device), use_cache=False)
            except _Captured as captured:
                args, kwargs = captured.args[0]
                return args, kwargs
        raise AssertionError(f"decoder layer {layer} was not called")

    @contextmanager
    def _stubbed(self, wrap: Callable[[Tensor], Any]) -> Iterator[list[_Stub]]:
        """The model with every decoder layer replaced by a pass-through."""
        originals = list(self._layers)
        stubs = [_Stub(original) for original in originals]
        try:
            for index, stub in enumerate(stubs):
                stub.wrap = wrap
                self._layers[index] = stub
            yield stubs
        finally:
            for index, original in enumerate(originals):
                self._layers[index] = original

    def embedded(self, ids_BL: Tensor) -> Tensor:
        """[B,L,H]: hidden states before decoder layer 0."""
        args, kwargs = self.of(0, ids_BL)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    def logits(self, ids_BL: Tensor, hidden_BLH: Tensor) -> Tensor:
        """[B,L,V]: what the model makes of hidden states after its last layer: final norm, head and any scaling."""
        if self._wrap is None and len(self._layers) > 1:
            self.of(len(self._layers) - 1, ids_BL)  # settles what layers return
        with self._stubbed(self._wrap or _WRAPPINGS[0]) as stubs:
            stubs[-1].replacement = hidden_BLH
            out: Tensor = self._model(input_ids=ids_BL.to(self._device), use_cache=False).logits
        return out

    def call(self, layer: int, module: nn.Module, ids_BL: Tensor, hidden_BLH: Tensor) -> Tensor:
        """[B,L,H]: decoder layer `layer`, here `module`, on given hidden states."""
        args, kwargs = self.of(layer, ids_BL)
        out = module(hidden_BLH, *args[1:], **kwargs) if args else module(**{**kwargs, "hidden_states": hidden_BLH})
        result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
        return result


def pass_through(
    arguments: LayerArguments,
    layer: int,
    module: nn.Module,
    experts: Mapping[str, nn.Module],
    batches: Iterator[tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs batches of (token ids, hidden states) through one decoder layer.

    Args:
        experts: stand-ins for experts modules, by path inside the layer; in place only while a batch runs.

    Yields:
        hidden states after the layer [B,L,H], and their squared norms [B*L], batch by batch.
    """
    for ids_BL, hidden_BLH in batches:
        originals = {path: module.get_submodule(path) for path in experts}
        for path, stand_in in experts.items():
            set_submodule(module, path, stand_in)
        try:
            out_BLH = arguments.call(layer, module, ids_BL, hidden_BLH)
        finally:
            for path, original in originals.items():
                set_submodule(module, path, original)
        yield out_BLH, out_BLH.flatten(0, 1).float().square().sum(1)


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces the submodule at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
