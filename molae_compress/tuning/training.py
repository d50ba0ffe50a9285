"""One training from its first step to the tensors that it changed; nothing here knows of reports and artifacts."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed

from molae_compress.errors import CheckpointError
from molae_compress.recipe.sections import Finetune
from molae_compress.tuning.examples import Examples
from molae_compress.tuning.inputs import loaded
from molae_compress.tuning.objective import Objective
from molae_compress.tuning.teacher import Cached, Resident, Teacher
from molae_compress.tuning.trainer import TRAINED, FinetuneTrainer, Told, last_checkpoint, load_trained
from molae_compress.tuning.ways import Chosen, attach, merge, rates

_FAR = 0.05  # divergence from the original, nats per token, from which on the rates of `auto` count in full
_FINAL = "final"  # what was trained, among the checkpoints


@dataclass(frozen=True)
class Training:
    """What is trained, on what, towards what.

    Attributes:
        folder: the compressed model.
        original: the original one, if it is compared with.
        settings: of the recipe.
        chosen: what is trained.
        examples: all of them.
        bfloat16: compute in it.
        trust_remote_code: allow code from the model folders.
        progress: called with a stage, what is done of it, and of how much.
    """

    folder: Path
    original: Path | None
    settings: Finetune
    chosen: Chosen
    examples: Examples
    bfloat16: bool
    trust_remote_code: bool
    progress: Callable[[str, int, int], None]

    def run(self, arguments: TrainingArguments, kept: Path, callbacks: Sequence[TrainerCallback]) -> dict[str, Any]:
        """Trains up to the end, from the last checkpoint on if there is one.

        Args:
            arguments: for transformers; their `output_dir` takes the checkpoints.
            kept: folder of the original's predictions, if they are kept.
            callbacks: of the caller.

        Returns:
            figures for the report.
        """
        set_seed(self.settings.seed)  # adapters begin with random numbers
        tuned = attach(loaded(self.folder, self._dtype(), self.trust_remote_code), self.chosen, self.settings.adapters)
        asked = self.settings.learning_rate
        learned, aside = self.examples.apart()
        trainer = FinetuneTrainer(
            tuned,
            arguments,
            examples=learned,
            aside=aside,
            objective=Objective(self.settings.kl_weight, self.settings.language_weight),
            teacher=self._teacher(kept, arguments.device),
            rates=rates(tuned, self.chosen, None if asked == "auto" else asked),
            share=self._share_of_rates if asked == "auto" else None,
            callbacks=[Told(self.progress), *callbacks],
        )
        last = last_checkpoint(trainer.folder)
        trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
        after = trainer.evaluate()["eval_loss"] if len(aside) else None
        trainer.save_model(str(trainer.folder / _FINAL))
        return {
            "steps": trainer.state.global_step,
            "tokens": round(learned.learned * (trainer.state.epoch or 0.0)),
            "trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
            "loss_before": trainer.loss_before,
            "loss_after": after,
        }

    def _share_of_rates(self, before: float) -> float:
        """Of the rates of `auto`: the nearer a model is to the original, the smaller are the steps that bring it nearer.

        The divergence grows with the square of the distance. Steps of the same size at a tenth of it lead away.

        Args:
            before: loss on the examples set aside.
        """
        if self.settings.language_weight:
            return 1.0
        return min(1.0, math.sqrt(max(0.0, before) / self.settings.kl_weight / _FAR))

    def of_last(self, checkpoints: Path) -> dict[str, Any]:
        """Takes the last checkpoint for the end; figures for the report.

        Raises:
            CheckpointError: there is none.
        """
        last, final = last_checkpoint(checkpoints), checkpoints / _FINAL
        if last is None:
            raise CheckpointError(
                f"There is no checkpoint in '{checkpoints}' to write the result of.",
                remedy="Leave --finish out to train, with fewer steps between checkpoints (`finetune.checkpoint_steps`).",
            )
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        shutil.copyfile(last / TRAINED, final / TRAINED)
        state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
        learned, _ = self.examples.apart()
        tokens = round(learned.learned * state["epoch"])
        unknown = dict.fromkeys(("trained_parameters", "loss_before", "loss_after"))
        return {"steps": state["global_step"], "tokens": tokens, **unknown}

    def merged(self, checkpoints: Path) -> dict[str, Tensor]:
        """The model's own parameters that training has changed, by full name, float32 on the CPU."""
        self.progress("merge", 0, 1)
        gc.collect()  # a Trainer and its callbacks refer to each other, and so keep the trained model in memory
        tuned = attach(loaded(self.folder, torch.float32, self.trust_remote_code), self.chosen, self.settings.adapters)
        load_trained(tuned, checkpoints / _FINAL / TRAINED)
        model = merge(tuned)
        self.progress("merge", 1, 1)
        return {name: model.get_parameter(name).detach() for name in self.chosen.changed}

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bfloat16 else torch.float32

    def _teacher(self, kept: Path, device: torch.device) -> Teacher | None:
        if not self.settings.kl_weight:
            return None
        if self.settings.teacher == "cached":
            return Cached.inside(kept)
        assert self.original is not None
        model = loaded(self.original, self._dtype(), self.trust_remote_code).eval().requires_grad_(False)
        return Resident(model.to(device))
