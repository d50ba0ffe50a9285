"""Models from scratch: any supported family with latent experts of random weights, to be trained instead of compressed.

The dense model is built first, as transformers builds it, and its experts are replaced one module at a time: everything that
is no expert is then initialised by the family's own rules, and the latent experts follow the scales of the dense ones
(`modeling.initial`). For a moment this takes the memory of the dense model.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import PretrainedConfig, PreTrainedModel

from molae_compress.adapters.keys import KeyMap
from molae_compress.adapters.skeleton import drop_quantization_
from molae_compress.artifact import check_names, check_together, copy_companions, is_artifact
from molae_compress.budget import Shapes, ranks_of, shapes_for
from molae_compress.checkpoint import check_free_space, check_output_folder, check_place, put_at, write_file
from molae_compress.checkpoint.source import resolve_model
from molae_compress.checkpoint.writer import disk_errors
from molae_compress.compress import Run
from molae_compress.configuration import configuration, dense_model
from molae_compress.errors import ModelError, RecipeError, ResumeError
from molae_compress.layouts import dense_experts, weight_names
from molae_compress.modeling.initial import random_tensors
from molae_compress.modeling.latent import check_shape
from molae_compress.modeling.quantizer import METHOD, MolaeConfig, attach_
from molae_compress.planning import LIBRARIES, Plan
from molae_compress.proof import check_called_singly
from molae_compress.recipe import Recipe
from molae_compress.recipe.sections import SECTIONS, Basis, Budget, Init
from molae_compress.report import LayerReport, Report, file_hashes, installed_versions, scratch_card
from molae_compress.report.report import RECIPE
from molae_compress.source import LiveSource, chosen
from molae_compress.summary import plan_of

_FLAT = {name: section.place for section in (Basis, Budget, Init) for name in section.model_fields}


def from_config(
    config: str | Path | PretrainedConfig,
    *,
    molae: str | Path | Recipe | Mapping[str, Any] | None = None,
    seed: int | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    **values: Any,
) -> PreTrainedModel:
    """A model with randomly initialised latent experts, to be trained from scratch.

    Everything that is no routed expert is as `AutoModelForCausalLM.from_config` makes it, with the same seed number for
    number. `save_pretrained` writes a model that loads, exports and expands like a compressed one.

    Args:
        config: a model type of transformers (`qwen3_moe`), a folder or hub id with a `config.json`, or a configuration.
        molae: the form of the experts: keys of the sections `basis`, `budget` and `init` of a recipe, of `method` and
            `ignore`, without their sections (`{"rank": 64, "profile": "serving"}`); or a recipe, of which the form alone is
            taken, not `init.config` and `init.seed`. May be absent where the configuration is that of a model with latent
            experts, whose form is then built again.
        seed: of all random weights; by default torch's generator goes on where it is.
        dtype: of the weights; by default that of the configuration, else float32.
        trust_remote_code: allow code from the model folder.
        values: of the configuration, by the names that transformers gives them.

    Raises:
        RecipeError: no form, an unknown key of it or of the configuration, or ranks that do not fit.
        ModelError: the family has no routed experts, or ones that cannot be latent.
    """
    found = configuration(config, values, trust_remote_code=trust_remote_code)
    kept = _shapes_in(found)
    drop_quantization_(found)
    recipe = None if molae is None and kept else as_recipe(molae, found)
    wanted = _dtype(dtype, recipe, found)
    with _seeded(seed):
        model = dense_model(found, wanted, trust_remote_code=trust_remote_code)
        source = LiveSource.of(model)
        shapes = kept if recipe is None else shapes_in(source, recipe)
        _check(source, shapes)
        for name, shape in shapes.items():
            if shape is not None:
                spec = next(spec for spec in source.specs if spec.name == name)
                attach_(model, {name: (shape, random_tensors(dense_experts(model, spec), shape))})
    return model


def build(recipe: Recipe, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a recipe with an `init` section; raises as `from_config`."""
    config = _configuration_of(recipe, trust_remote_code)
    return from_config(config, molae=recipe, seed=recipe_init(recipe).seed, trust_remote_code=trust_remote_code)


