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
from typing import Any

import torch
from torch import Tensor, nn

from molae_compress.calibration.walk import LayerArguments
from molae_compress.compress import Run
from molae_compress.errors import DataError, ModelError, MolaeError
from molae_compress.evaluation import check_predicts, predicted
from molae_compress.recipe.sections import Calibration
from molae_compress.stream import STAGE as HIDDEN
from molae_compress.stream import ResidualStream, observed

STAGE = "generate"  # of the work directory
ROUNDS = 2
_SHARE = 8  # one window in so many beside those of the text
_POSITIONS = 256  # drawn at a time
_SPECIAL = re.compile(r".*_token_(id|ids|index)")  # of a configuration: marks of images and the like
_END_OF_TEXT = "eos_token_id"  # which stands between documents


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
    """Makes the windows of a run: those that the model is to write (`write_windows`), as they start, before the text's.

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
    after, free = wanted(section, 0 if text_NL is None else len(text_NL), asked)
    if text_NL is None and not free:
        raise DataError(
            "There is no calibration text: neither `calibration.data` nor data handed over.",
            remedy="Name a text file or dataset, set `calibration.self_generated` to a number of windows that the model "
            "writes itself, or leave `calibration` out.",
        )
    if after + free:
        try:
            _check_writes(model)
        except MolaeError:
            if section.self_generated != "auto":
                raise
            after = free = 0
    length = section.sequence_length if text_NL is None else text_NL.shape[1]
    parts = [] if text_NL is None else [text_NL]
    if free:
        chance = torch.Generator().manual_seed(section.seed)
        ordinary_V = _ordinary(model)
        parts.insert(0, ordinary_V[torch.randint(len(ordinary_V), (free, length), generator=chance)])
    if after:
        assert text_NL is not None
        parts.insert(0, text_NL[torch.arange(after) % len(text_NL)])
    run.windows_NL, run.generated, run.unwritten = torch.cat(parts), after + free, after + free > 0


def write_windows(run: Run) -> None:
    """Has the model write the windows that `begin_windows` began; they replace their beginnings.

    A killed run goes on with the round, and within it the layer, that it was at.

    Raises:
        ModelError: the model predicts something that is no probability, or no tokens.
    """
    if not run.unwritten:
        return
    assert run.windows_NL is not None
    begun_NL, text_NL = run.windows_NL[: run.generated], run.windows_NL[run.generated :]
    for number in range(1, ROUNDS + 1):
        item = f"round-{number}"
        if run.work is not None and item in run.work.done(STAGE):
            begun_NL = run.work.load(STAGE, item)[0]["ids"]
            continue
        begun_NL = _round(run, begun_NL, number)
        if run.work is not None:
            run.work.commit(STAGE, item, {"ids": begun_NL}, {})
    if run.work is not None:
        run.work.discard(HIDDEN)
    run.windows_NL, run.unwritten = torch.cat([begun_NL, text_NL]), False


def _round(run: Run, ids_NL: Tensor, number: int) -> Tensor:
    """Token ids [N,L] drawn given those of the last round; the first of each window stays."""
    assert run.recipe.calibration is not None
    source, section, layers = run.source, run.recipe.calibration, run.source.layers.paths
    done = (number - 1) * len(layers)
    stream = ResidualStream(
        source,
        ids_NL,
        section.batch_size,
        work=run.work,
        name=f"{STAGE}-{number}",
        memory_limit=run.memory_limit,
    )
    with torch.no_grad():
        with source.ends(head=False):
            stream.start(len(layers))
            for layer in range(stream.layer, len(layers)):
                run.progress(STAGE, done + layer, ROUNDS * len(layers))
                here = [spec for spec in source.specs if source.layers.of(spec.name) == layer]
                experts = observed(source, here, {})
                with source.layer(layer) as module:
                    stream.step(module, experts, {})
                stream.forget(layer)
        with source.ends(head=True):
            drawn_NL = _drawn(run, stream, torch.Generator().manual_seed(section.seed + number))
    run.progress(STAGE, done + len(layers), ROUNDS * len(layers))
    return drawn_NL


def _drawn(run: Run, stream: ResidualStream, chance: torch.Generator) -> Tensor:
    """[N,L]: the windows of a stream at its end, every token but the first drawn anew."""
    source = run.source
    arguments = LayerArguments(source.model, source.layers.paths, source.device)
    allowed_V = _ordinary(source.model).to(source.device)
    windows = []
    # a window at a time: logits of a large vocabulary take far more memory than hidden states
    for ids_1L, passed in stream.at_end():
        logits_PV = predicted(arguments, ids_1L, passed)
        allowed_V = allowed_V[allowed_V < logits_PV.shape[1]]
        uniform_P = torch.rand(len(logits_PV), generator=chance).to(source.device)
        parts = zip(logits_PV.split(_POSITIONS), uniform_P.split(_POSITIONS), strict=True)
        drawn_P = torch.cat([_draw(part_PV.float(), part_P, allowed_V) for part_PV, part_P in parts])
        windows.append(torch.cat([ids_1L[0, :1], drawn_P.cpu()]))
    return torch.stack(windows)


def _draw(logits_PV: Tensor, uniform_P: Tensor, allowed_V: Tensor) -> Tensor:
    """[P] int64: one allowed token each, by the inverse of the distribution function, for one random number each."""
    summed_PV = logits_PV[:, allowed_V].softmax(-1).cumsum(-1)
    if not summed_PV[:, -1].isfinite().all():
        raise ModelError(
            "The model predicts NaN, so it cannot write calibration text.",
            why="Its weights are damaged, or it does not work in the type it is computed in.",
            remedy="Fetch the checkpoint again, or set `calibration.self_generated: 0`.",
        )
    place_P1 = torch.searchsorted(summed_PV, (uniform_P * summed_PV[:, -1])[:, None], right=True)
    return allowed_V[place_P1[:, 0].clamp_max(len(allowed_V) - 1)]


def _check_writes(model: nn.Module) -> None:
    """Raises `ModelError` unless a model predicts the next token."""
    check_predicts(model)
    embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if embeddings is None:
        raise ModelError(
            f"{type(model).__name__} has no head that predicts tokens, so it cannot write calibration text.",
            remedy="Set `calibration.self_generated: 0`, and give text.",
        )


def _ordinary(model: Any) -> Tensor:
    """[V] int64: the tokens with an embedding that no field of the configuration names as special, and the end of text."""
    named: dict[bool, set[int]] = {True: set(), False: set()}
    for config in (model.config, model.config.get_text_config()):
        for name, value in vars(config).items():
            if _SPECIAL.fullmatch(name):
                values = value if isinstance(value, (list, tuple)) else [value]
                named[name == _END_OF_TEXT] |= {each for each in values if isinstance(each, int)}
    special = named[False] - named[True]
    rows = int(model.get_input_embeddings().weight.shape[0])
    return torch.tensor([token for token in range(rows) if token not in special], dtype=torch.int64)
