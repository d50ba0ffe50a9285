"""A model differentiated one layer at a time.

Forward, tokens pass the layers one by one, and what passes between them is kept. Backward, each layer is computed once more
from what came into it, by autograd, and hands the gradient of that to the layers before: of everything that is a number,
wherever a layer put it. The model's own glue between layers takes part, as in `calibration.walk`.
Shape suffixes: B windows of one batch, L tokens of one window, V vocabulary; the rest as in `tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from molae_compress.calibration.replay import Given, Gone, Passed, Slot, nbytes, of_window, packed, unpacked
from molae_compress.calibration.walk import LayerArguments, in_place, pass_through
from molae_compress.checkpoint import WorkDirectory
from molae_compress.source import Source
from molae_compress.stream import STAGE, StandIn

Gradients = dict[Slot, Tensor]
Experts = Callable[[int], Mapping[str, StandIn]]  # of a layer, by path


@dataclass
class StreamedModel:
    """A model whose layers are called one by one, forward and backward.

    Attributes:
        source: its layers, and what lies outside of them.
        experts: a stand-in for every experts module of a layer, by its number.
        routers: full name -> values, in place of the model's own.
    """

    source: Source
    experts: Experts
    routers: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.arguments = LayerArguments(self.source.model, self.source.layers.paths, self.source.device)

    def forward(self, batches: Sequence[Tensor], *, keep: Kept | None = None) -> list[Passed]:
        """What all layers gave for each batch; `keep` gets what the layers before each one gave."""
        carried: list[Passed] = [()] * len(batches)
        for layer in range(len(self.source.layers)):
            with torch.no_grad(), self._opened(layer) as (module, inside):
                outputs = pass_through(self.arguments, module, inside, iter(list(zip(batches, carried, strict=True))))
                for batch, (passed, _) in enumerate(outputs):
                    if keep is not None:
                        keep.put((layer, batch), carried[batch])
                    carried[batch] = passed
        return carried

    def backward(self, batches: Sequence[Tensor], kept: Kept, gradients: list[Gradients]) -> dict[str, Tensor]:
        """Gradients of the routers, from those of what the last layer leaves; `gradients` are used up."""
        found = {name: torch.zeros_like(values) for name, values in self.routers.items()}
        lowest = min(self.source.layers.of(name) for name in self.routers)
        for layer in reversed(range(lowest, len(self.source.layers))):
            with self._opened(layer) as (module, inside), torch.enable_grad():
                for batch, ids_BL in enumerate(batches):
                    leaves, passed = _leaves(kept.take((layer, batch)), self.source.device)
                    with in_place(module, inside):
                        given = self.arguments.call(module, ids_BL, passed)
                    if given is None:
                        continue
                    below, own = self._pulled_back(layer, given, leaves, gradients[batch])
                    _add(gradients[batch], below)
                    for name, gradient in own.items():
                        found[name] += gradient.to(found[name])
        return found

    def _pulled_back(
        self, layer: int, given: Given, leaves: Gradients, gradients: Gradients
    ) -> tuple[Gradients, dict[str, Tensor]]:
        """Gradients of what came into a layer and of its routers, from those of what it gave, which are taken out."""
        given_gradients = [(leaf, gradients.pop((layer, i), None)) for i, leaf in enumerate(given.leaves())]
        pairs = [
            (leaf, gradient.to(leaf.device))
            for leaf, gradient in given_gradients
            if gradient is not None and isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not pairs:
            return {}, {}
        own = self._parameters(layer)
        outputs, above = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, [*leaves.values(), *own.values()], above, allow_unused=True)
        below = {slot: gradient for slot, gradient in zip(leaves, found, strict=False) if gradient is not None}
        routers = zip(own, found[len(leaves) :], strict=True)
        return below, {name: gradient for name, gradient in routers if gradient is not None}

    def loss(
        self, ids_BL: Tensor, passed: Passed, loss: Callable[[Tensor, int], Tensor], *, train: bool
    ) -> tuple[list[float], Gradients]:
        """For each window `loss` of its logits [1,L,V], and the gradient of their sum in what the layers gave."""
        values, gradients = list[float](), Gradients()
        windows = len(ids_BL)
        for window in range(windows):
            with torch.set_grad_enabled(train):
                leaves, live = _leaves(passed, self.source.device) if train else ({}, passed)
                logits_1LV = self.arguments.logits(ids_BL[window, None], of_window(live, window, windows))
                value = loss(logits_1LV, window)
            values.append(float(value.detach()))
            if train:
                below = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                _add(gradients, {slot: g for slot, g in zip(leaves, below, strict=True) if g is not None})
        return values, gradients

    def _parameters(self, layer: int) -> dict[str, nn.Parameter]:
        prefix = f"{self.source.layers.paths[layer]}."
        return {name: self.source.model.get_parameter(name) for name in self.routers if name.startswith(prefix)}

    @contextmanager
    def _opened(self, layer: int) -> Iterator[tuple[nn.Module, dict[str, nn.Module]]]:
        """A layer with its routers' values in it, and the stand-ins for its experts by their path inside."""
        prefix = f"{self.source.layers.paths[layer]}."
        with self.source.layer(layer) as module:
            inside: dict[str, nn.Module] = {
                path.removeprefix(prefix): expert for path, expert in self.experts(layer).items()
            }
            before = self._parameters(layer)
            try:
                for name, parameter in before.items():
                    _set(self.source.model, name, nn.Parameter(self.routers[name].to(parameter, copy=True)))
                yield module, inside
            finally:
                for name, parameter in before.items():
                    _set(self.source.model, name, parameter)