def init(
    recipe: str | Path | Recipe | Mapping[str, Any],
    out: str | Path,
    *,
    fresh: bool = False,
    trust_remote_code: bool = False,
) -> Report:
    """Writes the model of a recipe with an `init` section as a model folder, random weights, report and card included.

    Args:
        recipe: which model, in which form.
        out: folder to write; it appears when it is complete.
        fresh: replace an artifact at `out`.
        trust_remote_code: allow code from the folder of `model`.

    Raises:
        RecipeError, ModelError: as `from_config`.
        CheckpointError, ResumeError: the folder cannot be written, or holds something.
    """
    out, recipe = Path(out).expanduser().resolve(), Recipe.load(recipe)
    recipe_init(recipe)
    check_output_folder(out, ours=is_artifact)
    if is_artifact(out) and not fresh:
        raise ResumeError(
            f"'{out}' holds a model already.",
            why="Replacing it silently would lose it, and what it has learned.",
            remedy="Use --fresh to replace it, or another --output.",
        )
    source = configuration_folder(recipe)
    if source is not None:
        check_place(out, "output folder", source.resolve(), ours=is_artifact)
    plan = plan_from_scratch(recipe, trust_remote_code=trust_remote_code)
    check_free_space(out.parent, plan.disk_bytes, "the model")
    model = build(recipe, trust_remote_code=trust_remote_code)

    def write(folder: Path) -> Report:
        with disk_errors(folder):
            model.save_pretrained(folder, max_shard_size=recipe.output.max_shard_size)
        if source is not None:
            copy_companions(folder, source)
        report = report_for(model, recipe)
        write_file(folder / RECIPE, recipe.dump().encode())
        write_file(folder / "README.md", scratch_card(report).encode())
        report = replace(report, files=file_hashes(folder))
        report.save(folder)
        return report

    staging = out.with_name(f".{out.name}.partial")
    return put_at(out, staging, lambda: write(staging))


def plan_from_scratch(recipe: Recipe, *, trust_remote_code: bool = False) -> Plan:
    """What the model of a recipe with an `init` section will be, beside its dense twin; nothing is allocated."""
    init, config = recipe_init(recipe), _configuration_of(recipe, trust_remote_code)
    drop_quantization_(config)
    with torch.device("meta"):
        model = dense_model(config, _dtype(None, recipe, config), trust_remote_code=trust_remote_code)
    source = LiveSource.of(model)
    shapes = shapes_in(source, recipe)
    _check(source, shapes, called=False)
    return _plan(source, recipe, shapes, recipe.model or init.model_type)


def report_for(model: PreTrainedModel, recipe: Recipe | None = None) -> Report:
    """The report of a model with latent experts that no run has written, for `Report.save` beside its weights.

    With it `verify` can prove the folder, after training too.

    Args:
        model: as `from_config` makes it; its weights are not looked at.
        recipe: by which it was made; by default one that says its form alone.

    Raises:
        ModelError: the model holds no latent experts.
    """
    config = copy.deepcopy(model.config)
    shapes = _shapes_in(config)
    if not shapes:
        raise ModelError(
            f"{type(model).__name__} holds no latent experts, so there is nothing to report.",
            remedy="Give a model that `from_config` made.",
        )
    drop_quantization_(config)
    with torch.device("meta"):
        source = LiveSource.of(cast(PreTrainedModel, type(model)._from_config(config, dtype=model.dtype)))
    recipe = recipe or Recipe.load({"molae": 1, "init": {"model_type": config.model_type}})
    plan = _plan(source, recipe, shapes, recipe.model or recipe_init(recipe).model_type)
    return Report(
        model=plan.model,
        recipe=yaml.safe_load(recipe.dump()),
        recipe_fingerprint=recipe.fingerprint(),
        plan=plan.to_dict(),
        layers=tuple(
            LayerReport(layer.name, layer.shape.to_dict() if layer.shape is not None else None) for layer in plan.layers
        ),
        calibration=None,
        evaluation=None,
        warnings=plan.warnings(),
        versions=installed_versions(),
        timings={},
        resumed=0,
        inputs={},
        files={},
        source={"fingerprint": "", "bytes": plan.source_bytes},
        artifact={"bytes": plan.artifact_bytes},
    )


def recipe_init(recipe: Recipe) -> Init:
    """The `init` section of a recipe; raises `RecipeError` without one."""
    if recipe.init is None:
        raise RecipeError(
            "The recipe has no `init` section.",
            why="It compresses a model instead of starting one.",
            remedy="Add `init: {model_type: qwen3_moe}`, or `init: {}` for the configuration of `model`; or use `apply`.",
        )
    return recipe.init


def configuration_folder(recipe: Recipe) -> Path | None:
    """The folder of the model whose configuration a recipe takes; None if it names a model type."""
    return None if recipe.model is None else resolve_model(recipe.model, revision=recipe.revision, weights=False)


def as_recipe(molae: str | Path | Recipe | Mapping[str, Any] | None, config: PretrainedConfig) -> Recipe:
    """The recipe that the argument `molae` of `from_config` stands for."""
    if molae is None:
        raise RecipeError(
            "`molae` says which form the experts take, and it is missing.",
            remedy='Give for example molae={"rank": 64}, or a recipe.',
        )
    if isinstance(molae, Mapping) and "molae" not in molae:
        data: dict[str, Any] = {"molae": 1, "init": {}}
        for key, value in molae.items():
            if key in ("method", "ignore"):
                data[key] = value
            elif key in ("model_type", "config", "seed") or key not in _FLAT:
                raise _unknown_flat(key)
            else:
                data.setdefault(_FLAT[key], {})[key] = value
        data["init"]["model_type"] = config.model_type
        return Recipe.load(data)
    recipe = Recipe.load(molae)
    recipe_init(recipe)
    return recipe


