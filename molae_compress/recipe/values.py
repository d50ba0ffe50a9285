"""Types of the values in a recipe: what is read, and what its JSON schema says."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from molae_compress.errors import RecipeError
from molae_compress.recipe.files import format_size, parse_size


def _size_field(value: Any) -> int:
    try:
        return parse_size(value)
    except RecipeError as error:
        raise ValueError(error.remedy or error.what) from error


def _entries(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _sources(value: Any) -> Any:
    entries = (value,) if isinstance(value, str) else _entries(value)
    if isinstance(entries, tuple) and not (entries and all(entries)):
        raise ValueError("It names no source of text.")
    return entries


_SIZE_SCHEMA = {"type": ["string", "integer"], "pattern": r"^\d+(\.\d+)? ?[KMGTkmgt]?[iI]?[bB]$", "minimum": 1}
_SOURCES_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Size = Annotated[
    int, BeforeValidator(_size_field), PlainSerializer(format_size, when_used="json"), WithJsonSchema(_SIZE_SCHEMA)
]
Sources = Annotated[tuple[str, ...], BeforeValidator(_sources), WithJsonSchema(_SOURCES_SCHEMA)]
Names = Annotated[tuple[str, ...], BeforeValidator(_entries)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Windows = Annotated[int, Field(ge=0)]
Length = Annotated[int, Field(ge=2)]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Ranks = Annotated[Count | tuple[Count, Count], BeforeValidator(_entries)]
