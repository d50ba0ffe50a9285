"""`recipe`: bundled recipes and the schema."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import click

from molae_compress.cli.command import Verb
from molae_compress.cli.tables import columns
from molae_compress.errors import RecipeError

_DEFAULT = "qwen_moe"


@click.group(short_help="Start a recipe, list those of the package, show the schema.")
def recipe() -> None:
    """Start a recipe, list those that come with the package, show the schema."""


@recipe.command(cls=Verb, example="molae-compress recipe new mixtral --output my.yaml")
@click.argument("name", default=_DEFAULT)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="File to write, instead of standard output.")
def new(name: str, output: Path | None) -> None:
    """Start from a recipe that comes with the package; `recipe list` names them."""
    from molae_compress.recipe import bundled_recipes

    bundled = bundled_recipes()
    if name not in bundled:
        near = difflib.get_close_matches(name, bundled, n=1)
        raise RecipeError(
            f"There is no recipe '{name}'.",
            remedy=f"{f'Did you mean {near[0]!r}? ' if near else ''}There are: {', '.join(bundled)}.",
        )
    text = bundled[name].read_text(encoding="utf-8")
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RecipeError(f"'{output}' is there already.", remedy="Give another --output, or remove it.") from error
    except OSError as error:
        raise RecipeError(f"'{output}' cannot be written ({error.strerror}).", remedy="Give another --output.") from error
    click.echo(f"Wrote {output}. Set `model` in it, then: molae-compress plan {output}", err=True)


@recipe.command("list", cls=Verb, example="molae-compress recipe list")
def list_recipes() -> None:
    """List the recipes that come with the package; their names stand for the files everywhere."""
    from molae_compress.recipe import bundled_recipes

    for line in columns([(name, _first_sentence(path)) for name, path in bundled_recipes().items()]):
        click.echo(line)


@recipe.command(cls=Verb, example="molae-compress recipe schema > recipe.schema.json")
def schema() -> None:
    """Write the JSON schema of recipes, for editors and programs."""
    from molae_compress.recipe import Recipe

    click.echo(json.dumps(Recipe.schema(), indent=2, ensure_ascii=False))


def _first_sentence(path: Path) -> str:
    """Of the comment that every bundled recipe starts with."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").partition(". ")[0].rstrip(".")
