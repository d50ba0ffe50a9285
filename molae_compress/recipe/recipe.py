"""`Recipe` itself: loading, overriding, comparing, and what its sections demand of each other."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from molae_compress.errors import RecipeError
from molae_compress.recipe.files import find_recipe, read_value, read_yaml, write_yaml
from molae_compress.recipe.refusals import Section, exclusive, plain_mapping, show, unknown_key
from molae_compress.recipe.sections import (
    BUDGETS,
    SECTIONS,
    Basis,
    Budget,
    Calibration,
    Evaluate,
    Finetune,
    Gate,
    Heal,
    Init,
    Output,
    Refit,
)
from molae_compress.recipe.values import Names

SCHEMA_VERSION = 1
# What `method: paper` fixes, by section: the procedure as published, so that comparisons mean something.
PAPER: dict[str, dict[str, Any]] = {
    "basis": {
        "profile": "quality",
        "gate_up": "separate",
        "down": "dense",
        "metric": "input",
        "storage": "orthonormal",
    },
    "budget": {"allocate": "uniform"},
    "refit": {"cores": False, "down": False, "newton": 0, "sequential": False},
}


class Recipe(Section):
    """Everything that decides the result of a compression; where and how it runs is said by the command's flags."""

    molae: Literal[1] = Field(description="Version of the recipe schema, the first line of every recipe.")
    model: str | None = Field(
        default=None,
        description="Hub id or folder of the model. May be absent if the model is handed over in Python.",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    method: Literal["latent", "paper"] = Field(
        default="latent",
        description="`latent`: this package's fit. `paper`: the procedure as published, a baseline to compare with: "
        "data-free, separate bases for gate and up, down left dense, uniform ranks, no refit.",
    )
    calibration: Calibration | None = None
    basis: Basis = Basis()
    budget: Budget = Budget()
    refit: Refit = Refit()
    heal: Heal = Heal()
    ignore: Names = Field(
        default=(),
        description="Experts modules that stay dense: names such as `model.layers.0.mlp.experts`, or `re:` and a "
        "regular expression.",
    )
    finetune: Finetune | None = None
    evaluate: Evaluate | None = None
    gate: Gate = Gate()
    output: Output = Output()
    init: Init | None = None

    @classmethod
    def load(cls, source: str | Path | Recipe | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
        """Reads a recipe, replaces single values, and checks the whole.

        Args:
            source: a file, the name of a bundled recipe, a recipe, or a mapping in the shape of the file.
            overrides: `key.path=value`, the value in YAML. A budget replaces the other kinds of budget; later ones win.

        Raises:
            RecipeError: no such file, not YAML, an unknown key, an impossible value, or a contradiction.
        """
        if isinstance(source, Recipe):
            data: dict[str, Any] = source.model_dump()
        elif isinstance(source, Mapping):
            data = copy.deepcopy(dict(source))
        else:
            data = read_yaml(find_recipe(source))
        for override in overrides:
            _override(data, override)
        return cls.model_validate(data)

    def dump(self) -> str:
        """The recipe as canonical YAML: every key, in the order of the schema. `load` reads it back equal."""
        return write_yaml(self.model_dump(mode="json"))

    def fingerprint(self) -> str:
        """SHA-256 of the canonical dump, in hex: equal for recipes that ask for the same."""
        return hashlib.sha256(self.dump().encode()).hexdigest()

    def differences(self, other: Recipe) -> list[str]:
        """What differs in `other`, one line a key: `budget.keep: 0.6 -> 0.5`; empty if nothing does."""
        return list(_differences("", self.model_dump(mode="json"), other.model_dump(mode="json")))

    @classmethod
    def schema(cls) -> dict[str, Any]:  # type: ignore[override]
        """JSON schema (draft 2020-12) of a recipe file, for editors and other programs."""
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}

    @model_validator(mode="before")
    @classmethod
    def _check_version_and_fill_in_paper(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        version = data.get("molae")
        if version is not None and (version != SCHEMA_VERSION or isinstance(version, bool)):
            raise RecipeError(
                f"The recipe is of schema version {version!r}.",
                why=f"This version of molae_compress reads version {SCHEMA_VERSION}.",
                remedy=f"Write `molae: {SCHEMA_VERSION}` if it follows that schema, or install a version that does.",
            )
        return _as_paper(data) if data.get("method") == "paper" else data

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        for pattern in self.ignore:
            _check_pattern("ignore", pattern)
        if self.init is not None:
            self._refuse_what_is_fitted(self.init)
        if self.calibration is not None and self.method == "paper":
            raise exclusive("method: paper", "calibration", "The published procedure is data-free.")
        if self.budget.banks not in ("auto", 1):
            if self.basis.profile == "serving":
                why = "The layer form has one rank for all experts of a layer."
                raise exclusive("basis.profile: serving", f"budget.banks: {self.budget.banks}", why)
            for side in ("input", "output"):
                if getattr(self.basis, f"experts_per_{side}_group") == "all":
                    why = "Experts that share a basis are of one rank."
                    raise exclusive(f"basis.experts_per_{side}_group: all", f"budget.banks: {self.budget.banks}", why)
        if self.calibration is None and self.budget.max_kl is not None:
            raise RecipeError(
                f"`budget.max_kl: {self.budget.max_kl}` needs calibration text, and the recipe has no `calibration`.",
                why="Without text nothing tells what a compressed layer does to predictions.",
                remedy="Add `calibration`, or use `budget.keep`.",
            )
        if self.refit.newton not in ("auto", 0):
            why = "The step fits cores to the expert's own tokens and weighs errors at the experts' outputs."
            if not self.refit.cores:
                raise exclusive("refit.cores: false", f"refit.newton: {self.refit.newton}", why)
            if self.basis.metric == "input":
                raise exclusive("basis.metric: input", f"refit.newton: {self.refit.newton}", why)
        if self.calibration is None and self.refit.sequential:
            raise RecipeError(
                "`refit.sequential: true` needs calibration text, and the recipe has no `calibration`.",
                remedy="Add `calibration`, or remove `refit.sequential`.",
            )
        for key, steps in self.heal.model_dump().items():
            if steps and self.method == "paper":
                raise exclusive("method: paper", f"heal.{key}: {steps}", "The published procedure trains nothing.")
            if steps and self.calibration is None:
                raise RecipeError(
                    f"`heal.{key}: {steps}` needs calibration text, and the recipe has no `calibration`.",
                    remedy=f"Add `calibration`, or remove `heal.{key}`.",
                )
        for key, limit in self.gate.model_dump(exclude_none=True).items():
            if self.evaluate is None:
                raise RecipeError(
                    f"`gate.{key}: {limit}` needs an evaluation, and the recipe has no `evaluate`.",
                    remedy="Add `evaluate` with text that is not in the calibration, or remove `gate`.",
                )
        return self

    def _refuse_what_is_fitted(self, init: Init) -> None:
        """Refuses in a recipe of a model from scratch what only a compression could heed."""
        for pattern in init.ranks:
            _check_pattern("init.ranks", pattern)
        if (self.model is None) == (init.model_type is None):
            raise RecipeError(
                "A recipe with `init` names either `init.model_type` or `model`, whose configuration is taken.",
                remedy="Remove one of them." if self.model is not None else "Add one of them.",
            )
        why = "A model from scratch has random weights: there is nothing to observe, to fit or to compare with."
        for key in ("calibration", "finetune", "evaluate"):
            if getattr(self, key) is not None:
                raise exclusive("init", key, why)
        for key, plain in (("refit", (Refit(), Refit(**PAPER["refit"]))), ("heal", (Heal(),))):
            if getattr(self, key) not in plain:
                raise exclusive("init", key, why)
        if self.budget.max_kl is not None or self.budget.banks not in ("auto", 1):
            key = "max_kl" if self.budget.max_kl is not None else "banks"
            raise exclusive("init", f"budget.{key}: {getattr(self.budget, key)}", why)


def _as_paper(data: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the values that `method: paper` fixes; a different value in `data` is refused."""
    filled = dict(data)
    for place, fixed in PAPER.items():
        given = plain_mapping(SECTIONS[place], data.get(place, {}))
        for key, value in fixed.items():
            if given.get(key, "auto") not in (value, "auto"):
                raise RecipeError(
                    f"`{place}.{key}: {show(given[key])}` cannot go with `method: paper`.",
                    why=f"The published procedure fixes it to {show(value)}.",
                    remedy=f"Remove `{place}.{key}`, or use `method: latent`.",
                )
        filled[place] = {**given, **fixed}
    return filled


def _check_pattern(key: str, name: str) -> None:
    if name.startswith("re:"):
        try:
            re.compile(name.removeprefix("re:"))
        except re.error as error:
            raise RecipeError(f"`{key}` has '{name}', which is not a regular expression ({error}).") from error


def _override(data: dict[str, Any], override: str) -> None:
    """Sets one value of `data`, as `key.path=value` says."""
    path, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"The override '{override}' has no '='.", remedy="Write key.path=value, as in budget.keep=0.6.")
    place, dot, key = path.strip().partition(".")
    if place not in Recipe.model_fields:
        raise unknown_key(Recipe, place)
    value = read_value(text, of=path.strip())
    if not dot:
        data[place] = value
        return
    section = SECTIONS.get(place)
    if section is None:
        raise RecipeError(f"`{path.strip()}` is not a key of a recipe.", why=f"`{place}` has no keys below it.")
    key, dot, inner = key.partition(".")
    if key not in section.model_fields:
        raise unknown_key(section, key)
    given = plain_mapping(section, data.get(place) or {})
    if dot:
        if not isinstance(section.model_fields[key].default, dict):
            raise RecipeError(f"`{path.strip()}` is not a key of a recipe.", why=f"`{place}.{key}` has no keys below it.")
        value = {**given.get(key, {}), inner: value}
    if place == "budget" and key in BUDGETS and value is not None:
        given = {name: old for name, old in given.items() if name not in BUDGETS}
    data[place] = {**given, key: value}


def _differences(path: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _differences(f"{path}.{key}" if path else key, one.get(key), other.get(key))
    elif one != other:
        yield f"{path}: {show(one)} -> {show(other)}"
