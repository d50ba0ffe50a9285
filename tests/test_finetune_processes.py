"""Fine-tuning in two processes, plain and sharded, against the same in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import molae_compress as molae
from molae_compress.errors import RecipeError
from molae_compress.report import Report
from tests.runs import TEXT, recipe_for, tensors_in

ROOT = Path(__file__).parents[1]
ONE_WAY = ("routers", "adapters", "latent")
WAYS: dict[str, dict[str, Any]] = {
    "routers": {"router": True},
    "adapters": {"adapters": 2},
    "latent": {"latent": "all", "learning_rate": "auto"},
    "all": {"router": True, "adapters": 2, "adapter_targets": ["encode", "q_proj"], "latent": ["core"]},
}
# What `accelerate launch --use_fsdp --fsdp_version 2` sets, of what counts here.
FLAGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
Check = Callable[[str, Path], None]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "learn.txt").write_text(TEXT)
    recipe = recipe_for(checkpoint("qwen3_moe"), "budget.keep=0.5", "budget.banks=2")
    molae.run(recipe, folder / "artifact")
    return folder / "artifact"


def asked(artifact: Path, way: str, batch_size: int, **trainer: Any) -> dict[str, Any]:
    """A recipe of four steps, of two examples in each of two processes or of four in one; one example is set aside."""
    settings = {
        "data": str(artifact.parent / "learn.txt"),
        "samples": 17,
        "sequence_length": 16,
        "batch_size": batch_size,
        "epochs": 1,
        "learning_rate": 0.002,
        "teacher": "resident",
        "checkpoint_steps": 2,
        **WAYS[way],
        "trainer": trainer,
    }
    return {"molae": 1, "finetune": settings}


def in_two_processes(artifact: Path, jobs: list[dict[str, Any]], folder: Path, flags: dict[str, str] | None = None) -> None:
    """Runs the jobs one after the other, with these environment variables; see `tests/processes.py`."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.processes", str(artifact), str(folder / "jobs.json")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(flags or {})}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def seen(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the two processes wrote of a job."""
    return [json.loads((folder / f"{name}{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def like_one_process(artifact: Path) -> Check:
    """`like_one_process(way, folder)`: the result of two processes is that of one with batches as large as both."""
    alone: dict[str, Path] = {}

    def check(way: str, out: Path) -> None:
        if way not in alone:
            alone[way] = artifact.parent / way
            molae.finetune(artifact, asked(artifact, way, 4), alone[way])
        before, one, two = tensors_in(artifact), tensors_in(alone[way]), tensors_in(out)
        moved = max(float((one[key] - before[key]).abs().max()) for key in before)
        assert moved > 3e-4
        assert max(float((one[key] - two[key]).abs().max()) for key in before) < 1e-3 * moved
        entries = [Report.load(folder).finetuned[-1] for folder in (alone[way], out)]
        for figure in ("steps", "tokens", "trained_parameters"):
            assert entries[0][figure] == entries[1][figure]
        for figure in ("loss_before", "loss_after"):
            assert entries[0][figure] == pytest.approx(entries[1][figure], rel=1e-4)

    return check


def test_two_processes_train_one_model_and_stop_together(artifact: Path, like_one_process: Check, tmp_path: Path) -> None:
    jobs = [{"recipe": asked(artifact, way, 2), "out": str(tmp_path / way)} for way in ONE_WAY]
    jobs += [{"recipe": asked(artifact, "routers", 2), "out": str(tmp_path / "spoiled"), "spoiled": True}]
    in_two_processes(artifact, jobs, tmp_path)
    for way in ONE_WAY:
        like_one_process(way, tmp_path / way)
    assert all("The loss at step 1 is not finite" in process["ended"] for process in seen(tmp_path, "spoiled."))


def test_processes_that_share_one_model_train_it_as_one_does(
    artifact: Path, like_one_process: Check, tmp_path: Path
) -> None:
    jobs = [{"recipe": asked(artifact, way, 2), "out": str(tmp_path / way)} for way in ONE_WAY]
    settings = {"fsdp": True, "fsdp_config": {"version": 2}}
    killed = {"recipe": asked(artifact, "all", 2, **settings), "out": str(tmp_path / "all")}
    in_two_processes(artifact, [*jobs, {**killed, "stop": 3, "name": "first"}, killed], tmp_path, FLAGS)
    for way in WAYS:
        like_one_process(way, tmp_path / way)
        held = [process["held"] for process in seen(tmp_path, f"{way}.")]
        assert sum(held) == Report.load(tmp_path / way).finetuned[-1]["trained_parameters"]
        assert min(held) > 0
    first, second = seen(tmp_path, "all.first"), seen(tmp_path, "all.")
    assert [process["steps"] for process in (*first, *second)] == [3, 3, 2, 2]


@pytest.mark.parametrize(
    ("trainer", "flags", "words"),
    [
        ({"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}}, {}, "FSDP of version 1"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP of version 1"),
        ({"fsdp": True}, {}, "there is one"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_read(
    trainer: dict[str, Any],
    flags: dict[str, str],
    words: str,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)  # and removed again where transformers sets it
    for name, value in flags.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=words):
        molae.finetune(artifact, asked(artifact, "latent", 2, **trainer), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
