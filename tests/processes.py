"""Fine-tunings in one of several processes, which `torch.distributed.run` starts as `accelerate launch` does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import molae_compress as molae
from molae_compress.errors import MolaeError
from molae_compress.tuning.objective import Objective


class Seen(TrainerCallback):
    """Keeps the number of steps, and of the numbers trained that this process holds; ends the training after a step."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop
        self.held = self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in trained)
        self.steps += 1
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def shard_on_cpu() -> None:
    """Makes accelerate divide models on CPUs too, where it takes FSDP for plain data parallelism."""
    begin, plugins = AcceleratorState.__init__, []

    def forced(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        plugins.extend([kwargs["fsdp_plugin"]] if kwargs.get("fsdp_plugin") else [])
        if plugins and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]

    AcceleratorState.__init__ = forced


def spoil_the_loss() -> None:
    """In the second process alone."""
    call = Objective.__call__

    def spoiled(self: Objective, *args: Any) -> Tensor:
        return call(self, *args) * (float("inf") if torch.is_grad_enabled() and PartialState().process_index else 1.0)

    Objective.__call__ = spoiled  # type: ignore[method-assign]


def main() -> None:
    folder, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    shard_on_cpu()
    for job in jobs:
        if job.get("spoiled"):
            spoil_the_loss()
        seen, ended = Seen(job.get("stop")), ""
        try:
            molae.finetune(folder, job["recipe"], job["out"], device="cpu", callbacks=[seen])
        except (KeyboardInterrupt, MolaeError) as error:
            ended = f"{type(error).__name__}: {error}"
        rank = PartialState().process_index
        Path(f"{job['out']}.{job.get('name', '')}{rank}.json").write_text(
            json.dumps({"held": seen.held, "steps": seen.steps, "ended": ended})
        )
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