def shapes_in(source: LiveSource, recipe: Recipe) -> Shapes:
    """Latent shapes of every module that the recipe does not leave dense: its own ranks, or those of the budget."""
    init = recipe_init(recipe)
    specs = chosen(source.specs, recipe)
    shapes: Shapes = {}
    for entry, asked in init.ranks.items():
        pattern = entry.removeprefix("re:") if entry.startswith("re:") else re.escape(entry)
        matched = [spec for spec in specs if re.fullmatch(pattern, spec.name)]
        if not matched:
            near = difflib.get_close_matches(entry, [spec.name for spec in specs], n=1)
            raise RecipeError(
                f"`init.ranks` names '{entry}', which matches no experts module that becomes latent.",
                why=f"The modules are {specs[0].name} … {specs[-1].name}.",
                remedy=f"Did you mean '{near[0]}'?"
                if near
                else "Give a module name, or `re:` and a pattern for whole names.",
            )
        for spec in matched:
            shapes[spec.name] = ranks_of(recipe, spec, asked if isinstance(asked, tuple) else (asked, asked))
            check_shape(spec, cast(Any, shapes[spec.name]))
    rest = [spec for spec in specs if spec.name not in shapes]
    if rest:
        dense_bytes = {spec.name: source.expert_bytes(spec) for spec in specs}
        copied = source.nbytes() - sum(dense_bytes[spec.name] for spec in rest)
        dtypes = {spec.name: source.dtype(spec) for spec in rest}
        shapes |= shapes_for(recipe, rest, dtypes=dtypes, dense_bytes=dense_bytes, copied_bytes=copied)
    if not any(shapes.values()):
        raise RecipeError(
            "No experts module would be smaller in this form than dense.",
            remedy="Use a smaller budget, or share bases over other groups of experts.",
        )
    return {spec.name: shapes[spec.name] for spec in specs}


def _plan(source: LiveSource, recipe: Recipe, shapes: Shapes, name: str | None) -> Plan:
    plan = plan_of(Run(recipe, source, None), shapes, model=name, measured=True)
    largest = max(layer.bytes for layer in plan.layers)
    return replace(
        plan, memory_bytes=LIBRARIES + plan.source_bytes + 2 * largest, disk_bytes=plan.artifact_bytes, activation_bytes=0
    )


def _check(source: LiveSource, shapes: Shapes, *, called: bool = True) -> None:
    """Refuses forms that the model's class could not hold, load or call."""
    model = source.model
    names = [spec.name for spec in source.specs]
    if strangers := sorted(shapes.keys() - set(names)):
        raise ModelError(
            f"{type(model).__name__} holds no routed experts at '{strangers[0]}'.",
            why="The configuration's list of latent modules is that of another model.",
            remedy="Give `molae`, or the configuration that was written with the weights.",
        )
    for spec in source.specs:
        if (shape := shapes.get(spec.name)) is not None:
            check_shape(spec, shape)
    keys = KeyMap(model, ())
    check_names(keys, source.specs, shapes)
    check_together({name: keys.collected(weight_names(model, name)) for name in names}, shapes)
    if called:
        model.eval()
        check_called_singly(source, shapes)
        model.train()


def _configuration_of(recipe: Recipe, trust: bool) -> PretrainedConfig:
    init, folder = recipe_init(recipe), configuration_folder(recipe)
    where = init.model_type if folder is None else folder
    assert where is not None
    return configuration(where, init.config, trust_remote_code=trust)


def _shapes_in(config: PretrainedConfig) -> Shapes:
    """The latent shapes that a configuration names; none where it is dense."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get("quant_method") == METHOD:
        quantization = MolaeConfig(**quantization)
    return dict(quantization.shapes()) if isinstance(quantization, MolaeConfig) else {}


def _dtype(asked: torch.dtype | str | None, recipe: Recipe | None, config: PretrainedConfig) -> torch.dtype:
    if asked is None and recipe is not None and recipe.output.dtype != "auto":
        asked = recipe.output.dtype
    asked = asked or config.dtype or torch.float32
    return getattr(torch, asked) if isinstance(asked, str) else asked


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers of a seed inside, and those of before afterwards; without a seed nothing."""
    if seed is None:
        yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # it is set on all of them
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _unknown_flat(key: str) -> RecipeError:
    known: Sequence[str] = sorted({*_FLAT, "method", "ignore"} - {"model_type", "config", "seed"})
    near = difflib.get_close_matches(key, known, n=1)
    if key in SECTIONS:
        remedy = f"Write the keys of `{key}` themselves, or a whole recipe, which starts with `molae: 1`."
    else:
        remedy = f"Did you mean `{near[0]}`?" if near else f"It takes {', '.join(known)}."
    return RecipeError(f"`{key}` says nothing about the form of latent experts.", remedy=remedy)
