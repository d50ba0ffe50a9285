"""A recipe applied to a checkpoint on disk: plan it, run it, write the artifact and its report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import transformers
import yaml
from torch import Tensor

from molae_compress.adapters.skeleton import code_fingerprint
from molae_compress.adapters.unknown import routed_experts_among
from molae_compress.artifact import (
    NO_ROUTERS,
    check_names,
    is_artifact,
    own_keys,
    replaced_keys,
    write_companions,
    write_weights,
)
from molae_compress.budget import Shapes
from molae_compress.calibration.text import data_fingerprint, read_texts, token_fingerprint, token_windows
from molae_compress.checkpoint import (
    WorkDirectory,
    check_free_space,
    check_output_folder,
    check_place,
    check_places,
    put_at,
    write_file,
)
from molae_compress.checkpoint.writer import disk_errors
from molae_compress.compress import OBSERVE, SOLVE, Progress, Run, silent
from molae_compress.conditions import check_gate, check_room, clear_finished, finished
from molae_compress.errors import RecipeError
from molae_compress.evaluation import check_predicts, evaluate_as
from molae_compress.finetuning import finetune
from molae_compress.generation import FOLLOWS_FROM, begin_windows, write_windows
from molae_compress.generation import STAGE as TEXT
from molae_compress.modeling.quantizer import installed_version
from molae_compress.planning import Plan
from molae_compress.prediction import Prediction
from molae_compress.probes import STAGE as PROBE
from molae_compress.probes import check_max_kl, final_shapes, measured_plan
from molae_compress.proof import check_called_singly
from molae_compress.ranks import bank_count
from molae_compress.recipe import Recipe
from molae_compress.recipe.files import format_size
from molae_compress.recipe.sections import Calibration, Evaluate
from molae_compress.report import Report, file_hashes, model_card
from molae_compress.routers import STAGE as ROUTERS
from molae_compress.routers import Trained, check_windows, heal_routers, routers_of, trainable_routers
from molae_compress.scratch import plan_from_scratch
from molae_compress.source import DiskSource, check_tokens, choose_device, load_tokenizer
from molae_compress.stream import STAGE as HIDDEN
from molae_compress.summary import plan_of, summarise
from molae_compress.tuning.inputs import check_before


def plan(
    recipe: str | Path | Recipe | Mapping[str, Any],
    *,
    measured: bool = False,
    work_dir: str | Path | None = None,
    device: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """What `run` would do, from the model's config and the headers of its files alone, or measured.

    Args:
        recipe: what to do; must name a model.
        measured: observe the model layer by layer, fit every layer at three budgets for trial, and show the ranks that `run`
            would choose, with a prediction of their quality and of that of other budgets.
        work_dir: where that is kept: `run` goes on from it at any budget, and nothing in it is measured again. By default it
            is thrown away.
        device, max_memory, progress: as for `run`.
        trust_remote_code: allow code from the model folder.

    Raises:
        RecipeError, ModelError, CheckpointError: whatever `run` would refuse before it reads a weight.
        ResumeError: the work directory is that of another model, text or way of fitting, or holds an unfinished run.
    """
    recipe = Recipe.load(recipe)
    if recipe.init is not None:
        if measured:
            raise RecipeError("A model from scratch has nothing to measure.", remedy="Plan it without --measured.")
        return plan_from_scratch(recipe, trust_remote_code=trust_remote_code)
    job = _Job.open(recipe, device, max_memory, trust_remote_code)
    if not measured:
        return job.plan(job.run.expected_shapes(job.copied_bytes()), measured=not job.run.needs_spectra())
    job.run.progress = progress or silent
    expected = job.checked()
    check_called_singly(job.source, expected)
    with ExitStack() as stack:
        if work_dir is None:
            path = Path(stack.enter_context(TemporaryDirectory(prefix="molae-plan-")))
        else:
            path = Path(work_dir).expanduser().resolve()
            check_place(path, "work directory", job.source.folder.resolve(), ours=is_artifact)
        check_free_space(path, 2 * job.plan(expected, measured=False).activation_bytes, "the work directory")
        job.run.work = stack.enter_context(WorkDirectory.open(path, stage_inputs=job.stage_inputs()))
        write_windows(job.run)
        return measured_plan(job.run, job.copied_bytes(), model=str(job.recipe.model))


def run(
    recipe: str | Path | Recipe | Mapping[str, Any],
    out: str | Path,
    *,
    work_dir: str | Path | None = None,
    fresh: bool = False,
    device: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compresses a checkpoint into an artifact folder, one layer in memory at a time.

    Killed at any moment, the same call goes on after the last finished layer and ends with the same files.

    Args:
        recipe: what to do; must name a model.
        out: folder to write; it appears when it is complete.
        work_dir: where finished layers and measured spectra are kept meanwhile; `<out>.work` by default, removed at the
            end. One given here is kept, without the layers, so that another budget needs no new measurement.
        fresh: start over instead of resuming, and replace an artifact at `out`.
        device: `auto`, `cpu`, `cuda` or another torch device.
        max_memory: bytes of calibration activations that may stay in memory; half of what is free by default.
        trust_remote_code: allow code from the model folder.
        progress: called with a stage, what is done of it, and of how much.

    Returns:
        the report that also lies in the folder.

    Raises:
        MolaeError: see `molae_compress.errors`; nothing that looks finished is left behind.
        QualityGateError: the artifact is complete but fails the recipe's gate.
    """
    out, recipe = Path(out).expanduser().resolve(), Recipe.load(recipe)
    path = Path(work_dir).expanduser().resolve() if work_dir is not None else out.with_name(f"{out.name}.work")
    check_output_folder(out, ours=is_artifact)
    job = _Job.open(recipe, device, max_memory, trust_remote_code)
    check_places(out, path, job.source.folder.resolve(), ours=is_artifact)
    job.run.progress = progress or silent
    expected = job.checked()
    if not fresh and is_artifact(out):
        report = finished(out, recipe, job.stage_inputs()[ROUTERS])
        return job.finetuned(report, out, fresh=fresh)
    check_room(out, path, job.plan(expected, measured=False))
    check_called_singly(job.source, expected)
    check_max_kl(job.run)
    routers = job.routers()
    check_before(recipe, job.source, expected, trust_remote_code=trust_remote_code)
    with WorkDirectory.open(path, stage_inputs=job.stage_inputs(), fresh=fresh, reusable=(TEXT, OBSERVE, PROBE)) as work:
        job.run.work = work
        job.resumed = len(work.done(OBSERVE)) + len(work.done(SOLVE))
        with job.timed("text"):
            write_windows(job.run)
        with job.timed("observe"):
            shapes, job.prediction = final_shapes(job.run, job.copied_bytes())
            replaced_keys(job.source, shapes)  # measured ranks may have left another set of modules dense
        with job.timed("solve"):
            job.run.solve_layers(shapes)
        if routers:
            with job.timed("routers"):
                job.trained = heal_routers(job.run, shapes, routers)
        # beside the result, so that it gets there by a rename also if the work directory lies on another disk
        # and named after that directory, whose lock so covers it
        staging = out.with_name(f".{out.name}.{hashlib.sha256(str(path).encode()).hexdigest()[:8]}.partial")
        report = put_at(out, staging, lambda: job.write(staging, shapes))
        if work_dir is None:
            work.remove()
        else:
            work.discard(SOLVE)
            work.discard(ROUTERS)
    return job.finetuned(report, out, fresh=fresh)