class Kept:
    """What passes between layers, in memory up to a limit and else in the work directory."""

    def __init__(self, work: WorkDirectory | None, room: int | None) -> None:
        self._work, self._room = work, room if work is not None else None
        self._held: dict[tuple[int, int], Passed] = {}
        self._size = 0

    def put(self, key: tuple[int, int], passed: Passed) -> None:
        size = nbytes(passed)
        if self._room is not None and self._size + size > self._room:
            assert self._work is not None
            tensors, info = packed(passed)
            self._work.commit(STAGE, self._item(key), tensors, {"passed": info})
            return
        self._held[key] = passed
        self._size += size

    def take(self, key: tuple[int, int]) -> Passed:
        """Gives it back, and forgets it."""
        if key in self._held:
            passed = self._held.pop(key)
            self._size -= nbytes(passed)
            return passed
        assert self._work is not None
        tensors, info = self._work.load(STAGE, self._item(key))
        self._work.path(STAGE, self._item(key)).unlink()
        return unpacked(tensors, info["passed"])

    def _item(self, key: tuple[int, int]) -> str:
        return f"backward-{key[0]:04d}-{key[1]:05d}"


def _leaves(passed: Passed, device: torch.device) -> tuple[dict[Slot, Tensor], Passed]:
    """What layers gave with every number a leaf of the graph, and those leaves by their slot."""
    leaves: dict[Slot, Tensor] = {}

    def leaf(slots: Iterator[Slot], value: Tensor | Gone) -> Tensor | Gone:
        slot = next(slots)
        if isinstance(value, Gone) or not value.is_floating_point():
            return value
        leaves[slot] = value.detach().to(device).requires_grad_()
        return leaves[slot]

    live = []
    for layer, given in enumerate(passed):
        slots = ((layer, i) for i in count())
        live.append(given and given.mapped(partial(leaf, slots)))
    return leaves, tuple(live)


def _add(gradients: Gradients, more: Gradients) -> None:
    for slot, gradient in more.items():
        gradients[slot] = gradients[slot] + gradient.cpu() if slot in gradients else gradient.cpu()


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._parameters[leaf] = parameter
