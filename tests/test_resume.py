"""A run that is killed goes on where it was, ends with the files of an undisturbed run, and never mixes two recipes.

Processes are forked off this one after everything is imported, and end themselves by SIGKILL.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import molae_compress as molae
from molae_compress import Recipe, compress
from molae_compress.errors import CheckpointError, QualityGateError, ResumeError
from tests.conftest import CheckpointMaker
from tests.runs import LENGTH, WINDOWS, hashes, recipe_for, same_every_time, tensors_in
from tests.tiny import HIDDEN, tiny_model

Events = list[tuple[str, int, int]]
PATIENCE = 120.0
EVALUATED = "evaluate={{data: '{text}', samples: 2, sequence_length: 16}}"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A forked process has no threads but its own, so there must be none to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dies(action: Callable[[], object]) -> bool:
    """Runs `action` in a process of its own; whether that was killed. It must not end in any other way but well."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + PATIENCE
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.002)
    if os.WIFSIGNALED(found[1]):
        assert os.WTERMSIG(found[1]) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(found[1]) == 0
    return False


class Countdown:
    """Kills its own process when it has been called `calls` times; then it also says so as progress callback."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def run_until_sync(recipe: Recipe, out: Path, syncs: int, **options: Any) -> None:
    """A run that is killed just before it forces something to disk for the `syncs`-th time; in a forked process only."""
    countdown, fsync = Countdown(syncs), os.fsync

    def counted(descriptor: int) -> None:
        countdown()
        fsync(descriptor)

    os.fsync = counted
    molae.run(recipe, out, **options)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names of the modules that this process measured and solved."""
    calls: dict[str, list[str]] = {"measure_spectra": [], "solve_layer": []}
    for name, names in calls.items():
        real = getattr(compress, name)

        def spy(dense: Any, *args: Any, real: Any = real, names: list[str] = names, **kwargs: Any) -> Any:
            names.append(dense.spec.name)
            return real(dense, *args, **kwargs)

        monkeypatch.setattr(compress, name, spy)
    return calls


def undisturbed(recipe: Recipe, out: Path, **options: Any) -> tuple[dict[str, str], Events]:
    events: Events = []
    molae.run(recipe, out, progress=lambda *event: events.append(event), **options)
    assert not out.with_name(f"{out.name}.work").exists()
    return same_every_time(out), events


@pytest.mark.parametrize(
    ("overrides", "max_memory"),
    [([], None), (["refit.sequential=true"], 0)],
    ids=["in memory", "sequential, activations on disk"],
)
def test_killed_at_any_progress_it_ends_with_the_same_files(
    checkpoint: CheckpointMaker,
    tmp_path: Path,
    solved: dict[str, list[str]],
    overrides: list[str],
    max_memory: int | None,
) -> None:
    source = checkpoint("deepseek_v3")
    text = recipe_for(source).calibration
    assert text is not None
    assert text.data is not None
    evaluated = [] if overrides else [EVALUATED.format(text=text.data[0])]
    recipe = recipe_for(source, *overrides, *evaluated)
    expected, events = undisturbed(recipe, tmp_path / "calm", max_memory=max_memory)
    assert {stage.split()[0] for stage, _, _ in events} == {"observe", "solve", "write"} | (
        {"evaluate"} if evaluated else set()
    )
    for moment in range(1, len(events) + 1):
        out = tmp_path / f"killed-{moment}"
        assert dies(lambda: molae.run(recipe, out, max_memory=max_memory, progress=Countdown(moment)))  # noqa: B023
        assert not out.exists()
        done = {
            stage: max([n for name, n, _ in events[:moment] if name == stage], default=0) for stage in ("observe", "solve")
        }
        for names in solved.values():
            names.clear()
        report = molae.run(recipe, out, max_memory=max_memory)
        assert same_every_time(out) == expected
        assert report.resumed == done["observe"] + done["solve"]
        assert len(solved["measure_spectra"]) == 2 - done["observe"]
        assert len(solved["solve_layer"]) == 2 - done["solve"]
        assert not out.with_name(f"{out.name}.work").exists()


