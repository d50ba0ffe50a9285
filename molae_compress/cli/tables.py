"""Results as plain text, for people: aligned columns that survive a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from molae_compress.errors import human_bytes

if TYPE_CHECKING:
    from molae_compress import Evaluation, Report, Verification
    from molae_compress.inspection import Inspection


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> Iterator[str]:
    """Lines of aligned columns; those numbered in `right` are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def show_inspection(found: Inspection) -> None:
    """What was found in a model."""
    click.echo(f"{found.model}: {found.model_class} ({found.model_type})\n")
    rows: list[Sequence[str]] = [
        ("routed experts", "", "class", "experts", "per token", "hidden", "intermediate", "parameters")
    ]
    for pattern, members in found.by_pattern().items():
        spec = members[0].spec
        sizes = (spec.num_experts, spec.top_k, spec.hidden, spec.intermediate, sum(m.spec.dense_numel for m in members))
        rows.append((pattern, f"x{len(members)}", members[0].class_name, *(f"{size:,}" for size in sizes)))
    for line in columns(rows, right=(1, 3, 4, 5, 6, 7)):
        click.echo(line)
    for line in _rules(found):
        click.echo(line)
    rows = [("left as they are", "", "parameters", "why")]
    rows += [(part.name, f"x{part.modules}", f"{part.parameters:,}", part.reason) for part in found.left_alone]
    click.echo()
    for line in columns(rows, right=(1, 2)):
        click.echo(line)
    if found.unknown_tensors:
        unknown = found.unknown_tensors
        click.echo(f"and {len(unknown)} tensors that the class does not know, such as {unknown[0]}")
    share = found.expert_parameters / found.parameters
    click.echo(f"\nrouted experts hold {found.expert_parameters:,} of {found.parameters:,} parameters ({share:.1%})")
    click.echo(f"and {human_bytes(found.expert_bytes)} of {human_bytes(found.bytes)}")
    if found.quantization is not None:
        click.echo(
            f"the files are quantised with the method {found.quantization} and hold {human_bytes(found.stored_bytes)}: "
            "every such weight is dequantised to bfloat16 when it is read"
        )


def _rules(found: Inspection) -> Iterator[str]:
    """The rule that found the experts, or, where there are several, which rule found which."""
    patterns: dict[str, list[str]] = {}
    for pattern, members in found.by_pattern().items():
        patterns.setdefault(members[0].rule, []).append(pattern)
    for rule, names in patterns.items():
        yield f"found by: {rule}" if len(patterns) == 1 else f"{', '.join(names)} found by: {rule}"


def show_report(report: Report) -> None:
    """What a run changed; its warnings go to standard error."""
    from molae_compress.report.card import comparison

    for line in columns([("", "original", "compressed"), *comparison(report)], right=(1, 2)):
        click.echo(line)
    for warning in report.warnings:
        click.echo(f"Warning: {warning}", err=True)


def show_evaluation(found: Evaluation) -> None:
    """The figures that were measured."""
    rows = [("tokens", f"{found.tokens:,}"), ("perplexity", f"{found.perplexity:.3f}")]
    if found.original_perplexity is not None:
        rows.append(("perplexity of the original", f"{found.original_perplexity:.3f}"))
    if found.kl is not None:
        rows.append(("KL divergence from the original (nats per token)", f"{found.kl:.4g}"))
    if found.top1_agreement is not None:
        rows.append(("same most likely token as the original", f"{found.top1_agreement:.1%}"))
    for line in columns(rows, right=(1,)):
        click.echo(line)


def show_verification(found: Verification) -> None:
    """Every check with its outcome."""
    for line in columns([("ok" if check.passed else "FAILED", check.name, check.detail) for check in found.checks]):
        click.echo(line)
