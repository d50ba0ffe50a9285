"""Calibration windows that the model writes itself: text of all that it knows, where there is none or only text of one kind.

Written side by side instead of token by token, which would carry the whole model past every token. A window starts as random
tokens, or as a copy of one of the text's windows. A round carries all of them through the model once, one layer in memory at
a time, and replaces every token by one drawn from the model's prediction at its place, given the tokens before it as they
were. After r rounds the first r tokens after the start are an ordinary sample of the model, and every token is a likely
successor of likely tokens: what layers see in them is close to what they see in text (docs/method.md has what it is worth).
Shape suffixes: N windows, L tokens, P positions of a window, V vocabulary; the rest as in `tensors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from molae_compress.calibration.text import set_aside
from molae_compress.calibration.walk import LayerArguments, has_decoder
from molae_compress.compress import Run
from molae_compress.errors import DataError, ModelError
from molae_compress.evaluation import check_predicts
from molae_compress.recipe.sections import Calibration
from molae_compress.stream import STAGE as HIDDEN
from molae_compress.stream import ResidualStream, observed, return_memory

STAGE = "text"  # of the work directory
FOLLOWS_FROM = ("calibration.seed", "calibration.self_generated", "calibration.batch_size")  # beside tokens and model
ROUNDS = 2
_SHARE = 8  # one window in so many beside those of the text
_POSITIONS = 128  # whose predictions are in memory at a time, where the model can be asked for some of them
_SPECIAL = re.compile(r".*_token_(id|ids|index)")  # of a configuration: marks of images and the like
_END_OF_TEXT = "eos_token_id"  # which stands between documents
_REMEDY = "Set `calibration.self_generated: 0`, and give text."


def wanted(section: Calibration, text: int, asked: int) -> tuple[int, int]:
    """Windows that a model is to write: those that start as windows of the text, and as random tokens.

    Args:
        section: of the recipe.
        text: windows that the text has.
        asked: windows that it was to have.
    """
    lacking = max(0, asked - text) if text else 0
    if section.self_generated == "auto":
        return lacking, asked // _SHARE if text else 0
    return min(lacking, section.self_generated), max(0, section.self_generated - lacking)


def begin_windows(run: Run, text_NL: Tensor | None, asked: int) -> None:
    """Makes the windows of a run: those that the model is to write (`write_windows`), as they start, and the text's.

    The text's come last, where windows measure instead of being fitted on; what is written does not start from these. A
    single one comes first.

    Args:
        run: with a calibration section.
        text_NL: token ids; None without text.
        asked: windows that the text was to have.

    Raises:
        DataError: there is neither text nor a number of windows to write.
        ModelError: the recipe gives a number, and the model predicts no next token.
    """
    section, model = run.recipe.calibration, run.source.model
    assert section is not None
    text = 0 if text_NL is None else len(text_NL)
    after, free = wanted(section, text, asked)
    if not text and not free:
        raise DataError(
            "There is no calibration text: neither `calibration.data` nor data handed over.",
            remedy="Name a text file or dataset, set `calibration.self_generated` to a number of windows that the model "
            "writes itself, or leave `calibration` out.",
        )
    if after + free:
        try:
            check_writes(model)
        except ModelError as error:
            if section.self_generated != "auto":
                raise
            run.notes += (f"The model wrote no calibration text of its own. {error.what}",)
            after = free = 0
    parts = []
    if after:
        assert text_NL is not None
        starts_NL = text_NL[: max(1, text - set_aside(text))].cpu()
        parts.append(starts_NL[torch.arange(after) % len(starts_NL)])
    if free:
        length = section.sequence_length if text_NL is None else text_NL.shape[1]
        chance = torch.Generator().manual_seed(section.seed)
        ordinary_V = _ordinary(model)
        parts.append(ordinary_V[torch.randint(len(ordinary_V), (free, length), generator=chance)])
    if text_NL is not None:
        parts.insert(0 if text == 1 else len(parts), text_NL.cpu())
    first = int(text == 1)
    run.windows_NL = torch.cat(parts)
    run.written, run.unwritten = range(first, first + after + free), after + free > 0


def write_windows(run: Run) -> None:
    """Has the model write the windows that `begin_windows` began; they replace their beginnings.

    A killed run goes on with the round, and within it the layer, that it was at.

    Raises:
        ModelError: the model predicts something that is no probability, or no tokens.
    """
    if not run.unwritten:
        return
    assert run.windows_NL is not None
    before, after = run.windows_NL[: run.written.start], run.windows_NL[run.written.stop :]
    ids_NL = run.windows_NL[run.written.start : run.written.stop]
    for number in range(1, ROUNDS + 1):
        item = f"round-{number}"
        if run.work is not None and item in run.work.done(STAGE):
            ids_NL = run.work.load(STAGE, item)[0]["ids"]
            continue
        ids_NL = _round(run, ids_NL, number)
        if run.work is not None:
            run.work.commit(STAGE, item, {"ids": ids_NL}, {})
            run.work.discard(HIDDEN)
    run.windows_NL, run.unwritten = torch.cat([before, ids_NL, after]), False


def check_writes(model: Any) -> None:
    """Raises `ModelError` unless a model predicts each token from those before it."""
    check_predicts(model)
    if has_decoder(model):
        raise ModelError(
            f"{type(model).__name__} reads a text beside the one that it writes.",
            why="What it is to write would be shown to it.",
            remedy=_REMEDY,
        )
    if model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} names no head that predicts tokens.", remedy=_REMEDY)


def _round(run: Run, ids_NL: Tensor, number: int) -> Tensor:
    """Token ids [N,L] drawn given those of the last round; the first of each window stays."""
    assert run.recipe.calibration is not None
    source, section, layers = run.source, run.recipe.calibration, len(run.source.layers)
    name, limit = f"{STAGE}-{number}", run.memory_limit
    stream = ResidualStream(source, ids_NL, section.batch_size, work=run.work, name=name, memory_limit=limit)
    with torch.no_grad():
        with source.ends(head=False):
            stream.start(layers)
            for layer in range(stream.layer, layers):
                run.progress(STAGE, (number - 1) * layers + layer, ROUNDS * layers)
                _pass_layer(run, stream)
                stream.forget(layer)
                return_memory()
        with source.ends(head=True):
            drawn_NL = _drawn(run, stream, torch.Generator().manual_seed(section.seed + number))
    run.progress(STAGE, number * layers, ROUNDS * layers)
    return drawn_NL


def _pass_layer(run: Run, stream: ResidualStream) -> None:
    """Sends a stream through the layer that it stands before; nothing of the layer outlives the call."""
    source, layer = run.source, stream.layer
    experts = observed(source, [spec for spec in source.specs if source.layers.of(spec.name) == layer], {})
    with source.layer(layer) as module:
        stream.step(module, experts, {})


def _drawn(run: Run, stream: ResidualStream, chance: torch.Generator) -> Tensor:
    """[N,L]: the windows of a stream at its end, every token but the first drawn anew."""
    source = run.source
    arguments = LayerArguments(source.model, source.layers.paths, source.device)
    ordinary_V, windows = _ordinary(source.model), []
    for ids_1L, passed in stream.at_end():
        uniform_P = torch.rand(ids_1L.shape[1] - 1, generator=chance)
        drawn = [ids_1L[0, :1]]
        for start, logits_PV in _predictions(arguments.some_logits(ids_1L, passed, _POSITIONS), ids_1L.shape[1] - 1):
            drawn.append(_draw(logits_PV, uniform_P[start : start + len(logits_PV)], ordinary_V))
            del logits_PV  # or they would stay while the next are made
        windows.append(torch.cat(drawn))
    return torch.stack(windows)


def _predictions(parts: Iterator[Tensor], tokens: int) -> Iterator[tuple[int, Tensor]]:
    """The parts [P,V] of a window's logits on the CPU, each with its first position, but for those of the last token."""
    start = 0
    for part_PV in parts:
        if start < tokens:
            yield start, part_PV[: tokens - start].float().cpu()
        start += len(part_PV)


