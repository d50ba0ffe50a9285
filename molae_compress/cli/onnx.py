"""`export` and `generate`: models for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from molae_compress.cli import command
from molae_compress.cli.command import Verb
from molae_compress.cli.progress import shown
from molae_compress.cli.tables import columns


@click.group(short_help="Write a model in the format of another runtime.")
def export() -> None:
    """Write a model in the format of another runtime."""


@export.command(cls=Verb, example="molae-compress export onnx qwen3-molae --output qwen3-onnx --dtype float16")
@click.argument("model", metavar="DIR")
@click.option("--output", required=True, metavar="OUT", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--experts",
    type=click.Choice(["molae", "ort-moe", "standard"]),
    default="molae",
    show_default=True,
    help="What experts become: nodes of this package's operator library, ONNX Runtime's own MoE operator, or operators of "
    "the ONNX standard.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of weights and activations.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@command.trust_option
@command.quiet_option
@command.json_option
def onnx(model: str, output: Path, quiet: bool, as_json: bool, **how: Any) -> None:
    """Write the model in DIR, compressed or not, as a folder for ONNX Runtime and onnxruntime-genai.

    At the end its logits are compared with those of torch; where they differ there is no folder, and the exit code is 1.
    """
    from molae_compress.export import export_onnx
    from molae_compress.kernels import has_gpu_kernels

    command.calm_libraries(quiet=quiet)
    with shown(quiet=quiet) as progress:
        found = export_onnx(model, output, progress=progress, **how)
    if as_json:
        command.write_json(found.to_dict())
        return
    rows = [("architecture", found.architecture), ("experts", found.experts), ("dtype", found.dtype)]
    rows += [("nodes", f"{found.nodes:,}"), ("bytes", f"{found.nbytes:,}")]
    rows += [(f"differs from torch ({name})", f"{error:.1e}") for name, error in found.checks.items()]
    for name, error in (found.checks_in_dtype or {}).items():
        rows.append((f"in {found.dtype} ({name})", f"{error:.1e}"))
    for line in columns(rows):
        click.echo(line)
    if found.dtype == "bfloat16":
        click.echo("Checked with float32 arithmetic on the bfloat16 weights: ONNX Runtime computes bfloat16 on GPUs only.")
    if found.library is not None and found.dtype != "float32" and not has_gpu_kernels(output.expanduser() / found.library):
        click.echo(
            "The operator library holds no GPU kernels, so sessions with CUDA refuse this export: run `make gpu-kernels` "
            "and `make kernels` before it, or export with --experts standard."
        )
    click.echo(f"\nWrote {output}")


@click.command(
    cls=Verb,
    short_help="Generate text with an exported model.",
    example='molae-compress generate qwen3-onnx "The capital of France is"',
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="To generate at most.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: a GPU if the runtime finds one.",
)
@command.trust_option
@command.json_option
def generate(folder: Path, prompt: str, max_tokens: int, device: Any, trust_remote_code: bool, as_json: bool) -> None:
    """Continue PROMPT with the exported model in DIR, the likeliest token each time, by onnxruntime-genai."""
    from molae_compress.export import generate as tokens_after
    from molae_compress.source import load_tokenizer

    command.calm_libraries(quiet=True)
    found: list[int] = []
    tokenizer: Any = None
    shown_text = ""
    for token in tokens_after(folder, prompt, max_tokens=max_tokens, device=device, trust_remote_code=trust_remote_code):
        tokenizer = tokenizer or load_tokenizer(folder, trust_remote_code=trust_remote_code)
        found.append(token)
        text = tokenizer.decode(found, skip_special_tokens=True)
        # A character of several tokens is shown once it is whole.
        if not as_json and text.startswith(shown_text) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            click.echo(text[len(shown_text) :], nl=False)
            shown_text = text
    if as_json:
        text = tokenizer.decode(found, skip_special_tokens=True) if found else ""
        command.write_json({"prompt": prompt, "text": text, "tokens": found})
    else:
        click.echo()
