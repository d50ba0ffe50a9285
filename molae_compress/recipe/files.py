"""Recipe files: where they are found, the strict YAML in which they are written, and sizes with units.

The dialect is safe YAML without repeated keys, in which `1e-3` is a number, as every reader of a recipe expects.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from molae_compress.errors import RecipeError

_FLOAT_TAG = "tag:yaml.org,2002:float"
# YAML 1.1, which PyYAML follows, takes a float without a dot for text.
_DOTLESS_FLOAT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")


# Nothing below the key would mean the same as no such section, which is hardly meant; `null` says that it is.
_MAY_BE_ABSENT = {
    "calibration": "Name text there, or leave the section out for a data-free run.",
    "evaluate": "Name text there, or leave the section out for no evaluation.",
    "finetune": "Say there what to train, or leave the section out for no training.",
}

_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, value_node in node.value:
            if key_node.value in _MAY_BE_ABSENT and value_node.value == "" and not value_node.style:
                raise RecipeError(
                    f"There is nothing below `{key_node.value}:` (line {key_node.start_mark.line + 1} of the recipe).",
                    remedy=_MAY_BE_ABSENT[key_node.value],
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key_node.value}' is there twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


# The dumper must know the same numbers as the loader, or it would write the text "1e5" without quotes.
_Loader.add_implicit_resolver(_FLOAT_TAG, _DOTLESS_FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver(_FLOAT_TAG, _DOTLESS_FLOAT, list("-+0123456789"))


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with the package: name without suffix -> file, sorted by name."""
    package = Path(__file__).parents[1]
    # An installed package holds its recipes; in a checkout they lie beside the package.
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(source: str | Path) -> Path:
    """The file that `source`, a path or the name of a bundled recipe, stands for.

    Raises:
        RecipeError: there is no such file and no such recipe; the message names close matches.
    """
    path = Path(source)
    if path.exists() and not path.is_dir():
        return path
    bundled = bundled_recipes()
    if str(source) in bundled:
        return bundled[str(source)]
    if path.is_dir():
        raise RecipeError(f"'{path}' is a folder, not a recipe.", remedy="Name the .yaml file.")
    beside = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
    matches = [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside)]
    matches += difflib.get_close_matches(path.stem, bundled)
    guess = f"Did you mean {' or '.join(repr(match) for match in matches)}? " if matches else ""
    raise RecipeError(
        f"There is no recipe '{source}'.",
        why="" if path.parent.is_dir() else f"The folder '{path.parent}' does not exist.",
        remedy=f"{guess}Name a file, or one of the recipes that come with the package: {', '.join(bundled)}.",
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a recipe file into a plain mapping, without checking its keys.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8, is empty, is not YAML, repeats a key, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"The recipe '{path}' cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The recipe '{path}' is not UTF-8 (byte {error.start}).", remedy="Save it as UTF-8 text."
        ) from error
    content = _parse(text, f"The recipe '{path}'")
    if content is None:
        raise RecipeError(f"The recipe '{path}' is empty.", remedy="Start with `molae-compress recipe new`.")
    if not isinstance(content, dict):
        raise RecipeError(
            f"The recipe '{path}' holds {_excerpt(content)}, not keys and values.",
            remedy="Its first line should be `molae: 1`.",
        )
    return content


def read_value(text: str, *, of: str) -> Any:
    """The value of `text`, read as YAML; `of` names it in the error."""
    return _parse(text, f"The value of `{of}`")


def write_yaml(content: dict[str, Any]) -> str:
    """`content` as YAML in its own order, one key a line; `read_yaml` reads it back unchanged."""
    # A huge width keeps every value on one line, so that dumps can be compared line by line.
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)


def parse_size(size: int | str) -> int:
    """Bytes in `size`: `5GB` (10^9), `500MB`, `1.5GiB` (2^30), or an integer number of bytes.

    Raises:
        RecipeError: no unit, an unknown unit, or nothing above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(size), flags=re.IGNORECASE)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if isinstance(size, int) and not isinstance(size, bool):
        nbytes = size
    elif isinstance(size, str) and match and match[2].lower() in units:
        nbytes = round(Decimal(match[1]) * units[match[2].lower()])
    else:
        raise RecipeError(
            f"{size!r} is not a size.", remedy=f"Write a number and a unit ({', '.join(_UNITS)}), for example 5GB."
        )
    if nbytes < 1:
        raise RecipeError(f"The size {size!r} is not above zero.")
    return nbytes


def format_size(nbytes: int) -> str:
    """The shortest exact size text of `nbytes` bytes, `5GB` for 5_000_000_000; `parse_size` reads it back."""
    unit, factor = min(((u, f) for u, f in _UNITS.items() if nbytes % f == 0), key=lambda entry: nbytes // entry[1])
    return f"{nbytes // factor}{unit}"


def _parse(text: str, subject: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{subject} is not valid YAML{line}: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{subject} is not valid YAML: {error}.") from error


def _excerpt(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
