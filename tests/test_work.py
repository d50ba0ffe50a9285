"""The work directory: what is committed is found again, and nothing of others is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molae_compress.checkpoint import WorkDirectory
from molae_compress.checkpoint.reader import DTYPES
from molae_compress.errors import CheckpointError, ResumeError
from tests.runs import bits, tensor_of

INPUTS = {"observe": {"model": "m1", "data": "d1"}, "solve": {"model": "m1", "data": "d1", "budget.keep": "0.6"}}


def other(stage: str, **changes: str) -> dict[str, dict[str, str]]:
    return INPUTS | {stage: INPUTS[stage] | changes}


def fill(path: Path, **items: list[str]) -> None:
    with WorkDirectory.open(path, stage_inputs=INPUTS) as work:
        for stage, names in items.items():
            for name in names:
                work.commit(stage, name, {"x": torch.arange(4.0)}, {"loss": 0.1, "of": name})


def test_committed_items_are_found_again(tmp_path: Path) -> None:
    tensors = {f"t.{code}": tensor_of(code, 3, 5) for code in DTYPES}
    info = {"loss": 0.1 + 0.2, "ranks": [1, 2], "name": "é"}
    with WorkDirectory.open(tmp_path / "w", stage_inputs=INPUTS) as work:
        work.commit("observe", "model.layers.0.mlp.experts", tensors, info)
        work.commit("observe", "empty", {}, {})
        first = work.path("observe", "model.layers.0.mlp.experts").read_bytes()
        work.commit("observe", "model.layers.0.mlp.experts", tensors, info)
        assert work.path("observe", "model.layers.0.mlp.experts").read_bytes() == first
    with WorkDirectory.open(tmp_path / "w", stage_inputs=INPUTS) as work:
        assert work.done("observe") == {"model.layers.0.mlp.experts", "empty"}
        assert work.done("solve") == set()
        loaded, loaded_info = work.load("observe", "model.layers.0.mlp.experts")
        assert loaded_info == info
        assert {name: bits(tensor) for name, tensor in loaded.items()} == {n: bits(t) for n, t in tensors.items()}
        assert work.load("observe", "empty") == ({}, {})
        work.remove()
    assert not (tmp_path / "w").exists()


def test_a_commit_that_fails_leaves_the_item_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, observe=["0"])
    before = (tmp_path / "observe/0.safetensors").read_bytes()

    def fail(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    with WorkDirectory.open(tmp_path, stage_inputs=INPUTS) as work:
        monkeypatch.setattr(os, "replace", fail)
        for item in ("0", "1"):
            with pytest.raises(CheckpointError, match=r"Disk full.*resumes"):
                work.commit("observe", item, {"x": torch.ones(2)}, {})
        assert work.done("observe") == {"0"}
    assert (tmp_path / "observe/0.safetensors").read_bytes() == before


def test_damaged_items_and_leftovers_do_not_count(tmp_path: Path) -> None:
    fill(tmp_path, observe=["0", "1"])
    item = tmp_path / "observe/1.safetensors"
    item.write_bytes(item.read_bytes()[:-1])
    leftover = tmp_path / "observe/.2.safetensors.tmp"
    leftover.write_bytes(b"half")
    with WorkDirectory.open(tmp_path, stage_inputs=INPUTS) as work:
        assert work.done("observe") == {"0"}
        assert not leftover.exists()


def test_other_inputs_do_not_resume_silently(tmp_path: Path) -> None:
    fill(tmp_path, observe=["0", "1"], solve=["0"])
    with pytest.raises(ResumeError) as caught:
        WorkDirectory.open(tmp_path, stage_inputs=other("solve", **{"budget.keep": "0.5", "new": "1"}), reusable={"observe"})
    message = str(caught.value)
    assert "1 finished items" in message
    assert "solve: budget.keep: 0.6 -> 0.5; solve: new: absent -> 1." in message
    assert "--fresh" in message
    assert "(observe would be kept)" in message
    assert "--work-dir" in message
    assert "observe:" not in message
    with WorkDirectory.open(tmp_path, stage_inputs=INPUTS) as work:
        assert (work.done("observe"), work.done("solve")) == ({"0", "1"}, {"0"})


def test_a_stage_that_is_gone_counts_as_different(tmp_path: Path) -> None:
    fill(tmp_path, solve=["0"])
    with pytest.raises(ResumeError, match=r"solve: budget\.keep: 0\.6 -> absent"):
        WorkDirectory.open(tmp_path, stage_inputs={"observe": INPUTS["observe"]})


def test_inputs_of_a_stage_without_items_may_change(tmp_path: Path) -> None:
    fill(tmp_path, observe=["0"])
    changed = other("solve", **{"budget.keep": "0.5"})
    with WorkDirectory.open(tmp_path, stage_inputs=changed) as work:
        assert work.done("observe") == {"0"}
        work.commit("solve", "0", {}, {})
    with pytest.raises(ResumeError, match=r"budget\.keep: 0\.5 -> 0\.6"):
        WorkDirectory.open(tmp_path, stage_inputs=INPUTS)


@pytest.mark.parametrize(
    ("inputs", "reusable", "kept"),
    [
        (INPUTS, set(), set()),
        (INPUTS, {"observe"}, {"0"}),
        (other("solve", **{"budget.keep": "0.5"}), {"observe"}, {"0"}),
        (other("observe", data="d2"), {"observe"}, set()),
    ],
)
def test_fresh_keeps_only_reusable_stages_with_equal_inputs(
    tmp_path: Path, inputs: dict[str, dict[str, str]], reusable: set[str], kept: set[str]
) -> None:
    fill(tmp_path, observe=["0"], solve=["0"])
    with WorkDirectory.open(tmp_path, stage_inputs=inputs, fresh=True, reusable=reusable) as work:
        assert work.done("observe") == kept
        assert work.done("solve") == set()


def test_folders_of_others_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ResumeError, match=r"thesis\.txt"):
            WorkDirectory.open(tmp_path, stage_inputs=INPUTS, fresh=fresh)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ResumeError, match="not a folder"):
        WorkDirectory.open(tmp_path / "thesis.txt", stage_inputs=INPUTS)


@pytest.mark.parametrize("manifest", ["{", "[]", '{"format": 99, "stages": {}}'])
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path, manifest: str) -> None:
    fill(tmp_path, observe=["0"])
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ResumeError, match=r"manifest\.json"):
        WorkDirectory.open(tmp_path, stage_inputs=INPUTS, fresh=True)
    assert (tmp_path / "observe/0.safetensors").exists()


def test_a_start_that_was_killed_leaves_a_directory_that_is_ours(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.tmp").write_text("{")
    with WorkDirectory.open(tmp_path, stage_inputs=INPUTS) as work:
        assert work.done("observe") == set()
    assert not (tmp_path / ".manifest.json.tmp").exists()


def test_a_work_directory_in_use_is_refused(tmp_path: Path) -> None:
    """The lock belongs to the opened file, so a second opening in one process meets it as another process would."""
    first = WorkDirectory.open(tmp_path, stage_inputs=INPUTS)
    with pytest.raises(ResumeError, match=r"in use by another process.*--work-dir"):
        WorkDirectory.open(tmp_path, stage_inputs=INPUTS, fresh=True)
    first.close()
    WorkDirectory.open(tmp_path, stage_inputs=INPUTS).close()


def test_a_run_killed_at_any_moment_leaves_whole_items(tmp_path: Path) -> None:
    program = """
import sys, torch
from pathlib import Path
from molae_compress.checkpoint import WorkDirectory
work = WorkDirectory.open(Path(sys.argv[1]), stage_inputs={"observe": {}})
for item in range(10**6):
    work.commit("observe", str(item), {"x": torch.full((1 << 18,), float(item))}, {"item": item})
    print("committed", flush=True)
"""
    for delay in (0.02, 0.07):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with WorkDirectory.open(tmp_path, stage_inputs={"observe": {}}) as work:
        done = work.done("observe")
        assert len(done) == len(list((tmp_path / "observe").iterdir()))
        assert done
        for item in done:
            tensors, info = work.load("observe", item)
            assert torch.equal(tensors["x"], torch.full((1 << 18,), float(item)))
            assert info == {"item": int(item)}
