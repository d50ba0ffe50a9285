"""What all verbs share: how they fail, the options that several of them take, and how JSON is written.

Nothing heavy is imported at the head of any file of the command line, only inside the functions that need it.
"""

from __future__ import annotations

import errno
import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from molae_compress.errors import MolaeError, QualityGateError, RecipeError

_VERBOSE = "molae_compress.verbose"
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Failure(click.ClickException):
    """What the user sees of an error: a message on standard error, and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


class Verb(click.Command):
    """A command that also takes `-v`, and ends its help with an example."""

    def __init__(self, *args: Any, example: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.epilog, self.example = f"\b\nExample:\n  {example}", example
        self.params.append(_verbose_option())


class Verbs(click.Group):
    """The whole command: verbs in the order of their use, and every error turned into a message."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_verbose_option())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the verbs, in the order in which they were added."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a verb; raises `Failure` for what goes wrong in it."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except MolaeError as error:
            message = "\n".join(part for part in (f"{error.what} {error.why}".strip(), error.remedy) if part)
            raise _failure(ctx, error, message, exit_code=3 if isinstance(error, QualityGateError) else 1) from error
        except KeyboardInterrupt as error:
            after = {"apply": "finished layer", "expand": "finished layer", "finetune": "checkpoint"}.get(
                str(ctx.invoked_subcommand)
            )
            again = f" Run the same command again, it goes on after the last {after}." if after else ""
            message = f"Interrupted.{again}"
            raise _failure(ctx, error, message, exit_code=_INTERRUPTED) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of our output went away; click ends quietly
            message = f"Unexpected {type(error).__name__}: {error}"
            again = "" if ctx.meta.get(_VERBOSE) else "\nRun again with -v to see where it comes from, and report it."
            raise _failure(ctx, error, message + again, exit_code=1) from error


def _failure(ctx: click.Context, error: BaseException, message: str, *, exit_code: int) -> Failure:
    if ctx.meta.get(_VERBOSE):
        click.echo("".join(traceback.format_exception(error)), err=True)
    return Failure(message, exit_code)


def _verbose_option() -> click.Option:
    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta[_VERBOSE] = True  # shared by a command and the verbs below it

    help_text = "Show where an error comes from."
    return click.Option(["-v", "--verbose"], is_flag=True, expose_value=False, callback=remember, help=help_text)


def show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Callback of `--version`."""
    if value and not ctx.resilient_parsing:
        from molae_compress import __version__

        click.echo(f"molae-compress {__version__}")
        ctx.exit()


class Size(click.ParamType[int]):
    """Bytes with a unit: `16GB`, `512MiB`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; fails as wrong usage if `value` is no size."""
        from molae_compress.recipe import parse_size

        try:
            return parse_size(value)
        except RecipeError as error:
            self.fail(str(error), param, ctx)


Decorator = Callable[[Callable[..., None]], Callable[..., None]]

json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress.")
trust_option = click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with the model. Read it first.")
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute, one layer at a time. auto: a GPU if there is one.",
)
work_dir_option = click.option(
    "--work-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where finished layers wait, so that a run can resume. A folder beside the output if not given.",
)
memory_option = click.option(
    "--max-memory",
    type=Size(),
    metavar="SIZE",
    help="Calibration activations to keep in memory, e.g. 16GB; the rest goes to disk. Half of what is free if not given.",
)


artifact_argument = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """The argument RECIPE, and the options that change values of it."""
    options: list[Decorator] = [
        click.argument("recipe"),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe. Repeatable."
        ),
        click.option("--model", metavar="MODEL", help="Folder or hub id, instead of the recipe's model."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def overrides_with_model(overrides: tuple[str, ...], model: str | None) -> list[str]:
    """Overrides for `Recipe.load`, the model among them."""
    # In quotes: a folder may have a name that YAML takes for a number.
    return [*overrides, *([f"model={json.dumps(model)}"] if model is not None else [])]


def write_json(content: Mapping[str, Any]) -> None:
    """Writes `content` to standard output; figures that are not finite become null."""
    from molae_compress.report.report import plain

    click.echo(json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False))


def calm_libraries(*, quiet: bool) -> None:
    """Keeps the progress bars of transformers out of ours, and with `quiet` also those of downloads."""
    import transformers.utils.logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    transformers.utils.logging.disable_progress_bar()
    if quiet:
        disable_progress_bars()
