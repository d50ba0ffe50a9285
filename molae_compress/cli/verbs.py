"""The verbs that work on models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from molae_compress.cli import command, tables
from molae_compress.cli.progress import shown
from molae_compress.errors import CheckpointError, QualityGateError

verb = partial(click.command, cls=command.Verb)


@verb(short_help="Show the routed experts of a model.", example="molae-compress inspect Qwen/Qwen3-30B-A3B")
@click.argument("model")
@command.trust_option
@command.json_option
def inspect(model: str, trust_remote_code: bool, as_json: bool) -> None:
    """Show which routed experts MODEL has, and what a run would leave alone. Reads no weights."""
    from molae_compress.inspection import inspect as look

    command.calm_libraries(quiet=False)
    found = look(model, trust_remote_code=trust_remote_code)
    command.write_json(found.to_dict()) if as_json else tables.show_inspection(found)


@verb(
    short_help="Show what a recipe would do, and how good the result would be.",
    example="molae-compress plan qwen_moe --set budget.keep=0.5",
)
@command.recipe_options
@click.option("--measured", is_flag=True, help="Read the model and its calibration text, and predict quality.")
@command.device_option
@command.memory_option
@click.option(
    "--work-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where measurements are kept, for `apply` to go on from. Thrown away if not given.",
)
@command.trust_option
@command.quiet_option
@command.json_option
def plan(
    recipe: str,
    overrides: tuple[str, ...],
    model: str | None,
    quiet: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Show what RECIPE would do: ranks, sizes, and what the run needs. Reads no weights unless --measured.

    RECIPE is a file, or the name of a recipe that comes with the package. With --measured the ranks are those that `apply`
    would choose, and the quality of this and of other budgets is predicted; what was measured is kept in the work directory,
    if one is given, where `apply` finds it.
    """
    import molae_compress as molae

    if where["work_dir"] is not None and not where["measured"]:
        raise click.UsageError("--work-dir is where measurements are kept, and without --measured there are none.")
    command.calm_libraries(quiet=quiet)
    asked = molae.Recipe.load(recipe, command.overrides_with_model(overrides, model))
    with shown(quiet=quiet or not where["measured"]) as progress:
        found = molae.plan(asked, progress=progress, **where)
    command.write_json(found.to_dict()) if as_json else click.echo(str(found))


