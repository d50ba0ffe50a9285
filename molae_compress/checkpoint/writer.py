"""Writing safetensors checkpoints as a stream: the header, then every tensor in chunks; never a whole shard in memory.

Notable choices:

- A tensor is a name, a type, a shape and a function that yields its bytes, so that tensors copied from a source
  checkpoint, tensors of a finished layer on disk and tensors in memory are written by the same loop.
- Equal sources give equal files, byte by byte: nothing depends on time, on paths or on the order of a set.
- Everything is written into a folder that is not yet the result, forced to disk, and put into place by one rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from molae_compress.checkpoint.finite import check_finite
from molae_compress.checkpoint.reader import CHUNK_BYTES, DTYPES, INDEX_NAME, SINGLE_NAME, Checkpoint, StoredTensors
from molae_compress.errors import CheckpointError, ResumeError, human_bytes

Result = TypeVar("Result")
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: `chunks()` yields its bytes in order, and may be called more than once.

    `dtype` is the safetensors code, e.g. `BF16`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @classmethod
    def copied(cls, checkpoint: StoredTensors, name: str) -> TensorSource:
        """A tensor of a checkpoint, copied bit for bit as it is read, under its own name."""
        return cls.stored(checkpoint, name, name)

    @classmethod
    def stored(cls, checkpoint: StoredTensors | Path, stored_name: str, name: str) -> TensorSource:
        """The tensor `stored_name` of a checkpoint or safetensors file, copied bit for bit under the name `name`."""
        checkpoint = Checkpoint.open(checkpoint) if isinstance(checkpoint, Path) else checkpoint
        entry = checkpoint.entries[stored_name]
        return cls(name, entry.dtype, entry.shape, lambda: checkpoint.chunks(stored_name))

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSource:
        """A tensor in memory, on any device; a NaN or an infinity in it raises `CheckpointError` when it is written."""

        def chunks() -> Iterator[bytes]:
            flat = tensor.detach().reshape(-1)
            for piece in flat.split(CHUNK_BYTES // flat.dtype.itemsize) if flat.numel() else ():
                values = piece.cpu().contiguous()
                check_finite(name, values, where="computed by this run", single=flat.numel() == 1)
                yield values.view(torch.uint8).numpy().tobytes()

        return cls(name, _CODES[tensor.dtype], tuple(tensor.shape), chunks)


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its name inside the folder, its size in bytes and its sha256 in hexadecimal."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class WrittenShards:
    """What `write_shards` wrote.

    Attributes:
        files: all files, the index among them if there is one.
        weight_map: tensor name -> name of the file that holds it.
        total_size: bytes of all tensors.
    """

    files: tuple[WrittenFile, ...]
    weight_map: dict[str, str]
    total_size: int


def write_shards(folder: Path, sources: Sequence[TensorSource], *, max_shard_size: int) -> WrittenShards:
    """Writes tensors as one or several safetensors files, with an index if there are several.

    Tensors are distributed in the order given; a shard is closed before it would exceed `max_shard_size` bytes of
    tensors, and a larger tensor gets a shard of its own. Files that exist are overwritten.

    Raises:
        CheckpointError: the disk is full or cannot be written, or a tensor cannot be read or holds a NaN.
    """
    shards: list[list[TensorSource]] = []
    room = -1
    for source in sources:
        if source.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(source)
        room -= source.nbytes
    files: list[WrittenFile] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files.append(write_safetensors(folder / name, shard))
        weight_map |= {source.name: name for source in shard}
    assert len(weight_map) == len(sources), "a tensor is written twice"
    total_size = sum(source.nbytes for source in sources)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        files.append(write_file(folder / INDEX_NAME, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()))
    return WrittenShards(tuple(files), weight_map, total_size)


def write_safetensors(path: Path, sources: Sequence[TensorSource], metadata: dict[str, str] | None = None) -> WrittenFile:
    """Writes one safetensors file and forces it to disk; `metadata` is added to the string metadata of its header."""
    # Larger types first, as the safetensors library orders them: programs that map the file need aligned tensors.
    ordered = sorted(sources, key=lambda source: -DTYPES[source.dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    position = 0
    for source in ordered:
        end = position + source.nbytes
        header[source.name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)

    def content() -> Iterator[bytes]:
        yield len(encoded).to_bytes(8, "little") + encoded
        for source in ordered:
            written = 0
            for chunk in source.chunks():
                written += len(chunk)
                yield chunk
            assert written == source.nbytes, f"{source.name}: {written} bytes instead of {source.nbytes}"

    return _write(path, content())


def write_file(path: Path, content: bytes) -> WrittenFile:
    """Writes a small file so that it appears whole or not at all, also if the machine stops meanwhile."""
    temporary = path.with_name(f".{path.name}.tmp")
    written = _write(temporary, iter([content]))
    put_in_place(temporary, path)
    return WrittenFile(path.name, written.nbytes, written.sha256)


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a finished file to its name in the same folder, for good once this returns."""
    with disk_errors(path):
        os.replace(temporary, path)
        _sync(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Puts a finished folder into place by one rename; both must lie on the same file system.

    Raises:
        ResumeError: `final` exists and is not an empty folder.
        CheckpointError: the system refuses the rename.
    """
    with disk_errors(final):
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        try:
            os.rename(temporary, final)
        except (FileExistsError, NotADirectoryError) as error:
            raise _occupied(final) from error
        except OSError as error:
            # Linux says so with ENOTEMPTY, which Python has no class for.
            if error.errno == errno.ENOTEMPTY:
                raise _occupied(final) from error
            raise
        _sync(final.parent)


def put_at(final: Path, temporary: Path, write: Callable[[], Result]) -> Result:
    """Writes a new folder and moves it to its place, where an earlier result stays until then.

    Args:
        final: its place; what is there may be replaced (`check_output_folder`).
        temporary: on the same file system; what a killed run left there is removed.
        write: makes `temporary`, which is gone again if it fails.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        result = write()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # gives its space back, which may be what is missing
        raise
    replaced = temporary.with_suffix(".replaced")
    if final.is_dir() and any(final.iterdir()):
        final.rename(replaced)
    publish(temporary, final)
    shutil.rmtree(replaced, ignore_errors=True)
    return result


def check_output_folder(path: Path, *, ours: Callable[[Path], bool]) -> None:
    """Refuses an output folder that cannot be written, or that holds files which are not ours.

    Args:
        path: the folder to write to; it need not exist.
        ours: says of a folder that is not empty whether this run may replace what is in it.
    """
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not ours(path))):
        raise _occupied(path)
    parent = _existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"The output folder '{path}' cannot be created.",
            why=f"'{parent}' is not a folder that can be written.",
            remedy="Give another output folder, or the permission to write there.",
        )


