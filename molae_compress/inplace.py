"""A model in memory, compressed in place: the step of somebody else's pipeline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molae_compress.adapters.keys import KeyMap
from molae_compress.artifact import check_names, check_together
from molae_compress.calibration.text import as_windows, data_fingerprint, read_texts, token_fingerprint, token_windows
from molae_compress.compress import Progress, Run, silent
from molae_compress.errors import DataError, RecipeError
from molae_compress.generation import begin_windows, write_windows
from molae_compress.layouts import weight_names
from molae_compress.modeling.quantizer import attach_, check_attachable
from molae_compress.probes import check_max_kl, final_shapes
from molae_compress.proof import check_called_singly
from molae_compress.recipe import Recipe
from molae_compress.report import Report
from molae_compress.routers import check_windows, heal_routers, trainable_routers
from molae_compress.source import LiveSource, check_tokens, load_tokenizer
from molae_compress.summary import summarise


def compress_(
    model: PreTrainedModel,
    recipe: str | Path | Recipe | Mapping[str, Any],
    *,
    data: Sequence[str] | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compresses a model in memory, in place; `save_pretrained` then writes an artifact.

    The same fit as `run`, on the model's own device and in its own precision. The model is changed only when everything
    has been solved.

    Args:
        model: a dense transformers model.
        recipe: what to do; `model`, `evaluate` and `gate` are not used.
        data: calibration texts, or token ids [N,L]; otherwise those that `calibration.data` names, and with
            `calibration.self_generated: N` none are needed. Token ids count as all the text that was asked for: `auto` adds
            an eighth to them. With a recipe without `calibration` there are none, and the fit is data-free.
        tokenizer: for texts; otherwise that of `model.name_or_path`.
        progress: called with a stage, what is done of it, and of how much.

    Returns:
        the report, for `Report.save`.

    Raises:
        MolaeError: as `run`; the model is then unchanged.
    """
    recipe = Recipe.load(recipe)
    if recipe.init is not None:
        raise RecipeError("The recipe has an `init` section, and the model is there.", remedy="Remove it.")
    if recipe.budget.target_size is not None:
        raise RecipeError("`budget.target_size` is the size of a folder on disk.", remedy="Use `budget.keep` in memory.")
    if data is not None and recipe.calibration is None:
        raise RecipeError("There is calibration data, but the recipe is data-free.", remedy="Add a `calibration` section.")
    started = time.monotonic()
    source = LiveSource.of(model)
    check_attachable(model, [spec.name for spec in source.specs])
    text_NL, data_sha256 = _windows(recipe, model, data, tokenizer)
    run = Run(recipe, source, None, progress=progress or silent)
    if recipe.calibration is not None:
        # as many token ids as were wanted, unless the recipe says how many the model is to add
        asked = recipe.calibration.samples
        if isinstance(data, Tensor) and recipe.calibration.self_generated == "auto":
            asked = len(data)
        begin_windows(run, text_NL, asked)
    was_training = model.training
    model.eval()
    try:
        check_max_kl(run)
        check_called_singly(source, run.expected_shapes())
        if recipe.heal.router_steps:
            check_windows(run)
        trainable = trainable_routers(source, run.specs) if recipe.heal.router_steps else ()
        write_windows(run)
        shapes, prediction = final_shapes(run)
        keys = KeyMap(model, ())
        check_names(keys, run.specs, shapes)
        check_together({spec.name: keys.collected(weight_names(model, spec.name)) for spec in source.specs}, shapes)
        run.solve_layers(shapes)
        trained = heal_routers(run, shapes, trainable) if trainable else None
    finally:
        model.train(was_training)
    timings = {"total": time.monotonic() - started}
    report = summarise(
        run,
        shapes,
        model=model.name_or_path or None,
        timings=timings,
        data_sha256=data_sha256,
        routers=trained,
        prediction=prediction,
    )
    solved = {name: shape for name, shape in shapes.items() if shape is not None}
    attach_(model, {name: (shape, run.finished[name].tensors) for name, shape in solved.items()})
    with torch.no_grad():
        for name, tensor in (trained.tensors if trained is not None else {}).items():
            model.get_parameter(name).copy_(tensor)
    return report


def _windows(
    recipe: Recipe,
    model: PreTrainedModel,
    data: Sequence[str] | Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[Tensor | None, str]:
    """Tokens of the calibration text, and its sha256 (that of the token ids where these were handed over)."""
    section = recipe.calibration
    if section is None:
        return None, ""
    if data is None and section.data is None:
        return None, ""
    if tokenizer is None and not isinstance(data, Tensor):
        if not model.name_or_path:
            raise DataError("There is no tokenizer for the texts.", remedy="Pass `tokenizer`, or token ids as `data`.")
        tokenizer = load_tokenizer(model.name_or_path)
    settings: dict[str, Any] = {
        "samples": section.samples,
        "sequence_length": section.sequence_length,
        "seed": section.seed,
    }
    if data is not None:
        windows_NL = as_windows(data, tokenizer, **settings)
        sha256 = data_fingerprint([data]) if not isinstance(data, Tensor) else token_fingerprint(windows_NL)
    else:
        assert section.data is not None
        assert tokenizer is not None
        texts = read_texts(section.data, section.column)
        windows_NL, sha256 = token_windows(texts, tokenizer, **settings, names=section.data), data_fingerprint(texts)
    embedding: Any = model.get_input_embeddings()
    check_tokens(windows_NL, embedding.weight.shape[0])
    return windows_NL, sha256