@verb(
    short_help="Compress the model of a recipe into a new folder.",
    example="molae-compress apply my.yaml --output qwen3-molae --max-memory 16GB",
)
@command.recipe_options
@click.option("--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write.")
@command.device_option
@command.memory_option
@command.work_dir_option
@click.option("--fresh", is_flag=True, help="Start over instead of resuming, and replace an earlier result.")
@command.trust_option
@command.quiet_option
@command.json_option
def apply(
    recipe: str,
    overrides: tuple[str, ...],
    model: str | None,
    output: Path,
    quiet: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Compress the model of RECIPE into a new folder. Run again after an interruption, it goes on where it stopped.

    RECIPE is a file, or the name of a recipe that comes with the package. Exit code 3 says that the result is complete
    but fails the recipe's `gate`.
    """
    import molae_compress as molae
    from molae_compress.artifact import is_artifact

    command.calm_libraries(quiet=quiet)
    asked = molae.Recipe.load(recipe, command.overrides_with_model(overrides, model))
    done = f"{output} is already there" if is_artifact(output.expanduser()) and not where["fresh"] else f"Wrote {output}"
    try:
        with shown(quiet=quiet) as progress:
            report = molae.run(asked, output, progress=progress, **where)
    except QualityGateError:
        _show_result(molae.Report.load(output), done, as_json)
        raise
    _show_result(report, done, as_json)


@verb(
    short_help="Start a model with latent experts from random weights.",
    example="molae-compress init scratch --output untrained --set init.config.hidden_size=512",
)
@command.recipe_options
@click.option("--output", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--fresh", is_flag=True, help="Replace an earlier result.")
@command.trust_option
@command.quiet_option
@command.json_option
def init(
    recipe: str, overrides: tuple[str, ...], model: str | None, output: Path, quiet: bool, as_json: bool, **where: Any
) -> None:
    """Write the model of RECIPE with random latent experts, to be trained from scratch. RECIPE has a section `init`.

    `plan` shows beforehand what it will be. The folder loads, trains, exports and expands like a compressed model.
    """
    import molae_compress as molae
    from molae_compress.scratch import init as write

    command.calm_libraries(quiet=quiet)
    asked = molae.Recipe.load(recipe, command.overrides_with_model(overrides, model))
    report = write(asked, output, **where)
    if as_json:
        command.write_json(report.to_dict())
        return
    plan = report.plan
    click.echo(
        f"{plan['dense_parameters']:,} -> {plan['parameters']:,} parameters in routed experts "
        f"({plan['parameters'] / plan['dense_parameters']:.4f})\nWrote {output}"
    )


@verb(
    short_help="Measure perplexity, and the distance to the original.",
    example="molae-compress evaluate qwen3-molae --against Qwen/Qwen3-30B-A3B --data my.jsonl",
)
@command.artifact_argument
@click.option("--data", multiple=True, metavar="SOURCE", help="Text file, dataset or python-docs:heldout. Repeatable.")
@click.option("--against", metavar="MODEL", help="The original, to measure the distance to it.")
@click.option("--column", help="Column or key that holds the text.  [default: text]")
@click.option("--samples", type=click.IntRange(1), help="Number of token windows.  [default: 64]")
@click.option("--sequence-length", type=click.IntRange(2), help="Tokens per window.  [default: 1024]")
@click.option("--batch-size", type=click.IntRange(1), help="Windows per forward pass.  [default: 8]")
@command.device_option
@command.trust_option
@command.quiet_option
@command.json_option
def evaluate(
    folder: Path,
    against: str | None,
    device: str,
    trust_remote_code: bool,
    quiet: bool,
    as_json: bool,
    **text: Any,
) -> None:
    """Measure perplexity and, with --against, how far the predictions of the model in DIR are from the original's.

    Without --data, the text and the sizes are those that the recipe of DIR evaluates on.
    """
    given = {key: value for key, value in text.items() if value not in (None, ())}
    asked = given if "data" in given else {**_recipe_text(folder), **given}
    import molae_compress as molae

    command.calm_libraries(quiet=quiet)
    with shown(quiet=quiet) as progress:
        found = molae.evaluate(
            folder, against=against, device=device, trust_remote_code=trust_remote_code, progress=progress, **asked
        )
    command.write_json(found.to_dict()) if as_json else tables.show_evaluation(found)


@verb(short_help="Prove that a compressed model is whole and loads.", example="molae-compress verify qwen3-molae")
@command.artifact_argument
@command.trust_option
@command.quiet_option
@command.json_option
def verify(folder: Path, trust_remote_code: bool, quiet: bool, as_json: bool) -> None:
    """Prove that the folder DIR is whole: files, hashes, tensors, and that it loads. Exit code 1 if it is not."""
    import molae_compress as molae

    command.calm_libraries(quiet=quiet)
    with shown(quiet=quiet) as progress:
        found = molae.verify(folder, progress=progress, trust_remote_code=trust_remote_code)
    command.write_json(found.to_dict()) if as_json else tables.show_verification(found)
    if not found.passed:
        failed = ", ".join(check.name for check in found.checks if not check.passed)
        raise CheckpointError(
            f"'{folder}' failed: {failed}.", remedy="Do not use it; copy it again from its origin, or compress again."
        )


@verb(
    short_help="Write a compressed model with dense experts again.", example="molae-compress expand qwen3-molae qwen3-dense"
)
@command.artifact_argument
@click.argument("out", type=click.Path(path_type=Path))
@command.work_dir_option
@click.option("--fresh", is_flag=True, help="Start over instead of resuming.")
@command.trust_option
@command.quiet_option
def expand(folder: Path, out: Path, quiet: bool, **where: Any) -> None:
    """Write the model in DIR with dense experts to OUT, for programs without this package.

    It has the size of the original again, and the quality of the compressed model.
    """
    import molae_compress as molae

    command.calm_libraries(quiet=quiet)
    with shown(quiet=quiet) as progress:
        molae.expand(folder, out, progress=progress, **where)
    click.echo(f"Wrote {out}")


def _show_result(report: Any, done: str, as_json: bool) -> None:
    if as_json:
        command.write_json(report.to_dict())
        return
    tables.show_report(report)
    click.echo(f"\n{done}")


def _recipe_text(folder: Path) -> dict[str, Any]:
    """The `evaluate` section of the recipe that an artifact was made with."""
    from molae_compress.report import Report

    try:
        section = Report.load(folder).recipe.get("evaluate")
    except CheckpointError:
        section = None
    if not section:
        raise click.UsageError(f"The recipe of '{folder}' names no text to evaluate on. Name some with --data.")
    return dict(section)
