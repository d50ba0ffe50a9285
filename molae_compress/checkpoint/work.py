"""The work directory of a run: what is finished, so that a killed run goes on where it stopped.

A run has named stages; a stage has finished items (one per layer, say) and the inputs that they follow from. On disk:

    manifest.json                  the inputs of every stage
    <stage>/<item>.safetensors     one finished item, with its `info` in the metadata of the same file
    .lock                          held while a process uses the directory

An item appears by one rename after it has been forced to disk, so it is either whole or not there. The rules for a
directory that another run has left:

- Stages whose inputs are the same are kept: a run goes on after its finished items.
- A stage that has finished items and other inputs is a `ResumeError` that lists the differences. Nothing is discarded
  without being asked for.
- `fresh` discards every stage, but for those the caller declares `reusable` if their inputs are the same: what was
  observed of an unchanged model on unchanged data serves any budget.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from molae_compress.checkpoint.reader import Checkpoint
from molae_compress.checkpoint.writer import TensorSource, disk_errors, put_in_place, write_file, write_safetensors
from molae_compress.errors import CheckpointError, ResumeError

FORMAT = 1
_MANIFEST, _LOCK, _INFO = "manifest.json", ".lock", "molae_info"
_NAME = re.compile(r"\w[\w.-]*")
_OTHER = "give another --work-dir"

StageInputs = dict[str, dict[str, str]]


class WorkDirectory:
    """The resumable state of one run; made by `open`, and a context manager that gives its lock back at the end."""

    def __init__(self, path: Path, stage_inputs: StageInputs, lock: int) -> None:
        self._path = path
        self._inputs = stage_inputs
        self._lock: int | None = lock

    @classmethod
    def open(
        cls, path: Path, *, stage_inputs: StageInputs, fresh: bool = False, reusable: Collection[str] = ()
    ) -> WorkDirectory:
        """Creates the directory, or goes on with what an earlier run left in it.

        Args:
            path: the directory; created if it does not exist.
            stage_inputs: for every stage of the run, everything its items follow from, as text: recipe keys, source
                fingerprint, data hash, versions.
            fresh: discard what is there, but for `reusable` stages with the same inputs.
            reusable: stages that `fresh` keeps if their inputs are the same.

        Raises:
            ResumeError: the directory belongs to another run or program, or is in use.
            CheckpointError: it cannot be written.
        """
        assert all(_NAME.fullmatch(stage) for stage in stage_inputs)
        with disk_errors(path):
            _check_ours(path)
            path.mkdir(parents=True, exist_ok=True)
            work = cls(path, stage_inputs, _take_lock(path / _LOCK))
            try:
                work._reconcile(fresh, reusable)
            except BaseException:
                work.close()
                raise
        return work

    @classmethod
    def left_at(cls, path: Path) -> WorkDirectory | None:
        """What a run has left there, as it is; None if there is none. Raises as `open`."""
        if not (path / _MANIFEST).exists():
            return None
        return cls.open(path, stage_inputs=_read_manifest(path / _MANIFEST))

    @property
    def stages(self) -> set[str]:
        """Names of the stages."""
        return set(self._inputs)

    def done(self, stage: str) -> set[str]:
        """The items of a stage that are finished and whole."""
        assert stage in self._inputs
        return _whole_items(self._path / stage)

    def path(self, stage: str, item: str) -> Path:
        """Where an item is stored, finished or not: a safetensors file."""
        assert stage in self._inputs
        assert _NAME.fullmatch(item)
        return self._path / stage / f"{item}.safetensors"

    def commit(self, stage: str, item: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Stores a finished item for good; one that is there already is replaced.

        Args:
            stage: a stage given to `open`.
            item: name of the item: letters, digits, `_`, `.` and `-`.
            tensors: stored bit for bit.
            info: values that JSON can hold, without NaN.

        Raises:
            CheckpointError: the disk is full or cannot be written, or a tensor holds a NaN or an infinity.
        """
        final = self.path(stage, item)
        temporary = final.with_name(f".{final.name}.tmp")
        with disk_errors(final):
            final.parent.mkdir(exist_ok=True)
        sources = [TensorSource.of(name, tensor) for name, tensor in tensors.items()]
        write_safetensors(temporary, sources, {_INFO: json.dumps(info, sort_keys=True, allow_nan=False)})
        put_in_place(temporary, final)

    def load(self, stage: str, item: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and info of a finished item, as they were committed."""
        stored = Checkpoint.open(self.path(stage, item))
        return {name: stored.read(name) for name in stored.entries}, json.loads(stored.metadata[_INFO])

    def discard(self, stage: str) -> None:
        """Removes all items of a stage."""
        with disk_errors(self._path / stage):
            if (self._path / stage).is_dir():
                shutil.rmtree(self._path / stage)

    def remove(self) -> None:
        """Removes the directory and everything this run stored in it, and gives the lock back."""
        for stage in self._inputs:
            self.discard(stage)
        with disk_errors(self._path):
            # The manifest last: without it what is left would not be known as ours.
            (self._path / _MANIFEST).unlink(missing_ok=True)
            (self._path / _LOCK).unlink(missing_ok=True)
            if not any(self._path.iterdir()):
                self._path.rmdir()
        self.close()

    def close(self) -> None:
        """Gives the lock back; what is finished stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> WorkDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _reconcile(self, fresh: bool, reusable: Collection[str]) -> None:
        """Brings the directory to the inputs of this run, by the rules at the head of this file."""
        before = _read_manifest(self._path / _MANIFEST)
        for leftover in [*self._path.glob(".*.tmp"), *self._path.glob("*/.*.tmp")]:
            leftover.unlink()
        same = {stage for stage in before if before[stage] == self._inputs.get(stage)}
        other = {stage: _whole_items(self._path / stage) for stage in before if stage not in same}
        if any(other.values()) and not fresh:
            raise self._other_run(before, other, sorted(same & set(reusable)))
        for stage in before:
            if stage not in same or (fresh and stage not in reusable):
                self.discard(stage)
        manifest = {"format": FORMAT, "stages": self._inputs}
        write_file(self._path / _MANIFEST, (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())

    def _other_run(self, before: StageInputs, other: dict[str, set[str]], kept: list[str]) -> ResumeError:
        differences = [
            f"{stage}: {key}: {before[stage].get(key, 'absent')} -> {self._inputs.get(stage, {}).get(key, 'absent')}"
            for stage, items in other.items()
            if items
            for key in sorted(before[stage].keys() | self._inputs.get(stage, {}).keys())
            if before[stage].get(key) != self._inputs.get(stage, {}).get(key)
        ]
        count = sum(len(items) for items in other.values())
        keeping = f" ({', '.join(kept)} would be kept)" if kept else ""
        return ResumeError(
            f"The work directory '{self._path}' holds {count} finished items of a run with other inputs: "
            f"{'; '.join(differences)}.",
            why="Going on would mix two runs in one result.",
            remedy=f"Use --fresh to discard them{keeping}, or {_OTHER}.",
        )


def _whole_items(folder: Path) -> set[str]:
    """Names of the items in a stage's folder whose files are whole."""
    items = set()
    for file in folder.glob("[!.]*.safetensors"):
        try:
            Checkpoint.open(file)
        except CheckpointError:
            continue
        items.add(file.name.removesuffix(".safetensors"))
    return items


def _check_ours(path: Path) -> None:
    """Refuses a folder with files of others; a manifest, or nothing but what a killed start leaves, says it is ours."""
    if path.exists() and not path.is_dir():
        raise ResumeError(f"The work directory '{path}' is not a folder.", remedy=f"Remove that file, or {_OTHER}.")
    if path.is_dir() and not (path / _MANIFEST).exists():
        others = {entry.name for entry in path.iterdir()} - {_LOCK, f".{_MANIFEST}.tmp"}
        if others:
            raise ResumeError(
                f"The folder '{path}' is not empty and is not a work directory: it holds '{min(others)}'.",
                why="A work directory is cleaned up at the end, so it must be a folder of its own.",
                remedy=f"Use an empty folder: {_OTHER}.",
            )


def _read_manifest(path: Path) -> StageInputs:
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] == FORMAT:
            return {stage: dict(inputs) for stage, inputs in manifest["stages"].items() if _NAME.fullmatch(stage)}
        problem = f"has format {manifest['format']}, this version of molae_compress writes format {FORMAT}"
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = "cannot be read"
    raise ResumeError(
        f"The manifest '{path}' {problem}.",
        why="It is not known what the finished items follow from.",
        remedy=f"Remove the work directory, or {_OTHER}.",
    )


def _take_lock(path: Path) -> int:
    # Not at the head: a finished artifact is also loaded where there is no fcntl.
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ResumeError(
            f"The work directory '{path.parent}' is in use by another process.",
            why="Two runs would overwrite each other's results.",
            remedy=f"Wait for the other process to end, or {_OTHER}.",
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise ResumeError(
            f"The work directory '{path.parent}' cannot be locked ({error.strerror}).",
            why="Its file system has no locks.",
            remedy=f"Use a local disk: {_OTHER}.",
        ) from error
    return descriptor
