"""The residual stream of all calibration windows, between two layers, with whatever else layers tell each other.

Kept in memory up to a limit, above it on disk, where every layer's stream is stored before the next layer is computed.
In memory it is stored only when `CHECKPOINT_SECONDS` have gone by since it was last: carrying tokens through dense layers
is cheap beside solving, which is stored module by module, so that a killed run loses about the layer it was at, and spends
no more than that time to get there again. What the last layer gives is computed only for its logits.
Shape suffixes: N windows (rows in comparisons), B windows of one batch, L tokens of one window, T = N*L, S residual streams;
the rest as in `tensors`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from molae_compress.calibration.observed import ObservedExperts, Recorder, RoutedTokens
from molae_compress.calibration.one_by_one import ObservedList
from molae_compress.calibration.replay import Passed, nbytes, of_window, packed, unpacked
from molae_compress.calibration.walk import LayerArguments, hidden_after, pass_through
from molae_compress.checkpoint import WorkDirectory
from molae_compress.checkpoint.writer import disk_errors
from molae_compress.layouts import layout_of
from molae_compress.source import Source
from molae_compress.tensors import DenseExperts, ExpertsSpec

STAGE = "hidden"  # of the work directory
StandIn = ObservedExperts | ObservedList
CHECKPOINT_SECONDS = 60.0
Done = Callable[[int], None]
_ROWS = 1024  # tokens compared at a time


class HeldOut:
    """The last windows of a stream as they stand before one layer, to be sent through it again once it is changed.

    The whole batches that these windows are in are sent: what a layer computes may depend on its batch.

    Args:
        arguments: of the layers.
        prefix: path of the layer, with the dot.
        batches: token ids.
        passed: what the layers before gave for a batch, by its number.
        tokens: of the windows.
    """

    def __init__(
        self,
        arguments: LayerArguments,
        prefix: str,
        batches: Sequence[Tensor],
        passed: Callable[[int], Passed],
        tokens: int,
    ) -> None:
        self._arguments, self._prefix, self._batches, self._passed = arguments, prefix, batches, passed
        self.tokens = tokens

    def changes(
        self, module: nn.Module, experts: Mapping[str, nn.Module], changed: Mapping[str, nn.Module]
    ) -> tuple[Tensor, Tensor]:
        """|h' - h|^2 and |h|^2 [T] of the windows' tokens after the layer `module`, float64 on the CPU.

        Args:
            experts: stand-ins for its experts modules, by full path, with which it gives h.
            changed: the same for h'.
        """
        found = []
        for batch, ids_BL in enumerate(self._batches):
            hidden = (self._hidden(module, each, ids_BL, batch).split(_ROWS) for each in (experts, changed))
            for exact_NSH, other_NSH in zip(*hidden, strict=True):
                parts = (other_NSH.double() - exact_NSH.double(), exact_NSH.double())
                found.append(torch.stack([part_NSH.square().sum(-1).mean(1) for part_NSH in parts]).cpu())
        change_T, energy_T = torch.cat(found, dim=1)[:, -self.tokens :]
        return change_T, energy_T

    def _hidden(self, module: nn.Module, experts: Mapping[str, nn.Module], ids_BL: Tensor, batch: int) -> Tensor:
        inside = {path.removeprefix(self._prefix): stand_in for path, stand_in in experts.items()}
        return hidden_after(self._arguments, module, inside, ids_BL, self._passed(batch))


class ResidualStream:
    """Calibration tokens on their way through the layers of a source; `layer` is the one they stand before.

    Args:
        source: the dense model, whose ends (`Source.ends`) are open while the stream is used.
        windows_NL: token ids.
        batch_size: windows per forward.
        work: where the stream is stored; None keeps it in memory only.
        name: of the pass, in the work directory.
        memory_limit: bytes of activations that may stay in memory: half for the stream, half for what experts see.
    """

    def __init__(
        self,
        source: Source,
        windows_NL: Tensor,
        batch_size: int,
        *,
        work: WorkDirectory | None,
        name: str,
        memory_limit: int | None,
    ) -> None:
        self.layer = 0
        self._source, self._work, self._name = source, work, name
        self._ids = windows_NL.split(batch_size)
        self._tokens = windows_NL.numel()
        self._shape, self._batch_size = windows_NL.shape, batch_size
        self._arguments = LayerArguments(source.model, source.layers.paths, source.device)
        self._room = memory_limit // 2 if memory_limit is not None and work is not None else None
        # by batch; None while it is on disk only
        self._passed: list[Passed] | None = [()] * len(self._ids)
        self._stored: list[int] = []
        self._stored_at = time.monotonic()

    def start(self, layer: int) -> None:
        """Goes to the last layer up to `layer` whose stream an earlier run left whole, or stays before the first."""
        if self._work is None:
            return
        done, batches = self._work.done(STAGE), range(len(self._ids))
        whole = [number for number in range(layer + 1) if all(self._item(number, batch) in done for batch in batches)]
        kept = {self._item(whole[-1], batch) for batch in batches} if whole else set()
        for item in done - kept:
            self._path(item).unlink()
        if whole:
            self.layer, self._stored = whole[-1], whole[-1:]
            fits = self._fits(nbytes(self._read(self.layer, 0)) * len(batches))
            self._passed = [self._read(self.layer, batch) for batch in batches] if fits else None

    def step(
        self,
        module: nn.Module,
        experts: Mapping[str, nn.Module],
        recorders: Mapping[str, Recorder],
        *,
        advance: bool = True,
    ) -> dict[str, RoutedTokens | None]:
        """Sends all windows through layer `layer`, which is `module`.

        Args:
            experts: stand-ins for its experts modules, by full path.
            recorders: those that record, by the same path.
            advance: go on to the next layer; otherwise the stream stays where it is.

        Returns:
            what every recorded module saw; None if the model did not call it.
        """
        prefix = f"{self._source.layers.paths[self.layer]}."
        inside = {path.removeprefix(prefix): stand_in for path, stand_in in experts.items()}
        energies: list[Tensor] = []
        after: list[Passed] | None = []
        outputs = pass_through(self._arguments, module, inside, self._batches(recorders), advance=advance)
        for batch, (passed, energy_T) in enumerate(outputs):
            energies.append(energy_T)
            if not advance:
                continue
            if batch == 0 and not self._fits(nbytes(passed) * len(self._ids)):
                after = None
            if after is None:
                self._store(self.layer + 1, batch, passed)
            else:
                after.append(passed)
                if self._passed is not None:
                    self._passed[batch] = ()  # gone on
        if advance:
            self._go_on(after)
        return {path: recorder.tokens(path, torch.cat(energies)) for path, recorder in recorders.items()}

    def held_out(self, windows: int) -> HeldOut:
        """The last `windows` windows where they stand now, whatever becomes of the stream until `forget`."""
        first, layer, passed = (self._shape[0] - windows) // self._batch_size, self.layer, self._passed
        kept = passed[first:] if passed is not None else None
        return HeldOut(
            self._arguments,
            f"{self._source.layers.paths[layer]}.",
            self._ids[first:],
            lambda batch: kept[batch] if kept is not None else self._read(layer, first + batch),
            windows * self._shape[1],
        )

    def at_end(self) -> Iterator[tuple[Tensor, Passed]]:
        """Every window [1,L], with what the layers up to here gave for it."""
        for ids_BL, passed in self._batches({}):
            for row, ids_1L in enumerate(ids_BL.split(1)):
                yield ids_1L, of_window(passed, row, len(ids_BL))

    def recorder(self, spec: ExpertsSpec) -> Recorder:
        """Room for what one experts module sees of the whole stream."""
        return Recorder(spec, self._tokens, partial(self._array, f"{spec.name}.inputs"))

    def forget(self, layer: int) -> None:
        """Removes what is stored of the stream up to `layer`, whose modules are done, but for what was stored last."""
        for old in [number for number in self._stored[:-1] if number <= layer]:
            self._stored.remove(old)
            for batch in range(len(self._ids)):
                self._path(self._item(old, batch)).unlink(missing_ok=True)

    def _go_on(self, after: list[Passed] | None) -> None:
        """Stands before the next layer; `after` is the stream there, None if it is stored already."""
        self.layer += 1
        self._passed = after
        if after is not None:
            if self._work is None or time.monotonic() - self._stored_at < CHECKPOINT_SECONDS:
                return
            for batch, passed in enumerate(after):
                self._store(self.layer, batch, passed)
        self._stored.append(self.layer)
        self._stored_at = time.monotonic()

    def _batches(self, recorders: Mapping[str, Recorder]) -> Iterator[tuple[Tensor, Passed]]:
        for batch, ids_BL in enumerate(self._ids):
            for recorder in recorders.values():
                recorder.batch = ids_BL.numel()
            yield ids_BL, self._passed[batch] if self._passed is not None else self._read(self.layer, batch)

    def _fits(self, size: int) -> bool:
        return self._room is None or size <= self._room

    def _item(self, layer: int, batch: int) -> str:
        return f"{self._name}-{layer:04d}-{batch:05d}"

    def _path(self, item: str) -> Path:
        assert self._work is not None
        return self._work.path(STAGE, item)

    def _store(self, layer: int, batch: int, passed: Passed) -> None:
        assert self._work is not None
        tensors, info = packed(passed)
        self._work.commit(STAGE, self._item(layer, batch), tensors, {"passed": info})

    def _read(self, layer: int, batch: int) -> Passed:
        assert self._work is not None
        tensors, info = self._work.load(STAGE, self._item(layer, batch))
        return unpacked(tensors, info["passed"])

    def _array(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Zeros, in memory or in a file."""
        size = shape[0] * shape[1]
        if self._fits(4 * size):
            return torch.zeros(shape)
        path = self._path(name).with_suffix(".bin")
        with disk_errors(path.parent):
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                # a disk that fills up under a mapped file would end the process
                os.posix_fallocate(file.fileno(), 0, 4 * size)
            mapped = torch.from_file(str(path), shared=True, size=size).view(shape)
            path.unlink()  # the space is given back with the tensor, or when the process is killed
        return mapped