@pytest.mark.parametrize(
    ("overrides", "max_memory"),
    [([], 0), (["refit.sequential=true"], None)],
    ids=["activations on disk", "sequential, in memory"],
)
def test_killed_again_and_again_it_still_ends_with_the_same_files(
    checkpoint: CheckpointMaker, tmp_path: Path, overrides: list[str], max_memory: int | None
) -> None:
    recipe = recipe_for(checkpoint("deepseek_v3"), *overrides)
    expected, _ = undisturbed(recipe, tmp_path / "calm", max_memory=max_memory)
    out, deaths = tmp_path / "stubborn", 0
    while not out.exists():
        # an odd step, so that death comes at another place of the loop each time
        if dies(lambda: run_until_sync(recipe, out, 7 + 2 * deaths, max_memory=max_memory)):  # noqa: B023
            deaths += 1
    assert deaths > 5
    molae.run(recipe, out, max_memory=max_memory)
    assert same_every_time(out) == expected
    assert molae.verify(out).passed


def killer(stage: str, done: int) -> Callable[[str, int, int], None]:
    """Progress callback that kills its own process when a stage has come so far."""

    def progress(*event: Any) -> None:
        if event[:2] == (stage, done):
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def killed_while_solving(recipe: Recipe, out: Path, **options: Any) -> None:
    """Leaves a work directory with all layers observed and one of two solved."""
    assert dies(lambda: molae.run(recipe, out, progress=killer("solve", 1), **options))


def test_another_budget_does_not_resume_silently(
    checkpoint: CheckpointMaker, tmp_path: Path, solved: dict[str, list[str]]
) -> None:
    source, out = checkpoint("qwen3_moe"), tmp_path / "out"
    killed_while_solving(recipe_for(source), out)
    before = hashes(tmp_path)
    other = recipe_for(source, "budget.keep=0.5")
    with pytest.raises(ResumeError, match=r"budget\.keep: 0\.6 -> 0\.5.*--fresh.*observe, probe, text would be kept"):
        molae.run(other, out)
    assert hashes(tmp_path) == before
    molae.run(other, out, fresh=True)
    assert solved["measure_spectra"] == []
    assert len(solved["solve_layer"]) == 2
    assert same_every_time(out) == undisturbed(other, tmp_path / "calm")[0]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("calibration.samples=5", r"calibration\.samples"),
        ("basis.experts_per_input_group=4", r"basis\.experts_per_input_group"),
        ("refit.shrinkage=1.0", r"refit\.shrinkage"),
        ("ignore=['model.layers.0.mlp.experts']", "ignore"),
    ],
)
def test_what_changes_the_observation_is_named_too(
    checkpoint: CheckpointMaker, tmp_path: Path, solved: dict[str, list[str]], override: str, named: str
) -> None:
    source, out = checkpoint("qwen3_moe"), tmp_path / "out"
    killed_while_solving(recipe_for(source), out)
    other = recipe_for(source, override)
    with pytest.raises(ResumeError, match=named):
        molae.run(other, out)
    molae.run(other, out, fresh=True)
    assert len(solved["measure_spectra"]) == len(solved["solve_layer"]) == (1 if "ignore" in named else 2)


def test_the_evaluation_may_change_without_losing_a_layer(
    checkpoint: CheckpointMaker, tmp_path: Path, solved: dict[str, list[str]]
) -> None:
    source, out = checkpoint("qwen3_moe"), tmp_path / "out"
    killed_while_solving(recipe_for(source), out)
    text = recipe_for(source).calibration
    assert text is not None
    assert text.data is not None
    report = molae.run(recipe_for(source, EVALUATED.format(text=text.data[0]), "output.max_shard_size=40kB"), out)
    assert report.evaluation is not None
    assert len(solved["solve_layer"]) == 1


def test_other_weights_text_or_tokens_do_not_resume(own_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    source = own_checkpoint("qwen3_moe")
    recipe, out = recipe_for(source), tmp_path / "out"
    killed_while_solving(recipe, out)
    kept = {name: (source.parent / name).read_bytes() for name in ("calibration.txt", "qwen3_moe-copy/config.json")}
    (source.parent / "calibration.txt").write_text("Something else. " * 200)
    with pytest.raises(ResumeError, match="calibration text"):
        molae.run(recipe, out)
    (source.parent / "calibration.txt").write_bytes(kept["calibration.txt"])
    (source / "config.json").write_bytes(kept["qwen3_moe-copy/config.json"] + b"\n")
    with pytest.raises(ResumeError, match="config"):
        molae.run(recipe, out)
    (source / "config.json").write_bytes(kept["qwen3_moe-copy/config.json"])
    tokenizer = (source / "tokenizer.json").read_text()
    content = json.loads(tokenizer)
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]
    (source / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ResumeError, match="calibration tokens"):
        molae.run(recipe, out)
    (source / "tokenizer.json").write_text(tokenizer)
    weights = bytearray((source / "model.safetensors").read_bytes())
    weights[-50_000:] = bytes(50_000)
    (source / "model.safetensors").write_bytes(weights)
    with pytest.raises(ResumeError, match="source"):
        molae.run(recipe, out)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
