"""The original model's predictions for the examples: of a model in memory, or kept on disk.

Those on disk are made by carrying the examples through the original layer by layer, so that neither it nor the two models
together are ever in memory. Shape suffixes: see `molae_compress.tuning.objective`; N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from molae_compress.calibration.replay import of_window
from molae_compress.calibration.walk import LayerArguments
from molae_compress.checkpoint import WorkDirectory
from molae_compress.source import DiskSource
from molae_compress.stream import forwarded
from molae_compress.tuning.examples import Examples
from molae_compress.tuning.objective import Divergence, full_divergence, learned_places, top_divergence

STAGE = "teacher"  # of the work directory
_FIRST = "part-00000"
_BATCH = 8
Progress = Callable[[str, int, int], None]


class Teacher(Protocol):
    """What a model is compared with."""

    def divergences(self, batch: dict[str, Tensor]) -> list[Divergence]:
        """For each example of a batch, of the model's logits at its learned places."""


@dataclass(frozen=True)
class Resident:
    """The original as a whole, in memory and on the device of the batches."""

    model: nn.Module

    def divergences(self, batch: dict[str, Tensor]) -> list[Divergence]:
        with torch.no_grad():
            logits_BLV = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        pairs = zip(logits_BLV, batch["labels"], strict=True)
        return [partial(full_divergence, logits_LV[learned_places(labels_L)]) for logits_LV, labels_L in pairs]


@dataclass(frozen=True)
class Cached:
    """The likeliest tokens of the original, on disk.

    Attributes:
        files: of as many examples each, in their order; the last may have fewer.
        each: so many.
    """

    files: Sequence[Path]
    each: int

    @classmethod
    def inside(cls, folder: Path) -> Cached:
        """What lies in the folder of `STAGE`."""
        files = sorted(folder.glob("part-*.safetensors"))
        with safe_open(files[0], framework="pt") as file:
            return cls(files, int(file.get_slice("logp").get_shape()[0]))

    def divergences(self, batch: dict[str, Tensor]) -> list[Divergence]:
        device = batch["input_ids"].device
        found: list[Divergence] = []
        for example, labels_L in zip(batch["example"].tolist(), batch["labels"], strict=True):
            places = learned_places(labels_L)
            with safe_open(self.files[example // self.each], framework="pt") as file:
                logp_Lk, tokens_Lk = (file.get_slice(name)[example % self.each] for name in ("logp", "tokens"))
            found.append(partial(top_divergence, logp_Lk.to(device)[places], tokens_Lk.to(device)[places]))
        return found


def keep_predictions(
    source: DiskSource, examples: Examples, top_k: int, work: WorkDirectory, *, memory_limit: int, progress: Progress
) -> None:
    """Makes what `Cached` reads, or goes on making it after a killed run.

    Args:
        source: the original.
        examples: all of them.
        top_k: k; no more than there are tokens.
        work: where it is stored, as items of `STAGE`.
        memory_limit: bytes of activations that may be in memory; more examples pass in several turns.
        progress: called with a stage, what is done of it, and of how much.
    """
    each = _examples_at_once(source, examples, memory_limit)
    if _FIRST in work.done(STAGE):  # by a run that may have had more memory, or less
        each = Cached.inside(work.path(STAGE, _FIRST).parent).each
    parts = range(0, len(examples), each)
    stages = len(source.layers)
    for number, first in enumerate(parts):
        item = f"part-{number:05d}"
        if item not in work.done(STAGE):
            done = partial(_tell, progress, number * stages, len(parts) * stages)
            logp_NLk, tokens_NLk = _likeliest(source, examples.ids_NL[first : first + each], top_k, done)
            work.commit(STAGE, item, {"logp": logp_NLk, "tokens": tokens_NLk}, {})
    progress(STAGE, len(parts) * stages, len(parts) * stages)


def _examples_at_once(source: DiskSource, examples: Examples, memory_limit: int) -> int:
    """How many examples are carried through the original together."""
    config: Any = source.model.config.get_text_config()
    # float32, before and after a layer
    one = 2 * 4 * examples.ids_NL.shape[1] * int(config.hidden_size)
    return min(len(examples), max(_BATCH, memory_limit // one))


def _tell(progress: Progress, before: int, total: int, done: int) -> None:
    progress(STAGE, before + done, total)


def _likeliest(source: DiskSource, ids_NL: Tensor, top_k: int, done: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """[N,L,k] log probabilities, float32, and their tokens, int32; the last place of an example predicts nothing."""
    arguments = LayerArguments(source.model, source.layers.paths, source.device)
    batches = ids_NL.split(_BATCH)
    k = min(top_k, source.vocabulary)
    logp_NLk = torch.empty(*ids_NL.shape, k)
    tokens_NLk = torch.empty(*ids_NL.shape, k, dtype=torch.int32)
    with source.ends(head=True), torch.no_grad():
        passed = forwarded(source, arguments, batches, done)
        for row, ids_1L in enumerate(ids_NL.split(1)):
            batch, inside = divmod(row, _BATCH)
            logits_1LV = arguments.logits(ids_1L, of_window(passed[batch], inside, len(batches[batch])))
            found = logits_1LV[0].float().log_softmax(-1).topk(k)
            logp_NLk[row], tokens_NLk[row] = found.values.cpu(), found.indices.int().cpu()
    return logp_NLk, tokens_NLk