def observed(source: Source, specs: Sequence[ExpertsSpec], recorders: Mapping[str, Recorder]) -> dict[str, StandIn]:
    """Stand-ins computing what the dense experts of a layer compute; those with a recorder keep what they see."""
    return {spec.name: stand_in(source, spec, source.dense(spec), recorders.get(spec.name)) for spec in specs}


def stand_in(source: Source, spec: ExpertsSpec, dense: DenseExperts, record: Recorder | None = None) -> StandIn:
    """Computes what `dense` computes, called as the experts module that `spec` describes; see `ObservedExperts`."""
    module = source.model.get_submodule(spec.name)
    layout = layout_of(spec.name, module)
    assert layout is not None
    if layout.called_one_by_one:
        return ObservedList(dense, module, layout.weight_names(module), record)
    return ObservedExperts(dense, partial(layout.enter, module, spec), record)


def forwarded(source: Source, arguments: LayerArguments, batches: Sequence[Tensor], progress: Done) -> list[Passed]:
    """Carries batches of token ids through all layers, one of them in memory at a time; `progress` is told after each.

    Dense experts stay in the precision they are stored in, so that a layer takes no more memory than on disk.

    Returns:
        what the layers gave for each batch, for `LayerArguments.logits`.
    """
    carried: list[Passed] = [()] * len(batches)
    for layer in range(len(source.layers)):
        _forward_layer(source, arguments, layer, batches, carried)
        return_memory()
        progress(layer + 1)
    return carried


def _forward_layer(
    source: Source, arguments: LayerArguments, layer: int, batches: Sequence[Tensor], carried: list[Passed]
) -> None:
    """Replaces what the layers before gave for each batch; nothing of the layer outlives the call."""
    experts = observed(source, [spec for spec in source.specs if source.layers.of(spec.name) == layer], {})
    inside = {name.removeprefix(f"{source.layers.paths[layer]}."): stand_in for name, stand_in in experts.items()}
    with source.layer(layer) as module:
        outputs = pass_through(arguments, module, inside, iter(list(zip(batches, carried, strict=True))))
        for batch, (passed, _) in enumerate(outputs):
            carried[batch] = passed


def return_memory() -> None:
    """Hands what a layer took back to the system: glibc keeps it, in pieces that the next layer does not fit into."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