@pytest.mark.parametrize("stage", ["observe", "solve", "hidden"])
def test_a_damaged_item_is_made_again(
    checkpoint: CheckpointMaker, tmp_path: Path, solved: dict[str, list[str]], damage: str, stage: str
) -> None:
    recipe, out = recipe_for(checkpoint("qwen3_moe")), tmp_path / "out"
    expected, _ = undisturbed(recipe, tmp_path / "calm")
    killed_while_solving(recipe, out, max_memory=0 if stage == "hidden" else None)
    for names in solved.values():
        names.clear()
    items = sorted((tmp_path / "out.work" / stage).glob("*.safetensors"))
    assert items
    for item in items[:1]:
        content = item.read_bytes()
        item.unlink()
        if damage != "gone":
            item.write_bytes(content[:-7] if damage == "cut" else b"")
    molae.run(recipe, out)
    assert same_every_time(out) == expected
    assert len(solved["measure_spectra"]) == (1 if stage == "observe" else 0)
    assert len(solved["solve_layer"]) == (2 if stage == "solve" else 1)


@pytest.mark.parametrize("limits", [(0, None), (None, 0)])
def test_activations_may_move_between_memory_and_disk(
    checkpoint: CheckpointMaker, tmp_path: Path, limits: tuple[int | None, int | None]
) -> None:
    recipe, out = recipe_for(checkpoint("deepseek_v3"), "refit.sequential=true"), tmp_path / "out"
    killed_while_solving(recipe, out, max_memory=limits[0])
    molae.run(recipe, out, max_memory=limits[1])
    assert same_every_time(out) == undisturbed(recipe, tmp_path / "calm")[0]


