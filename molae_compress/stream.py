"""The residual stream of all calibration windows, between two decoder layers.

Kept in memory up to a limit. With a work directory every layer's stream is on disk as well before the next is computed, so
that a killed run goes on at the layer it was at, and above the limit it lives only there.
Shape suffixes: N windows, B windows of one batch, L tokens of one window, T = N*L; the rest as in `tensors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from molae_compress.calibration.walk import LayerArguments, ObservedExperts, Recorder, RoutedTokens, pass_through
from molae_compress.checkpoint import WorkDirectory
from molae_compress.checkpoint.writer import disk_errors
from molae_compress.errors import ModelError
from molae_compress.layouts import layout_of
from molae_compress.source import Source
from molae_compress.tensors import ExpertsSpec

STAGE = "hidden"  # of the work directory


class ResidualStream:
    """Calibration tokens on their way through the layers of a source; `layer` is the one they stand before.

    Args:
        source: the dense model, whose ends (`Source.ends`) are open while the stream is used.
        windows_NL: token ids.
        batch_size: windows per forward.
        work: where the stream is kept; None keeps it in memory only.
        name: of the pass, in the work directory.
        memory_limit: bytes of activations that may stay in memory.
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
        self._arguments = LayerArguments(source.model, source.layers, source.device)
        hidden = max(spec.hidden for spec in source.specs)
        # the stream itself and what the experts of one layer see of it
        self._in_memory = work is None or memory_limit is None or 2 * self._tokens * hidden * 4 <= memory_limit
        self._hidden: list[Tensor] = []

    def start(self, layer: int) -> None:
        """Goes to the last layer up to `layer` whose stream an earlier run left whole, or to the embeddings."""
        stored = self._work.done(STAGE) if self._work is not None else set()
        for index in range(layer, 0, -1):
            if all(self._item(index, batch) in stored for batch in range(len(self._ids))):
                self.layer = index
                if self._in_memory:
                    self._hidden = [self._read(index, batch) for batch in range(len(self._ids))]
                return
        for batch, ids_BL in enumerate(self._ids):
            self._put(0, batch, self._arguments.embedded(ids_BL))

    def step(
        self,
        module: nn.Module,
        experts: Mapping[str, nn.Module],
        recorders: Mapping[str, Recorder],
        *,
        advance: bool = True,
    ) -> dict[str, RoutedTokens]:
        """Sends all windows through decoder layer `layer`, which is `module`.

        Args:
            experts: stand-ins for its experts modules, by full path.
            recorders: those that record, by the same path.
            advance: go on to the next layer; otherwise the stream stays where it is.

        Returns:
            what every recorded module saw.
        """
        prefix = f"{self._source.layers_path}.{self.layer}."
        inside = {path.removeprefix(prefix): stand_in for path, stand_in in experts.items()}
        energies: list[Tensor] = []
        outputs = pass_through(self._arguments, self.layer, module, inside, self._batches())
        for batch, (out_BLH, energy_T) in enumerate(outputs):
            energies.append(energy_T.cpu())
            if advance:
                self._put(self.layer + 1, batch, out_BLH)
        self.layer += int(advance)
        return {path: recorder.tokens(path, torch.cat(energies)) for path, recorder in recorders.items()}

    def recorder(self, spec: ExpertsSpec) -> Recorder:
        """Room for what one experts module sees of the whole stream."""
        if self._in_memory or self._work is None:
            return Recorder(spec, self._tokens, None)
        folder = self._work.path(STAGE, "inputs").parent
        with disk_errors(folder):
            return Recorder(spec, self._tokens, folder)

    def forget(self, layer: int) -> None:
        """Removes the stored stream before `layer`, once nothing needs it any more."""
        if self._work is not None:
            for batch in range(len(self._ids)):
                self._work.path(STAGE, self._item(layer, batch)).unlink(missing_ok=True)

    def _item(self, layer: int, batch: int) -> str:
        return f"{self._name}-{layer:04d}-{batch:05d}"

    def _put(self, layer: int, batch: int, hidden_BLH: Tensor) -> None:
        hidden_BLH = hidden_BLH.cpu()
        if self._work is not None:
            self._work.commit(STAGE, self._item(layer, batch), {"hidden": hidden_BLH}, {})
        if self._in_memory:
            if batch < len(self._hidden):
                self._hidden[batch] = hidden_BLH
            else:
                self._hidden.append(hidden_BLH)

    def _read(self, layer: int, batch: int) -> Tensor:
        assert self._work is not None
        return self._work.load(STAGE, self._item(layer, batch))[0]["hidden"]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, ids_BL in enumerate(self._ids):
            hidden_BLH = self._hidden[batch] if self._in_memory else self._read(self.layer, batch)
            yield ids_BL, hidden_BLH.to(self._source.device)


def observed(source: Source, specs: Sequence[ExpertsSpec], recorders: Mapping[str, Recorder]) -> dict[str, nn.Module]:
    """Stand-ins computing what the dense experts of a layer compute; those with a recorder keep what they see."""
    stand_ins: dict[str, nn.Module] = {}
    for spec in specs:
        module = source.model.get_submodule(spec.name)
        layout = layout_of(spec.name, module)
        assert layout is not None
        if layout.called_one_by_one:
            raise ModelError(
                f"The experts '{spec.name}' ({type(module).__name__}) cannot be observed.",
                why="The model calls them one by one, so that routing weights are not to be seen.",
                remedy="Compress data-free (no `calibration` section).",
            )
        enter = partial(layout.enter, module, spec)
        stand_ins[spec.name] = ObservedExperts(source.dense(spec), enter, recorders.get(spec.name))
    return stand_ins


def forwarded(
    source: Source, arguments: LayerArguments, layer: int, batches: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[Tensor]:
    """Hidden states [B,L,H] after one decoder layer, batch by batch, from batches of token ids and hidden states.

    Dense experts stay in the precision they are stored in, so that a layer takes no more memory than on disk.
    """
    prefix = f"{source.layers_path}.{layer}."
    experts = observed(source, [spec for spec in source.specs if spec.layer == layer], {})
    inside = {path.removeprefix(prefix): stand_in for path, stand_in in experts.items()}
    with source.layer(layer) as module:
        for out_BLH, _ in pass_through(arguments, layer, module, inside, batches):
            yield out_BLH
