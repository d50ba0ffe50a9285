"""The `Trainer` of transformers with our objective, rates for each tensor, and checkpoints that hold what is trained.

A checkpoint is whole or does not count: it is marked at the end. A loss or a gradient that is not finite ends the training
before it reaches a weight.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molae_compress.errors import CheckpointError, ModelError, RecipeError
from molae_compress.recipe.sections import Finetune
from molae_compress.tuning.examples import IGNORED, Examples, collated
from molae_compress.tuning.objective import Objective
from molae_compress.tuning.sharding import check_sharding, held, part_of, whole_tensors
from molae_compress.tuning.teacher import Teacher

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAINED, WHOLE = "trained.safetensors", "whole"  # in a checkpoint
STAGE = "finetune"
_WRAPPERS = re.compile(r"(?:^module\.)|_fsdp_wrapped_module\.|_orig_mod\.|_checkpoint_wrapped_module\.")
# Keys of TrainingArguments that the recipe has under a name of its own, or that have to be as they are.
_OURS = {
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "seed": "seed",
    "save_steps": "checkpoint_steps",
    "bf16": "precision",
    "output_dir": None,
    "remove_unused_columns": None,
    "label_names": None,
    "save_strategy": None,
    "eval_strategy": None,
    "load_best_model_at_end": None,
    "push_to_hub": None,
}


class Diverged(ModelError):
    """Training was stopped by a figure that is not finite; `step` is the step it happened in."""

    def __init__(self, found: str, step: int, kept: str) -> None:
        self.step = step
        super().__init__(
            f"{found} at step {step} is not finite, and training was stopped.",
            why=f"Steps that are too large do that. {kept}",
            remedy="Lower `finetune.learning_rate` and run again with --fresh.",
        )


def check_arguments(settings: Finetune) -> None:
    """Raises `RecipeError` for a key of `finetune.trainer` that is not there, or that is not for the recipe to set."""
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for key in settings.trainer:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2)
            raise RecipeError(
                f"`finetune.trainer.{key}` is no argument of the TrainingArguments of transformers.",
                remedy=f"Did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else "Look it up there.",
            )
        if key in _OURS:
            ours = _OURS[key]
            raise RecipeError(
                f"`finetune.trainer.{key}` is not set there.",
                why="It has a key of its own." if ours else "It is what lets a training go on and end as it does.",
                remedy=f"Use `finetune.{ours}`." if ours else "Remove it.",
            )


def arguments_for(settings: Finetune, folder: Path, *, bfloat16: bool, on_cpu: bool) -> TrainingArguments:
    """What transformers is told, with the recipe's own arguments on top.

    Raises:
        RecipeError: transformers refuses them.
    """
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "num_train_epochs": settings.epochs,
        "seed": settings.seed,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_steps,
        "save_total_limit": 1,
        "bf16": bfloat16,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    try:
        arguments = TrainingArguments(output_dir=str(folder), **{**chosen, **settings.trainer})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(
            f"transformers refuses the arguments of `finetune.trainer` ({str(error).splitlines()[0]}).",
            remedy="Change them.",
        ) from error
    check_sharding(arguments)
    return arguments


class FinetuneTrainer(Trainer):
    """See the head of this file.

    Args:
        tuned: the model, as `attach` made it.
        arguments: for transformers.
        examples: to learn from.
        aside: examples that only measure; may be none.
        objective: what is minimised.
        teacher: the original; None without a part in the objective.
        rates: of every trained parameter, by its name in `tuned`.
        share: of these rates that is taken, given the loss before the first step on the examples set aside; None for all.
        callbacks: of the caller.
    """

    def __init__(
        self,
        tuned: PeftModel,
        arguments: TrainingArguments,
        *,
        examples: Examples,
        aside: Examples,
        objective: Objective,
        teacher: Teacher | None,
        rates: Mapping[str, float],
        share: Callable[[float], float] | None,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        super().__init__(
            model=tuned,
            args=arguments,
            data_collator=collated,
            train_dataset=examples,
            eval_dataset=aside if len(aside) else None,
            callbacks=[_FiniteGradients(self), _Before(self, share), *callbacks],
        )
        if self.is_fsdp_enabled:  # all processes have read the weights; handing them on knows nothing of buffers
            self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        self.remove_callback(PrinterCallback)
        self.objective: Objective = objective
        self.teacher: Teacher | None = teacher
        self.rates: Mapping[str, float] = rates
        self.tuned, self.folder = tuned, Path(str(arguments.output_dir))
        # our loss is divided by the number of learned tokens of a whole step, which says so
        self.model_accepts_loss_kwargs = True
        self.can_return_loss = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective, per learned token."""
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        divergences = self.teacher.divergences(inputs) if self.teacher is not None else None
        total = self.objective(outputs.logits, inputs["labels"], divergences)
        count = (inputs["labels"][:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    @property
    def loss_before(self) -> float | None:
        """On the examples set aside, before the first step; a training that goes on after a checkpoint remembers it."""
        found = (entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry)
        return next(found, None)

    def take_share(self, share: float) -> None:
        """Makes all rates smaller, before the first step."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"], group["initial_lr"] = share * group["lr"], share * group["initial_lr"]
        scheduler: Any = self.lr_scheduler
        scheduler.base_lrs = [share * rate for rate in scheduler.base_lrs]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One with a group of parameters for each rate."""
        if self.optimizer is None:
            trained: Any = self.tuned if model is None else model
            groups: dict[float, list[nn.Parameter]] = {}
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault(self.rates[_WRAPPERS.sub("", name)], []).append(parameter)
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            decay = self.args.weight_decay
            listed = [{"params": own, "lr": rate, "weight_decay": decay} for rate, own in groups.items()]
            self.optimizer = cls(listed, **options)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As transformers does, but without a warm-up of a single step, which begins at a rate of zero and ends there."""
        if self.args.warmup_steps * num_training_steps < 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One step forward and back; raises `Diverged` where the loss is not finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not self.everywhere(bool(torch.isfinite(loss).all())):
            raise self.diverged("The loss")
        return loss

    def everywhere(self, finite: bool) -> bool:
        """Whether it is so in all processes, which then stop together where it is not."""
        return bool(self.accelerator.gather(torch.tensor([float(finite)], device=self.args.device)).all())

    def diverged(self, found: str) -> Diverged:
        """What to raise for a figure that is not finite."""
        last = last_checkpoint(self.folder)
        kept = (
            f"The checkpoint of step {_step(last)} is kept, and --finish writes the result of it."
            if last is not None
            else "There is no checkpoint before it (`finetune.checkpoint_steps`)."
        )
        return Diverged(found, self.state.global_step + 1, f"The compressed model is as it was. {kept}")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        with _whole_or_not(folder, self.folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (folder / WHOLE).touch()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what is trained; under FSDP it is gathered first, in whatever form transformers keeps states."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, whole_tensors(self.tuned))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir) if output_dir else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        named = {name: p for name, p in self.tuned.named_parameters() if p.requires_grad}
        # under FSDP the whole tensors are handed over, else they are here
        given = {_WRAPPERS.sub("", name): tensor for name, tensor in (state_dict or named).items()}
        names = [_WRAPPERS.sub("", name) for name in named]
        save_file({name: given[name].detach().cpu().contiguous() for name in names}, folder / TRAINED)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.tuned, Path(resume_from_checkpoint) / TRAINED)


class _FiniteGradients(TrainerCallback):
    """Looks at gradients before they are used: one that is not finite would spoil the weights, and the next checkpoint."""

    def __init__(self, trainer: FinetuneTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises `Diverged`; scaled gradients of 16 bits may overflow, and their scaler leaves such a step out itself."""
        if getattr(self._trainer.accelerator, "scaler", None) is not None:
            return
        gradients = [held(p.grad) for p in kwargs["model"].parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else ()
        finite = all(bool(torch.isfinite(norm)) for norm in norms)
        if not self._trainer.everywhere(finite):
            raise self._trainer.diverged("The gradient")


class _Before(TrainerCallback):
    """Measures the loss before the first step, when the model is prepared for training.

    Not earlier: accelerate takes a model that was prepared for an evaluation alone as prepared for everything, and several
    processes would each train a model of their own.
    """

    def __init__(self, trainer: FinetuneTrainer, share: Callable[[float], float] | None) -> None:
        self._trainer = trainer
        self._share = share

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the first step, and not when a training goes on."""
        if state.global_step or self._trainer.eval_dataset is None:
            return
        before = self._trainer.evaluate()["eval_loss"]
        if self._share is not None:
            self._trainer.take_share(self._share(before))


class Told(TrainerCallback):
    """Tells the caller's progress of every step."""

    def __init__(self, progress: Callable[[str, int, int], None]) -> None:
        self._progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each step of the optimiser."""
        self._progress(STAGE, state.global_step, state.max_steps)


def load_trained(tuned: nn.Module, path: Path) -> None:
    """Gives trained parameters their values from a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or holds other parameters.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint '{path}' cannot be read ({error}).", remedy="Start over with --fresh."
        ) from error
    named = {_WRAPPERS.sub("", name): p for name, p in tuned.named_parameters() if _is_added(name)}
    wanted = {name: tuple(p.shape) for name, p in named.items()}
    if wanted != {name: tuple(tensor.shape) for name, tensor in stored.items()}:
        raise CheckpointError(
            f"The checkpoint '{path}' is of another training: it holds other tensors.", remedy="Start over with --fresh."
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            named[name].copy_(part_of(tensor, named[name]))


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole; what a killed or failed writing left is removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        if (path / WHOLE).exists():
            found.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(found, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_added(name: str) -> bool:
    return ".lora_" in name or ".molae_trained." in name


@contextmanager
def _whole_or_not(folder: Path, above: Path) -> Iterator[None]:
    """Removes a checkpoint that cannot be finished, and says why."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(above).free
        # torch does not say why a file could not be written
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error) or free < 1 << 20
        last = last_checkpoint(above)
        raise CheckpointError(
            f"{'Disk full while writing' if full else 'Cannot write'} the checkpoint '{folder}' ({free:,} bytes are free).",
            why="" if full else f"{type(error).__name__}: {str(error).splitlines()[0]}",
            remedy=f"Free space and run the same command again, it goes on from step {_step(last) if last else 0}.",
        ) from error
