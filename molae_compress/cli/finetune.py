"""`finetune`: training of a compressed model as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from molae_compress.cli import command, tables
from molae_compress.cli.command import Verb
from molae_compress.cli.progress import shown
from molae_compress.errors import QualityGateError


@click.command(
    cls=Verb,
    short_help="Train a compressed model: routers, adapters, latent tensors.",
    example="molae-compress finetune qwen3-molae --recipe healing.yaml --output qwen3-tuned",
)
@command.artifact_argument
@click.option(
    "--recipe", metavar="RECIPE", help="Whose section `finetune` says what to do. The recipe of the model if not given."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe. Repeatable.")
@click.option(
    "--output",
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="Folder to write. If not given, the result takes the place of DIR once it is complete.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to train. auto: a GPU if there is one.",
)
@click.option(
    "--max-memory",
    type=command.Size(),
    metavar="SIZE",
    help="Activations to keep in memory while the original's predictions are made, e.g. 16GB. Half of what is free if "
    "not given.",
)
@click.option(
    "--work-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where checkpoints and the original's predictions are kept meanwhile. A folder beside the output if not given.",
)
@click.option("--fresh", is_flag=True, help="Start over instead of resuming, or train once more.")
@click.option("--finish", is_flag=True, help="Train no further, and write the result of the last checkpoint.")
@command.trust_option
@command.quiet_option
@command.json_option
def finetune(
    folder: Path,
    recipe: str | None,
    overrides: tuple[str, ...],
    output: Path | None,
    quiet: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Train the compressed model in DIR. Run again after an interruption, it goes on after the last checkpoint.

    Routers, adapters or latent tensors are trained, towards the predictions of the original model or on the text itself, and
    the result is a compressed model as before. On several devices: `accelerate launch -m molae_compress finetune ...`. Exit
    code 3 says that the result is complete but fails the recipe's `gate`.
    """
    import molae_compress as molae
    from molae_compress.report.report import RECIPE

    command.calm_libraries(quiet=quiet)
    molae.Report.load(folder)
    asked = molae.Recipe.load(folder / RECIPE if recipe is None else recipe, overrides)
    try:
        with shown(quiet=quiet) as progress:
            report = molae.finetune(folder, asked, output, progress=progress, **where)
    except QualityGateError:
        _show(molae.Report.load(output or folder), output or folder, as_json)
        raise
    _show(report, output or folder, as_json)


def _show(report: Any, folder: Path, as_json: bool) -> None:
    if as_json:
        command.write_json(report.to_dict())
        return
    last = report.finetuned[-1]
    rows = [("trained", ", ".join(name for names in last["trained"].values() for name in names))]
    rows += [("steps", f"{last['steps']:,}"), ("tokens", f"{last['tokens']:,}")]
    if last["loss_before"] is not None:
        rows.append(("loss per token on examples set aside", f"{last['loss_before']:.4g} -> {last['loss_after']:.4g}"))
    for line in tables.columns(rows):
        click.echo(line)
    click.echo()
    tables.show_report(report)
    click.echo(f"\nWrote {folder}")