@dataclass
class _Job:
    """A recipe, the checkpoint it names, and what is read before the first layer."""

    recipe: Recipe
    source: DiskSource
    run: Run
    trust_remote_code: bool
    started: float = field(default_factory=time.monotonic)
    data_sha256: str = ""
    tokens_sha256: str = ""
    resumed: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    trained: Trained | None = None
    prediction: Prediction | None = None

    @classmethod
    def open(cls, recipe: Recipe, device: str, max_memory: int | None, trust_remote_code: bool) -> _Job:
        if recipe.init is not None:
            raise RecipeError(
                "The recipe has an `init` section: it starts a model from random weights instead of compressing one.",
                remedy="Use `molae-compress init`, or remove `init`.",
            )
        if recipe.model is None:
            raise RecipeError("The recipe names no model.", remedy="Add `model:`, or use compress_ on a model in memory.")
        source = DiskSource.open(
            recipe.model,
            revision=recipe.revision,
            device=choose_device(device),
            trust_remote_code=trust_remote_code,
        )
        target = recipe.budget.target_size
        if target is not None and source.nbytes() <= target:
            raise RecipeError(
                f"`budget.target_size: {format_size(target)}` is not below the {source.nbytes():,} bytes that the model has "
                "already.",
                remedy="Give a smaller size.",
            )
        limit = max_memory if max_memory is not None else psutil.virtual_memory().available // 2
        return cls(recipe, source, Run(recipe, source, None, memory_limit=limit), trust_remote_code)

    def checked(self) -> Shapes:
        """What is known of the shapes, once everything has been refused that can be before a weight is read."""
        shapes = self.run.expected_shapes(self.copied_bytes())
        check_names(self.source.keys, self.source.specs, shapes)
        replaced_keys(self.source, shapes)
        self.read_texts()
        return shapes

    def read_texts(self) -> None:
        """Reads and tokenises the calibration text; that of the evaluation too, to find it wanting before the work."""
        calibration, held_out = self.recipe.calibration, self.recipe.evaluate
        if calibration is not None:
            windows_NL = None
            if calibration.data is not None:
                texts = read_texts(calibration.data, calibration.column)
                windows_NL = self._windows(texts, calibration.data, calibration, calibration.seed)
                self.data_sha256 = data_fingerprint(texts)
            begin_windows(self.run, windows_NL, calibration.samples)
            assert self.run.windows_NL is not None
            self.tokens_sha256 = token_fingerprint(self.run.windows_NL)
        if held_out is not None:
            check_predicts(self.source.model)
            self._windows(read_texts(held_out.data, held_out.column), held_out.data, held_out, None)

    def _windows(
        self, texts: list[list[str]], names: Sequence[str], section: Calibration | Evaluate, seed: int | None
    ) -> Tensor:
        windows_NL = token_windows(
            texts,
            load_tokenizer(self.source.folder, trust_remote_code=self.trust_remote_code),
            samples=section.samples,
            sequence_length=section.sequence_length,
            seed=seed,
            names=names,
        )
        check_tokens(windows_NL, self.source.vocabulary)
        return windows_NL

    def routers(self) -> tuple[str, ...]:
        """Parameters that the recipe trains, which all can be trained and written back; none without such a recipe."""
        if not self.recipe.heal.router_steps:
            return ()
        check_windows(self.run)
        own_keys(self.source, routers_of(self.source, self.run.specs), remedy=NO_ROUTERS)
        return trainable_routers(self.source, self.run.specs)

    def copied_bytes(self) -> int:
        """Bytes of the checkpoint that no experts module of the recipe replaces."""
        replaced = {key for spec in self.run.specs for key in self.source.expert_keys(spec)}
        return sum(entry.nbytes for key, entry in self.source.checkpoint.entries.items() if key not in replaced)

    def plan(self, shapes: Shapes, *, measured: bool) -> Plan:
        """Adds up what the shapes mean for this checkpoint."""
        return plan_of(self.run, shapes, model=str(self.recipe.model), measured=measured)

    def stage_inputs(self) -> dict[str, dict[str, str]]:
        """Everything the items of each stage follow from, for the work directory."""
        config = (self.source.folder / "config.json").read_bytes()
        base = {
            "source": self.source.checkpoint.fingerprint(),
            "config": hashlib.sha256(config).hexdigest(),
            "calibration text": self.data_sha256,
            # another tokenizer makes others of the same text; of windows that the model writes, as they begin
            "calibration tokens": self.tokens_sha256,
            "code": code_fingerprint(self.source.folder, self.source.model),
            "molae_compress": installed_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": self.source.device.type,
        }
        keys = dict(_flat("", yaml.safe_load(self.recipe.dump())))
        after = ("evaluate", "finetune", "gate", "output.max")
        keys = {key: value for key, value in keys.items() if not key.startswith(after)}
        observed = {key: value for key, value in keys.items() if not key.startswith(("budget", "refit", "heal", "output"))}
        # who shares a basis is measured with the spectra, for recipes that go by them
        observed |= {key: keys[key] for key in ("refit.shrinkage", "budget.allocate")}
        observed["budget.banks: 1"] = str(bank_count(self.recipe) == 1)  # then output bases may be shared too
        solved = {key: value for key, value in keys.items() if key != "heal.router_steps"}
        tried = ("refit", "heal.block_steps", "output.dtype", "budget.align", "budget.allocate", "budget.banks")
        probed = observed | {key: value for key, value in keys.items() if key.startswith(tried)}
        return {
            TEXT: base | {key: keys[key] for key in keys if key in FOLLOWS_FROM},
            OBSERVE: base | observed,
            PROBE: base | probed,
            SOLVE: base | solved,
            ROUTERS: base | keys,
            HIDDEN: base | (solved if self.recipe.refit.sequential else observed),
        }

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the time of a stage to the timings."""
        started = time.monotonic()
        yield
        self.timings[stage] = time.monotonic() - started

    def write(self, staging: Path, shapes: Shapes) -> Report:
        """Writes the whole artifact into a new folder, evaluated if the recipe says so; returns its report."""
        assert self.run.work is not None
        with disk_errors(staging):
            staging.mkdir(parents=True)
        with self.timed("write"):
            self.run.progress("write", 0, 1)
            routers = self.trained.tensors if self.trained is not None else None
            shards = write_weights(staging, self.source, shapes, self.run.work, SOLVE, self.recipe, routers)
            planned = self.plan(shapes, measured=True).artifact_bytes
            assert shards.total_size == planned, (shards.total_size, planned)
            write_companions(staging, self.source, shapes, self.recipe)
            self.run.progress("write", 1, 1)
        with self.timed("evaluate"):
            evaluation = evaluate_as(
                self.recipe.evaluate,
                staging,
                against=self.source.folder,
                device=self.source.device,
                trust_remote_code=self.trust_remote_code,
                progress=self.run.progress,
            )
        self.timings["total"] = time.monotonic() - self.started
        report = summarise(
            self.run,
            shapes,
            model=str(self.recipe.model),
            timings=self.timings,
            data_sha256=self.data_sha256,
            evaluation=evaluation,
            source_fingerprint=self.source.checkpoint.fingerprint(),
            unknown=self.source.keys.unknown,
            unknown_experts=routed_experts_among(self.source.keys.unknown, self.source.all_expert_keys()),
            resumed=self.resumed,
            routers=self.trained,
            prediction=self.prediction,
        )
        report = replace(report, inputs=self.stage_inputs()[ROUTERS])
        base_card = self.source.folder / "README.md"
        base_text = base_card.read_text(encoding="utf-8", errors="replace") if base_card.exists() else None
        write_file(staging / "README.md", model_card(report, base_text).encode())
        report = replace(report, files=file_hashes(staging, {file.name: file.sha256 for file in shards.files}))
        report.save(staging)
        return report

    def finetuned(self, report: Report, out: Path, *, fresh: bool) -> Report:
        """The report of the artifact at `out` once it is trained, if the recipe says so, and keeps the recipe's gate.

        The artifact is complete by then: whatever becomes of the training, the compression is there, and the same run goes
        on with the training alone.
        """
        if self.recipe.finetune is None or report.finetuned:
            clear_finished(out)
            check_gate(self.recipe, report)
            return report
        return finetune(
            out,
            self.recipe,
            fresh=fresh,
            device=str(self.source.device),
            max_memory=self.run.memory_limit,
            trust_remote_code=self.trust_remote_code,
            progress=self.run.progress,
        )


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, json.dumps(value)