def _draw(logits_PV: Tensor, uniform_P: Tensor, ordinary_V: Tensor) -> Tensor:
    """[P] int64: one ordinary token each, by the inverse of the distribution function, for one random number each."""
    unlikely_V = torch.full(logits_PV.shape[1:], -torch.inf)
    unlikely_V[ordinary_V] = 0.0
    # on the CPU: sums on a GPU differ from run to run
    summed_PV = logits_PV.add_(unlikely_V).softmax(-1).cumsum_(-1)
    if not summed_PV[:, -1].isfinite().all():
        raise ModelError(
            "The model predicts NaN, so it cannot write calibration text.",
            why="Its weights are damaged, or it does not work in the type it is computed in.",
            remedy=f"Fetch the checkpoint again. {_REMEDY}",
        )
    place_P1 = torch.searchsorted(summed_PV, (uniform_P * summed_PV[:, -1])[:, None], right=True)
    return place_P1[:, 0].clamp_max(int(ordinary_V[-1]))


def _ordinary(model: Any) -> Tensor:
    """[V] int64: the tokens read and predicted that no field of the configuration names as special, and the end of text."""
    named: dict[bool, set[int]] = {True: set(), False: set()}
    for config in _configs(model.config):
        for name, value in vars(config).items():
            if _SPECIAL.fullmatch(name):
                values = value if isinstance(value, (list, tuple)) else [value]
                named[name == _END_OF_TEXT] |= {each for each in values if isinstance(each, int)}
    special = named[False] - named[True]
    rows = min(len(ends.weight) for ends in (model.get_input_embeddings(), model.get_output_embeddings()))
    return torch.tensor([token for token in range(rows) if token not in special], dtype=torch.int64)


def _configs(config: Any) -> tuple[Any, ...]:
    """A configuration, and that of its text model."""
    try:
        return config, config.get_text_config()
    except (AttributeError, ValueError):  # none, or several
        return (config,)
