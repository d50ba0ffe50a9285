"""Conditions of a run: room on disk, what may be at its place already, and the limits that its result must keep."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from molae_compress.checkpoint import WorkDirectory, check_free_space
from molae_compress.errors import QualityGateError, ResumeError
from molae_compress.planning import Plan
from molae_compress.recipe import Recipe
from molae_compress.report import Report

WRITTEN = "written"  # item of a training's work directory: the files of its result, since before that got to its place


def check_room(out: Path, work: Path, plan: Plan) -> None:
    """Refuses to start without room for work directory and result, but for what is in the work directory already."""
    there = 0
    for path in work.rglob("*"):
        with suppress(FileNotFoundError):  # another run may be using it, which is refused later
            there += path.stat().st_size
    needed = max(0, plan.disk_bytes - plan.artifact_bytes - there)
    if _disk(out) == _disk(work):
        check_free_space(out.parent, needed + plan.artifact_bytes, "the run")
    else:
        check_free_space(work, needed, "the work directory")
        check_free_space(out.parent, plan.artifact_bytes, "the result")


def _disk(path: Path) -> int:
    return path.stat().st_dev if path.exists() else _disk(path.parent)


def finished(out: Path, recipe: Recipe, inputs: dict[str, str]) -> Report:
    """The report of an artifact that is already there, if it is whole and what this run would make."""
    report = Report.load(out)
    lost = [f"'{name}'" for name in report.files if not (out / name).exists()]
    if lost:
        raise ResumeError(
            f"The artifact '{out}' lacks {', '.join(lost)}.",
            why="It was damaged after it was written.",
            remedy="Use --fresh to make it again, or restore the files.",
        )
    keys = sorted(key for key in inputs.keys() | report.inputs.keys() if inputs.get(key) != report.inputs.get(key))
    found = [f"{key}: {report.inputs.get(key, 'absent')} -> {inputs.get(key, 'absent')}" for key in keys]
    others = ("evaluate", "finetune", "output.max")
    found += [change for change in Recipe.load(report.recipe).differences(recipe) if change.startswith(others)]
    if found:
        raise ResumeError(
            f"'{out}' holds an artifact of another run; there -> now: {'; '.join(found)}.",
            why="Replacing it silently would lose it.",
            remedy="Use --fresh to replace it, or another --output.",
        )
    return report


def check_gate(recipe: Recipe, report: Report) -> None:
    """Raises `QualityGateError` unless the evaluated result keeps the limits of the recipe's gate."""
    found = report.evaluation or {}
    ratio = None
    if found.get("original_perplexity") and found.get("perplexity"):
        ratio = found["perplexity"] / found["original_perplexity"]
    for key, value in {"max_kl": found.get("kl"), "max_perplexity_ratio": ratio}.items():
        limit = getattr(recipe.gate, key)
        if limit is not None and (value is None or not value <= limit):  # not a number fails too
            raise QualityGateError(
                f"`gate.{key}: {limit}` failed: the result has {'no finite value' if value is None else f'{value:.4g}'}.",
                remedy="The artifact is complete; raise the budget, or the limit.",
            )


def clear_finished(out: Path, work_path: Path | None = None, *, keep: bool = False) -> None:
    """Removes the work directory of a training whose result is at `out`: a kill right after its publication leaves it.

    Args:
        out: an artifact.
        work_path: the work directory; by default the one beside it.
        keep: remove its checkpoints alone.
    """
    work = WorkDirectory.left_at(work_path or tuning_work(out))
    if work is None:
        return
    from molae_compress.tuning.trainer import STAGE

    with work:
        written = STAGE in work.stages and WRITTEN in work.done(STAGE)
        if written and work.load(STAGE, WRITTEN)[1]["files"] == Report.load(out).files:
            work.discard(STAGE) if keep else work.remove()


def tuning_work(out: Path) -> Path:
    """Where checkpoints are kept unless another place is given."""
    return out.with_name(f"{out.name}.finetune")