def test_a_finished_output_is_returned_at_once(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("qwen3_moe"), tmp_path / "out"
    report = molae.run(recipe_for(source), out)
    before = hashes(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(compress, "solve_layer", lambda *_: pytest.fail("solved again"))
        assert molae.run(recipe_for(source), out).to_dict() == report.to_dict()
        with pytest.raises(ResumeError, match=r"budget\.keep: 0\.6 -> 0\.5.*--fresh"):
            molae.run(recipe_for(source, "budget.keep=0.5"), out)
    assert hashes(tmp_path) == before
    smaller = molae.run(recipe_for(source, "budget.keep=0.5"), out, fresh=True)
    assert smaller.artifact["bytes"] < report.artifact["bytes"]
    assert molae.verify(out).passed


def test_a_finished_output_of_other_weights_is_not_returned(own_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    source, out = own_checkpoint("qwen3_moe"), tmp_path / "out"
    molae.run(recipe_for(source), out)
    tiny_model("qwen3_moe", seed=1).save_pretrained(source)
    with pytest.raises(ResumeError, match=r"another run; there -> now: source: .*--fresh"):
        molae.run(recipe_for(source), out)
    before = tensors_in(out)
    molae.run(recipe_for(source), out, fresh=True)
    after = tensors_in(out)
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_a_killed_replacement_leaves_the_old_result(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    source, out = checkpoint("qwen3_moe"), tmp_path / "out"
    old, _ = undisturbed(recipe_for(source), out)
    other = recipe_for(source, "budget.keep=0.5")
    new, _ = undisturbed(other, tmp_path / "calm")
    for moment in (("solve", 1), ("write", 0), ("write", 1)):
        assert dies(lambda: molae.run(other, out, fresh=True, progress=killer(*moment)))  # noqa: B023
        assert same_every_time(out) == old
    molae.run(other, out, fresh=True)
    assert same_every_time(out) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "out"]


def test_a_gate_that_failed_fails_again(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    source, out = checkpoint("qwen3_moe"), tmp_path / "out"
    text = recipe_for(source).calibration
    assert text is not None
    assert text.data is not None
    recipe = recipe_for(source, EVALUATED.format(text=text.data[0]), "gate.max_kl=1e-9")
    for _ in range(2):
        with pytest.raises(QualityGateError, match="max_kl"):
            molae.run(recipe, out)
    assert molae.verify(out).passed


def test_a_kept_work_directory_serves_another_budget(
    checkpoint: CheckpointMaker, tmp_path: Path, solved: dict[str, list[str]]
) -> None:
    source, work = checkpoint("qwen3_moe"), tmp_path / "kept"
    molae.run(recipe_for(source), tmp_path / "one", work_dir=work)
    assert sorted(path.name for path in work.iterdir()) == [".lock", "manifest.json", "observe"]
    molae.run(recipe_for(source, "budget.keep=0.5", "output.dtype=bfloat16"), tmp_path / "two", work_dir=work)
    assert len(solved["measure_spectra"]) == 2
    assert len(solved["solve_layer"]) == 4
    assert same_every_time(tmp_path / "one") == undisturbed(recipe_for(source), tmp_path / "calm")[0]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second file system")
def test_the_work_directory_may_lie_on_another_disk(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    import tempfile

    recipe = recipe_for(checkpoint("qwen3_moe"))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if os.stat(other).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("needs a second file system")
        killed_while_solving(recipe, tmp_path / "out", work_dir=Path(other) / "work")
        assert not (tmp_path / "out").exists()
        molae.run(recipe, tmp_path / "out", work_dir=Path(other) / "work")
    assert same_every_time(tmp_path / "out") == undisturbed(recipe, tmp_path / "calm")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "out"]


def occupied(place: Path) -> int:
    """Bytes of tensors on disk below a folder."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.suffix in (".safetensors", ".bin"))


@pytest.mark.parametrize("max_memory", [0, None])
@pytest.mark.parametrize("overrides", [[], ["refit.sequential=true"]], ids=" ".join)
def test_a_run_takes_no_more_disk_than_planned(
    checkpoint: CheckpointMaker, tmp_path: Path, overrides: list[str], max_memory: int | None
) -> None:
    recipe = recipe_for(checkpoint("deepseek_v3"), *overrides)
    sizes: list[tuple[int, int]] = []

    def look(*_: Any) -> None:
        sizes.append((occupied(tmp_path), occupied(tmp_path / "out.work" / "hidden")))

    molae.run(recipe, tmp_path / "out", max_memory=max_memory, progress=look)
    planned = molae.plan(recipe)
    headers = 8000
    assert max(total for total, _ in sizes) <= planned.disk_bytes + headers
    # before and after one layer, and what its experts read
    assert max(hidden for _, hidden in sizes) <= 3 * WINDOWS * LENGTH * HIDDEN * 4 + headers


def test_a_resumed_run_needs_no_room_for_what_is_there(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = recipe_for(checkpoint("qwen3_moe")), tmp_path / "out"
    killed_while_solving(recipe, out)
    free = molae.plan(recipe).disk_bytes - occupied(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(CheckpointError, match="free"):
        molae.run(recipe, tmp_path / "another")
    molae.run(recipe, out)
    assert molae.verify(out).passed


def test_two_runs_do_not_share_a_work_directory(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    recipe, out = recipe_for(checkpoint("qwen3_moe")), tmp_path / "out"
    refusals: list[ResumeError] = []

    def meanwhile(stage: str, done: int, _: int) -> None:
        if (stage, done) == ("solve", 1) and not refusals:
            with pytest.raises(ResumeError, match="in use by another process") as refused:
                molae.run(recipe, out)
            refusals.append(refused.value)

    molae.run(recipe, out, progress=meanwhile)
    assert refusals
    assert molae.verify(out).passed


def test_a_finished_output_of_other_text_is_not_returned(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("One sentence of some length follows another. " * 40)
    recipe = recipe_for(checkpoint("qwen3_moe"), f"calibration.data={text}")
    molae.run(recipe, out)
    text.write_text("The text is another one now, and longer than before. " * 40)
    with pytest.raises(ResumeError, match="calibration text: "):
        molae.run(recipe, out)


def test_a_damaged_output_is_not_returned(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    recipe, out = recipe_for(checkpoint("qwen3_moe")), tmp_path / "out"
    molae.run(recipe, out)
    (out / "model.safetensors").unlink()
    with pytest.raises(ResumeError, match=r"lacks 'model\.safetensors'"):
        molae.run(recipe, out)
    molae.run(recipe, out, fresh=True)
    assert molae.verify(out).passed


def test_a_gate_without_a_finite_figure_fails_again(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("One sentence of some length follows another. " * 40)
    base = recipe_for(checkpoint("qwen3_moe"))
    recipe = molae.Recipe.load(
        base, [f"evaluate.data={text}", "evaluate.samples=2", "evaluate.sequence_length=16", "gate.max_kl=1000"]
    )
    molae.run(recipe, out)
    report = out / "molae_report.json"
    content = json.loads(report.read_text())
    content["evaluation"]["kl"] = None
    report.write_text(json.dumps(content))
    with pytest.raises(QualityGateError, match="no finite value"):
        molae.run(recipe, out)
