"""`serve`: the server of transformers, in a process that knows latent experts."""

from __future__ import annotations

from pathlib import Path

import click

from molae_compress.cli import command
from molae_compress.cli.command import Verb
from molae_compress.errors import ModelError


@click.command(
    cls=Verb,
    short_help="Answer OpenAI-style requests with a compressed model (transformers serve).",
    example="molae-compress serve qwen3-molae --port 8000",
    context_settings={"ignore_unknown_options": True},
)
@command.artifact_argument
@click.option("--host", default="localhost", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF transformers serve]...")
def serve(folder: Path, host: str, port: int, options: tuple[str, ...]) -> None:
    """Run `transformers serve` with the compressed model in DIR: completions and chat over HTTP, until interrupted.

    All other options are passed on: `--device`, `--dtype`, `--continuous-batching` and the rest that `transformers serve
    --help` names. `transformers serve` alone does not know compressed models. For many requests at once vLLM is the better
    server.
    """
    from transformers.utils.import_utils import is_serve_available

    import molae_compress as molae

    if not is_serve_available():
        raise ModelError(
            "The server of transformers needs packages that are not installed.",
            remedy="Install them with `pip install 'molae-compress[serve]'`.",
        )
    molae.Report.load(folder)
    # A Typer application, and as such a plain function from the words of a command line.
    from transformers.cli.transformers import app

    app(["serve", str(folder), "--host", host, "--port", str(port), *options], prog_name="transformers")
