"""One cell: a fit, and the whole compressed model against the original on text that took no part in it.

KL, perplexity and agreement are those of whole models; err_h is measured layer by layer on the same text, at the
original's own hidden states.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import molae_compress as molae
from baselines import BASELINES, Setting
from molae_compress.adapters import find_experts, layers_with_experts
from molae_compress.calibration.text import data_fingerprint, token_windows
from molae_compress.generation import wanted
from molae_compress.recipe.sections import Calibration

from .cells import ROOT, Cell, Protocol, Study
from .texts import read

BATCH = 8


def model_folder(study: Study, model: Path | None) -> Path:
    return ROOT / study.model if study.model else model or Path()


def text_fingerprints(study: Study, data: Path | None) -> dict[str, str]:
    """SHA-256 of every text of a study, by its name."""
    names = dict.fromkeys([*(name for names in study.calibrations.values() for name in names), *study.texts])
    return {name: data_fingerprint([read(name, data)]) for name in names}


class Bench:
    """A study opened: its model, its texts, and what is measured on them."""

    def __init__(self, study: Study, protocol: Protocol, model: Path | None = None, data: Path | None = None) -> None:
        self.study, self.protocol, self.data = study, protocol, data
        folder = model_folder(study, model)
        self.dtype = str(AutoConfig.from_pretrained(folder).dtype or torch.bfloat16).removeprefix("torch.")
        self.original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.specs = find_experts(self.original)
        self.dense_parameters = sum(spec.dense_numel for spec in self.specs)
        self.held_out = {name: self._windows((name,), protocol.evaluation_samples, None) for name in study.texts}

    def _windows(self, sources: tuple[str, ...], samples: int, seed: int | None) -> Tensor:
        texts, length = [read(source, self.data) for source in sources], self.protocol.sequence_length
        return token_windows(texts, self.tokenizer, samples=samples, sequence_length=length, seed=seed, names=sources)

    def row(self, cell: Cell) -> dict[str, Any]:
        """The figures of a cell, those of its best recipe if it has several; or why there are none."""
        sources = self.study.calibrations[cell.calibration] if cell.calibration else ()
        windows_NL = self._windows(sources, cell.samples, cell.seed) if sources else None
        found: list[dict[str, Any]] = []
        reason = ""
        for recipe in cell.recipes or (None,):
            try:
                done = self._baseline(cell, windows_NL) if recipe is None else self._ours(cell, recipe, windows_NL)
                found.append(done)
            except molae.MolaeError as error:
                reason = str(error)
        named = {**vars(cell), "recipes": list(cell.recipes)}
        return named | (min(found, key=lambda row: self._home_kl(row)) if found else {"impossible": reason})

    def _home_kl(self, row: dict[str, Any]) -> float:
        return sum(row["texts"][name]["kl"] for name in self.study.home) / len(self.study.home)

    def _ours(self, cell: Cell, recipe: str, windows_NL: Tensor | None) -> dict[str, Any]:
        model = copy.deepcopy(self.original)
        asked = self.protocol.samples
        calibration: dict[str, Any] = {"samples": asked, "seed": cell.seed, "sequence_length": self.protocol.sequence_length}
        if 0 < cell.samples < asked:  # what a text file as short as that is added to
            text = Calibration(data=("text",), samples=asked)
            calibration["self_generated"] = sum(wanted(text, cell.samples, asked))
        # at equal size, whatever it costs in operations: those are a table of their own
        budget = {"keep": cell.keep, "max_flops": None}
        base = {"molae": 1, "calibration": calibration, "output": {"dtype": self.dtype}, "budget": budget}
        loaded = molae.Recipe.load(base, overrides=recipe.split())
        started = time.process_time()
        report = molae.compress_(model, loaded, data=windows_NL)
        seconds = time.process_time() - started
        work = {key: report.plan[key] for key in ("dense_flops", "flops", "active_bytes")}
        return {**self._measured(model, report.plan["parameters"], seconds), **work}

    def _baseline(self, cell: Cell, windows_NL: Tensor | None) -> dict[str, Any]:
        model = copy.deepcopy(self.original)
        setting = Setting(cell.keep, getattr(torch, self.dtype), seed=cell.seed, steps=cell.steps)
        unused_NL = torch.zeros(0, self.protocol.sequence_length, dtype=torch.int64)
        started = time.process_time()
        stored = BASELINES[cell.method][1](model, unused_NL if windows_NL is None else windows_NL, setting)
        return self._measured(model, stored, time.process_time() - started)

    def _measured(self, model: PreTrainedModel, parameters: int, seconds: float) -> dict[str, Any]:
        found = {name: compare(self.original, model, ids, self._names()) for name, ids in self.held_out.items()}
        by_layer = [found[name].pop("layers") for name in self.study.texts if name in self.study.home]
        return {
            "parameters": parameters,
            "share": _short(parameters / self.dense_parameters),
            "fit_seconds": _short(seconds),
            "texts": {
                name: {key: _short(value) for key, value in row.items() if key != "layers"} for name, row in found.items()
            },
            "layers": [_short(sum(part) / len(part)) for part in zip(*by_layer, strict=True)],
        }

    def _names(self) -> list[str]:
        return [spec.name for spec in self.specs]


def compare(original: PreTrainedModel, model: PreTrainedModel, windows_NL: Tensor, names: list[str]) -> dict[str, Any]:
    """Whole models against each other on windows [N,L], and err_h of the experts modules `names`."""
    sums_4 = torch.zeros(4, dtype=torch.float64)
    with torch.no_grad(), _error_of_experts(original, model, names) as errors:
        for ids_BL in windows_NL.split(BATCH):
            exact = original(input_ids=ids_BL).logits[:, :-1].log_softmax(-1)
            found = model(input_ids=ids_BL).logits[:, :-1].log_softmax(-1)
            next_BL1 = ids_BL[:, 1:, None]
            kl = (exact.exp() * (exact - found)).sum(-1)
            nll, exact_nll = -found.gather(-1, next_BL1), -exact.gather(-1, next_BL1)
            same = found.argmax(-1) == exact.argmax(-1)
            sums_4 += torch.stack([part.double().sum() for part in (kl, nll, exact_nll, same)])
    kl, nll, exact_nll, same = (sums_4 / (windows_NL.numel() - len(windows_NL))).tolist()
    layers = [errors[name] / windows_NL.numel() for name in names]
    return {
        "kl": kl,
        "perplexity": math.exp(nll),
        "original_perplexity": math.exp(exact_nll),
        "top1": same,
        "err_h": sum(layers),
        "layers": layers,
    }


@contextmanager
def _error_of_experts(original: PreTrainedModel, model: PreTrainedModel, names: list[str]) -> Iterator[dict[str, float]]:
    """While open, every forward of the original adds |dy|^2 / |h|^2, summed over its tokens, for each module.

    The block around the experts, router included, gets the very arguments the original one got; h is the residual
    stream after the layer.
    """
    layers = layers_with_experts(original)
    errors = dict.fromkeys(names, 0.0)
    changes: dict[str, Tensor] = {}

    def block_done(block: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        changes[block] = (_tokens(model.get_submodule(block)(*args, **kwargs)) - _tokens(out)).double().square().sum(1)

    def layer_done(name: str, block: str, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        errors[name] += float((changes.pop(block) / _tokens(out).double().square().sum(1)).sum())

    hooks = []
    for name in names:
        block = name.rpartition(".")[0]
        layer = original.get_submodule(layers.paths[layers.of(name)])
        hooks.append(original.get_submodule(block).register_forward_hook(partial(block_done, block), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(layer_done, name, block)))
    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(out: Any) -> Tensor:
    """[T,H]: the hidden states among what a module returns."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden.flatten(0, -2)


def _short(value: float) -> float:
    return float(f"{value:.6g}")
