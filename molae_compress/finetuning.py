"""Fine-tuning of an artifact: the model is trained as a whole, and the result is an artifact like any other.

What is trained goes into the tensors of the artifact that it changes; all others are copied bit for bit. Until the result
is complete the artifact stays as it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers
from torch import Tensor

from molae_compress.artifact import copy_companions, is_artifact, own_keys
from molae_compress.calibration.text import token_fingerprint
from molae_compress.checkpoint import (
    TensorSource,
    WorkDirectory,
    check_free_space,
    check_output_folder,
    check_place,
    put_at,
    write_file,
    write_shards,
)
from molae_compress.checkpoint.writer import disk_errors
from molae_compress.compress import Progress, silent
from molae_compress.conditions import WRITTEN, check_gate, clear_finished, tuning_work
from molae_compress.errors import RecipeError, ResumeError
from molae_compress.evaluation import check_tokenizers, check_vocabulary, evaluate_as
from molae_compress.modeling.quantizer import installed_version
from molae_compress.recipe import Recipe
from molae_compress.recipe.sections import Finetune
from molae_compress.report import Report, file_hashes, model_card
from molae_compress.report.report import RECIPE
from molae_compress.source import DiskSource, choose_device, load_tokenizer
from molae_compress.tuning.examples import Examples
from molae_compress.tuning.inputs import check_installed, check_trainable, examples_for, open_original

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

    from molae_compress.tuning.training import Training
    from molae_compress.tuning.ways import Chosen

_OF_A_CHECKPOINT = 3 * 4  # bytes a trained parameter: itself and two moments, float32
_REMEDY = "Train something else."


def finetune(
    folder: str | Path,
    recipe: str | Path | Recipe | Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    *,
    work_dir: str | Path | None = None,
    fresh: bool = False,
    finish: bool = False,
    device: str = "auto",
    max_memory: int | None = None,
    trust_remote_code: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> Report:
    """Trains an artifact as the section `finetune` of a recipe says, and writes the result as an artifact.

    Killed at any moment, the same call goes on after the last checkpoint; with an unchanged number of devices it ends with
    the same weights. Started by `accelerate launch`, it trains on all of their devices.

    Args:
        folder: the artifact.
        recipe: of which `finetune` is read, and `evaluate` and `gate` if it has them; by default that of the artifact.
        out: folder to write; by default `folder`, whose artifact is then replaced, once the result is complete.
        work_dir: where checkpoints and the original's predictions are kept meanwhile; `<out>.finetune` by default, removed
            at the end. One given here is kept, without the checkpoints.
        fresh: start over instead of going on after a checkpoint, or train again what was trained so already.
        finish: train no further, and write the result of the last checkpoint.
        device: `auto`, `cpu` or `cuda`.
        max_memory: bytes of activations of the original that may be in memory; half of what is free by default.
        trust_remote_code: allow code from the model folders.
        callbacks: for the `Trainer` of transformers.
        progress: called with a stage, what is done of it, and of how much.

    Returns:
        the report that also lies in the folder, with a further entry of `finetuned`.

    Raises:
        MolaeError: see `molae_compress.errors`; the artifact and the last checkpoint stay as they are.
        QualityGateError: the result is complete but fails the recipe's gate.
    """
    folder = Path(folder).expanduser().resolve()
    out = folder if out is None else Path(out).expanduser().resolve()
    work_path = Path(work_dir).expanduser().resolve() if work_dir is not None else tuning_work(out)
    job = _Job.open(folder, recipe, device, trust_remote_code, progress or silent)
    if out != folder:
        check_output_folder(out, ours=is_artifact)
    check_place(work_path, "work directory", out, ours=is_artifact)
    for source in job.read_only(out):
        check_place(out, "output folder", source, ours=is_artifact)
        check_place(work_path, "work directory", source, ours=is_artifact)
    keep = work_dir is not None
    report = job.finished(out) if not fresh and is_artifact(out) else None
    if report is None:
        limit = max_memory if max_memory is not None else psutil.virtual_memory().available // 2
        report = job.run(out, work_path, fresh=fresh, finish=finish, limit=limit, keep=keep, callbacks=callbacks)
    elif job.arguments(work_path).process_index == 0:
        clear_finished(out, work_path, keep=keep)
    check_gate(job.recipe, report)
    return report


@dataclass
class _Job:
    """An artifact, how it is to be trained, and what is read before the first step."""

    folder: Path
    recipe: Recipe
    settings: Finetune
    report: Report
    source: DiskSource
    original: DiskSource | None
    examples: Examples
    data_sha256: str
    chosen: Chosen
    trust_remote_code: bool
    progress: Progress
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def open(
        cls,
        folder: Path,
        recipe: str | Path | Recipe | Mapping[str, Any] | None,
        device: str,
        trust_remote_code: bool,
        progress: Progress,
    ) -> _Job:
        """Refuses all that can be refused before a weight is read."""
        check_installed()
        from molae_compress.tuning.trainer import check_arguments
        from molae_compress.tuning.ways import choose

        report = Report.load(folder)
        asked = Recipe.load(folder / RECIPE if recipe is None else recipe)
        settings = asked.finetune
        if settings is None:
            raise RecipeError(
                "The recipe does not say how to fine-tune: it has no section `finetune`.",
                remedy="Add one, for example `finetune: {latent: all}`; see the recipe reference.",
            )
        check_arguments(settings)
        target = choose_device(device)
        source = DiskSource.open(str(folder), device=target, trust_remote_code=trust_remote_code, dense=False)
        check_trainable(source)
        chosen = choose(source.model, settings)
        own_keys(source, chosen.changed, remedy=_REMEDY)
        examples, texts, sha256 = examples_for(settings, asked, source, trust_remote_code=trust_remote_code)
        original = None
        if settings.kl_weight or asked.evaluate is not None:
            original = open_original(settings, report.model, report.recipe.get("revision"), target, trust_remote_code)
            check_vocabulary(source, original)
            ours, theirs = (load_tokenizer(one.folder, trust_remote_code=trust_remote_code) for one in (source, original))
            check_tokenizers(ours, theirs, texts, f"'{source.folder}' and '{original.folder}'")
        return cls(folder, asked, settings, report, source, original, examples, sha256, chosen, trust_remote_code, progress)

    def read_only(self, out: Path) -> list[Path]:
        """The folders of models that must stay as they are, when the result goes to `out`."""
        folders = [] if out == self.folder else [self.folder]
        return folders if self.original is None else [*folders, self.original.folder.resolve()]

    @cached_property
    def inputs(self) -> dict[str, str]:
        """What the result follows from, besides the artifact."""
        settings = self.settings.model_dump(mode="json", exclude={"checkpoint_steps"})
        original = self.original if self.settings.kl_weight else None
        return {
            **{f"finetune.{key}": json.dumps(value, sort_keys=True) for key, value in settings.items()},
            "data": self.data_sha256,
            "tokens": token_fingerprint(torch.cat([self.examples.ids_NL, self.examples.labels_NL])),
            "original": original.checkpoint.fingerprint() if original is not None else "",
        }

    def finished(self, out: Path) -> Report | None:
        """The report of what this very training has made already; None if there is still to train.

        Raises:
            ResumeError: another result is at its place.
        """
        report = Report.load(out)
        if report.finetuned and report.finetuned[-1]["inputs"] == self.inputs:
            return report
        if out != self.folder:
            raise ResumeError(
                f"'{out}' holds an artifact that was made otherwise.",
                why="Replacing it silently would lose it.",
                remedy="Use --fresh to replace it, or another --output.",
            )
        return None

    def stage_inputs(self) -> dict[str, dict[str, str]]:
        """Everything that what is kept follows from, for the work directory."""
        from molae_compress.tuning.teacher import STAGE as TEACHER
        from molae_compress.tuning.trainer import STAGE

        code = {"molae_compress": installed_version(), "device": self.source.device.type}
        code |= {"torch": torch.__version__, "transformers": transformers.__version__}
        config = hashlib.sha256((self.folder / "config.json").read_bytes()).hexdigest()
        artifact = {
            "artifact": self.source.checkpoint.fingerprint(),
            "config": config,
            "molae_compress": installed_version(),
        }
        predicted = {key: self.inputs[key] for key in ("tokens", "original")}
        return {
            TEACHER: code | predicted | {"teacher_top_k": str(self.settings.teacher_top_k)},
            STAGE: code | artifact | self.inputs,
        }

    def run(
        self,
        out: Path,
        work_path: Path,
        *,
        fresh: bool,
        finish: bool,
        limit: int,
        keep: bool,
        callbacks: Sequence[TrainerCallback],
    ) -> Report:
        """Trains and writes. Of several processes the first one keeps the work directory, and writes."""
        from molae_compress.tuning.teacher import STAGE as TEACHER
        from molae_compress.tuning.teacher import keep_predictions
        from molae_compress.tuning.trainer import STAGE

        checkpoints, arguments = work_path / STAGE, self.arguments(work_path)
        first = arguments.process_index == 0
        with ExitStack() as stack:
            with arguments.main_process_first(local=False, desc="the original's predictions"):
                if first:
                    if is_artifact(out):
                        clear_finished(out, work_path, keep=keep)
                    self._check_room(out, work_path)
                    inputs = self.stage_inputs()
                    opened = WorkDirectory.open(work_path, stage_inputs=inputs, fresh=fresh, reusable=(TEACHER,))
                    work = stack.enter_context(opened)
                    if self._cached() and not finish:
                        assert self.original is not None
                        top_k = self.settings.teacher_top_k
                        keep_predictions(
                            self.original, self.examples, top_k, work, memory_limit=limit, progress=self.progress
                        )
                    work.commit(STAGE, "begun", {}, {})
            training = self._training()
            figures = training.of_last(checkpoints) if finish else training.run(arguments, work_path / TEACHER, callbacks)
            with arguments.main_process_first(local=False, desc="the result"):
                if first:
                    self._put(out, work, checkpoints, figures)
                    work.discard(STAGE) if keep else work.remove()
        return Report.load(out)

    def _training(self) -> Training:
        from molae_compress.tuning.training import Training

        return Training(
            self.folder,
            self.original.folder if self.original is not None else None,
            self.settings,
            self.chosen,
            self.examples,
            bfloat16=self._bfloat16(),
            trust_remote_code=self.trust_remote_code,
            progress=self.progress,
        )

    def arguments(self, work_path: Path) -> TrainingArguments:
        """What transformers is told."""
        from molae_compress.tuning.trainer import STAGE, arguments_for

        on_cpu = self.source.device.type == "cpu"
        return arguments_for(self.settings, work_path / STAGE, bfloat16=self._bfloat16(), on_cpu=on_cpu)

    def _put(self, out: Path, work: WorkDirectory, checkpoints: Path, figures: Mapping[str, Any]) -> None:
        from molae_compress.tuning.trainer import STAGE

        name = hashlib.sha256(str(checkpoints.parent).encode()).hexdigest()[:8]
        staging = out.with_name(f".{out.name}.{name}.partial")
        keys = own_keys(self.source, self.chosen.changed, remedy=_REMEDY)
        entries = self.source.checkpoint.entries
        merged = self._training().merged(checkpoints)
        changed = {key: merged[name].to(entries[key].torch_dtype).contiguous() for name, key in keys.items()}

        def write() -> None:
            report = self._write(staging, changed, figures)
            work.commit(STAGE, WRITTEN, {}, {"files": report.files})

        put_at(out, staging, write)

    def _write(self, staging: Path, changed: Mapping[str, Tensor], figures: Mapping[str, Any]) -> Report:
        """The whole artifact into a new folder, evaluated if the recipe says so."""
        with disk_errors(staging):
            staging.mkdir(parents=True)
        self.progress("write", 0, 1)
        tensors = [
            TensorSource.of(key, changed[key]) if key in changed else TensorSource.copied(self.source.checkpoint, key)
            for key in self.source.checkpoint.entries
        ]
        size = Recipe.load(self.report.recipe).output.max_shard_size
        shards = write_shards(staging, tensors, max_shard_size=size)
        copy_companions(staging, self.folder)
        for name in ("config.json", RECIPE):
            write_file(staging / name, (self.folder / name).read_bytes())
        self.progress("write", 1, 1)
        evaluation = evaluate_as(
            self.recipe.evaluate,
            staging,
            against=self.original.folder if self.original is not None else None,
            device=self.source.device,
            trust_remote_code=self.trust_remote_code,
            progress=self.progress,
        )
        entry = {
            "trained": {way: sorted({one.short for one in found}) for way, found in vars(self.chosen).items() if found},
            "settings": self.settings.model_dump(mode="json"),
            "examples": len(self.examples),
            "changed": sorted(changed),
            "seconds": round(time.monotonic() - self.started, 3),
            "evaluation_before": self.report.evaluation,
            "inputs": self.inputs,
            **figures,
        }
        report = replace(
            self.report,
            finetuned=(*self.report.finetuned, entry),
            evaluation=evaluation.to_dict() if evaluation is not None else None,
            warnings=(*self.report.warnings, *_warnings(figures)),
            files={},
        )
        card = self.folder / "README.md"
        base_text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else None
        write_file(staging / "README.md", model_card(report, base_text).encode())
        report = replace(report, files=file_hashes(staging, {file.name: file.sha256 for file in shards.files}))
        report.save(staging)
        return report

    def _cached(self) -> bool:
        return self.settings.kl_weight > 0 and self.settings.teacher == "cached"

    def _bfloat16(self) -> bool:
        if self.settings.precision == "auto":
            return self.source.device.type == "cuda" and torch.cuda.is_bf16_supported()
        return self.settings.precision == "bfloat16"

    def _check_room(self, out: Path, work_path: Path) -> None:
        """Refuses to start without room for two checkpoints, the original's predictions and the result."""
        sizes = [self.source.model.get_parameter(name).numel() for name in self.chosen.changed]
        predictions = 8 * self.settings.teacher_top_k * self.examples.ids_NL.numel() if self._cached() else 0
        check_free_space(work_path, 2 * _OF_A_CHECKPOINT * sum(sizes) + predictions, "the training")
        check_free_space(out.parent, self.source.checkpoint.total_bytes, "the result")


def _warnings(figures: Mapping[str, Any]) -> list[str]:
    """What a reader should know before the result of a training is used."""
    before, after = figures["loss_before"], figures["loss_after"]
    if before is None or after <= before:
        return []
    return [
        f"Fine-tuning raised the loss on examples set aside from {before:.4g} to {after:.4g} per token: the model was "
        "better before. Lower `finetune.learning_rate`, or train on more text, and start from the artifact as it was."
    ]
