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


@recipe.command(cls=Verb)
@click.argument("name", default=_DEFAULT)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="File to write, instead of standard output.")
def new(name: str, output: Path | None) -> None:
    """Start from a recipe that comes with the package; `recipe list` names them.

    \b
    Example:
      molae-compress recipe new mixtral --output my.yaml
    """
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


@recipe.command("list", cls=Verb)
def list_recipes() -> None:
    """List the recipes that come with the package; their names stand for the files everywhere.

    \b
    Example:
      molae-compress recipe list
    """
    from molae_compress.recipe import bundled_recipes

    rows = [
        (name, path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")) for name, path in bundled_recipes().items()
    ]
    for line in columns(rows):
        click.echo(line)


@recipe.command(cls=Verb)
def schema() -> None:
    """Write the JSON schema of recipes, for editors and programs.

    \b
    Example:
      molae-compress recipe schema > recipe.schema.json
    """
    from molae_compress.recipe import Recipe

    click.echo(json.dumps(Recipe.schema(), indent=2, ensure_ascii=False))
