"""A section of the recipe, and the sentences with which it refuses what it cannot use.

Pydantic checks types and bounds; what it finds is said again in the words of the recipe: key path, value, what is
allowed, and the key or word that was probably meant.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from molae_compress.errors import RecipeError


class Section(BaseModel):
    """A mapping of the recipe; `place` is its key path, empty for the recipe itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    place: ClassVar[str] = ""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_plain_words(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, (Mapping, cls)):
            raise not_a_section(cls, data)
        try:
            return handler(data)
        except ValidationError as error:
            raise _translated(cls, error) from error


def allowed_values(schema: Mapping[str, Any]) -> str:
    """What a JSON schema of one key allows, in words: `auto, all, a whole number of at least 1`."""
    if "anyOf" in schema:
        return ", ".join(allowed_values(choice) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if "pattern" in schema:
        return "a size such as 5GB"
    if schema["type"] == "array":
        return "a list of texts"
    if schema["type"] == "object":
        return "a mapping"
    bounds = " ".join(
        f"{words} {schema[key]:g}"
        for key, words in (("minimum", "of at least"), ("exclusiveMinimum", "above"), ("maximum", "up to"))
        if key in schema
    )
    names = {"string": "text", "boolean": "true, false", "integer": "a whole number", "number": "a number"}
    return f"{names.get(schema['type'], schema['type'])} {bounds}".strip()


def exclusive(one: str, other: str, why: str) -> RecipeError:
    """The refusal of two keys that cannot stand together."""
    return RecipeError(f"`{one}` and `{other}` exclude each other.", why=why, remedy="Remove one of them.")


def not_a_section(section: type[Section], value: Any) -> RecipeError:
    """The refusal of a single value where the keys of `section` belong."""
    subject = f"`{section.place}`" if section.place else "The recipe"
    return RecipeError(
        f"{subject} is `{show(value)}`, not a mapping of keys.",
        why=f"Its keys are {', '.join(section.model_fields)}.",
        remedy="Indent them below it, one a line, or remove it." if section.place else "",
    )


def unknown_key(section: type[Section], key: str) -> RecipeError:
    """The refusal of `key` in `section`, with similar keys there and the same key in other sections."""
    path = f"{section.place}.{key}" if section.place else key
    near = difflib.get_close_matches(key, section.model_fields, n=2)
    guesses = [path.removesuffix(key) + match for match in near]
    guesses += [f"{other.place}.{key}" for other in Section.__subclasses__() if other.place and key in other.model_fields]
    return RecipeError(
        f"`{path}` is not a key of a recipe.",
        why=f"{f'`{section.place}`' if section.place else 'A recipe'} takes {', '.join(section.model_fields)}.",
        remedy=f"Did you mean {' or '.join(f'`{guess}`' for guess in guesses)}?" if guesses else "",
    )


def _translated(section: type[Section], error: ValidationError) -> RecipeError:
    """The first of pydantic's errors as a sentence; an unknown key goes first, it may explain a missing one."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")[0]
    key = str(details["loc"][0])
    if details["type"] in ("extra_forbidden", "invalid_key"):
        return unknown_key(section, key)
    path = f"{section.place}.{key}" if section.place else key
    schema = section.model_json_schema()["properties"][key]
    if details["type"] == "missing":
        return RecipeError(f"`{path}` is missing.", why=schema["description"], remedy=f"Allowed: {allowed_values(schema)}.")
    value = details["input"]
    words = difflib.get_close_matches(str(value), allowed_values(schema).split(", "), n=1)
    if words:
        remedy = f"Did you mean `{words[0]}`?"
    else:
        remedy = "Put it in quotes." if details["type"] == "string_type" and value is not None else ""
    cause = f"{details['ctx']['error']} " if details["type"] == "value_error" else ""
    return RecipeError(
        f"`{path}` cannot be `{show(value)}`.", why=f"{cause}Allowed: {allowed_values(schema)}.", remedy=remedy
    )


def plain_mapping(section: type[Section], value: Any) -> dict[str, Any]:
    """The keys that `value`, a mapping or a `Section`, sets itself, as a new dict."""
    if isinstance(value, Section):
        return value.model_dump(exclude_unset=True)
    if not isinstance(value, Mapping):
        raise not_a_section(section, value)
    return dict(value)


def show(value: Any) -> str:
    """`value` as it would stand in a recipe, on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
