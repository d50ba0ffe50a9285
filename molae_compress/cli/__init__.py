"""The command `molae-compress`: one small function per verb.

Results go to standard output, progress and everything else to standard error. Exit codes: 0 done, 1 an error with its
remedy, 2 wrong usage, 3 a quality gate failed; 130 interrupted.
"""

from __future__ import annotations

import click

from molae_compress.cli.command import Verbs, show_version
from molae_compress.cli.finetune import finetune
from molae_compress.cli.onnx import export, generate
from molae_compress.cli.recipes import recipe
from molae_compress.cli.serve import serve
from molae_compress.cli.verbs import apply, evaluate, expand, init, inspect, plan, verify

__all__ = ["main"]


_START = """\b
Start with:
  molae-compress recipe new --output my.yaml
  molae-compress plan my.yaml
  molae-compress apply my.yaml --output compressed-model"""


@click.group(cls=Verbs, epilog=_START, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=show_version, help="Show the version and exit."
)
def main() -> None:
    """Compress Mixture-of-Experts models into latent experts.

    A recipe says what to do, the flags say where and how.
    """


for _command in (inspect, plan, apply, init, finetune, evaluate, verify, expand, export, generate, serve, recipe):
    main.add_command(_command)