def check_places(out: Path, work: Path, source: Path, *, ours: Callable[[Path], bool]) -> None:
    """Refuses an output folder or a work directory that lies inside what must stay as it is, or one inside the other.

    Args:
        out: the folder to write to, absolute like the others.
        work: the work directory.
        source: the folder that is read.
        ours: says whether a folder is a finished result.
    """
    if out == work or out in work.parents or work in out.parents:
        raise ResumeError(
            f"The work directory '{work}' and the output folder '{out}' are one inside the other.",
            why="The finished output takes the place of what was at its path.",
            remedy="Give another --work-dir, or none: it is then made beside the output.",
        )
    for path, name in ((out, "output folder"), (work, "work directory")):
        check_place(path, name, source, ours=ours)


def check_place(path: Path, name: str, source: Path, *, ours: Callable[[Path], bool]) -> None:
    """The same for one folder, called `name`."""
    if source == path or source in path.parents:
        raise ResumeError(
            f"The {name} '{path}' lies inside the model that is read, '{source}'.",
            why="The source is never written to.",
            remedy="Give a folder elsewhere.",
        )
    if path in source.parents:
        raise ResumeError(
            f"The model that is read, '{source}', lies inside the {name} '{path}'.",
            why="It would be lost when that folder is replaced or cleaned up.",
            remedy="Give a folder elsewhere.",
        )
    if (inside := next((parent for parent in path.parents if ours(parent)), None)) is not None:
        raise ResumeError(
            f"The {name} '{path}' lies inside the finished result '{inside}'.",
            why="That folder holds what its report vouches for, and nothing else.",
            remedy="Give a folder elsewhere.",
        )


def check_free_space(path: Path, needed: int, what: str) -> None:
    """Refuses to start if the disk of `path` (which need not exist) has fewer than `needed` free bytes for `what`."""
    parent = _existing_parent(path)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{what} needs {human_bytes(needed)} on the disk of '{parent}', which has {human_bytes(free)} free.",
            remedy=f"Free {human_bytes(needed - free)}, or give a folder on another disk.",
        )


def assert_accounted(source_names: Iterable[str], replaced: Iterable[str], copied: Iterable[str]) -> None:
    """Checks that every tensor of the source is either replaced or copied, none both, and that there are no others.

    Raises:
        CheckpointError: names the tensors for which this does not hold.
    """
    source, gone, kept = set(source_names), set(replaced), set(copied)
    faults = {
        "neither replaced nor copied": source - gone - kept,
        "both replaced and copied": gone & kept,
        "not in the source": (gone | kept) - source,
    }
    found = [
        f"{len(names)} {fault} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if found:
        raise CheckpointError(
            f"The tensors of the source checkpoint are not all accounted for: {'; '.join(found)}.",
            why="The result would lack weights or hold them twice, so it is not written.",
            remedy="This is a fault of molae_compress, or its plan belongs to another checkpoint; please report it.",
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of the system while writing `path` into `CheckpointError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing_parent(path)).free
            raise CheckpointError(
                f"Disk full while writing '{path}': {human_bytes(free)} free.",
                remedy="Free space and run the same command again, it resumes.",
            ) from error
        raise CheckpointError(
            f"'{path}' cannot be written ({error.strerror or error}).",
            remedy="Check the permissions of the folder and the health of its disk, then run the same command again.",
        ) from error


def _write(path: Path, content: Iterator[bytes]) -> WrittenFile:
    """Writes and forces to disk; a file that cannot be finished is removed, which also gives its space back."""
    digest = hashlib.sha256()
    size = 0
    try:
        with disk_errors(path), open(path, "wb") as file:
            for chunk in content:
                digest.update(chunk)
                size += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return WrittenFile(path.name, size, digest.hexdigest())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() or path == path.parent else _existing_parent(path.parent)


def _occupied(path: Path) -> ResumeError:
    return ResumeError(
        f"The output folder '{path}' exists and is not empty.",
        why="What is in it was not written by this run, and is never overwritten.",
        remedy="Give another output folder, or move that one away.",
    )
