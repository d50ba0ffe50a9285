"""A sequence of tensors that stays in memory up to a limit and goes to disk above it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from molae_compress.checkpoint.writer import disk_errors
from molae_compress.errors import CheckpointError


class ArrayStore:
    """Tensors by number, e.g. the hidden states of every calibration batch, given back bit for bit on the CPU.

    The first tensors stay in memory, as long as they fit under the limit; each of the others is one file in `folder`,
    which is created when the first is written. The files hold nothing but the bytes: the store is no part of what a run
    resumes from.
    """

    def __init__(self, folder: Path, *, memory_limit: int) -> None:
        """`memory_limit` is in bytes; 0 keeps nothing in memory."""
        self._folder = folder
        self._limit = memory_limit
        self._resident: dict[int, Tensor] = {}
        self._spilled: dict[int, tuple[torch.dtype, torch.Size]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        """How many tensors are stored."""
        return len(self._resident) + len(self._spilled)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the tensors held in memory, never above the limit."""
        return self._bytes

    def put(self, i: int, tensor: Tensor) -> None:
        """Stores a tensor under the number `i`, replacing the one that is there.

        A tensor that is kept in memory is not copied, unless it is a view of something larger: don't write into it.

        Raises:
            CheckpointError: the disk is full or cannot be written.
        """
        self._drop(i)
        values = tensor.detach().cpu()
        if self._bytes + values.nbytes <= self._limit:
            whole = values.untyped_storage().nbytes() == values.nbytes
            self._resident[i] = values if whole else values.clone()
            self._bytes += values.nbytes
            return
        with disk_errors(self._path(i)):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._path(i), "wb") as file:
                file.write(_bytes_of(values.contiguous()))
        self._spilled[i] = values.dtype, values.shape

    def get(self, i: int) -> Tensor:
        """The tensor with the number `i`; don't write into it.

        Raises:
            CheckpointError: its file is gone or damaged.
        """
        if i in self._resident:
            return self._resident[i]
        dtype, shape = self._spilled[i]
        values = torch.empty(shape, dtype=dtype)
        try:
            with open(self._path(i), "rb") as file:
                count = file.readinto(_bytes_of(values))
        except OSError:
            count = -1
        if count != values.nbytes:
            raise CheckpointError(
                f"The file '{self._path(i)}' was removed or truncated while the run was using it.",
                remedy="Keep other programs out of the work directory, and run the same command again, it resumes.",
            )
        return values

    def clear(self) -> None:
        """Forgets all tensors and removes their files, and the folder if nothing else is in it."""
        for i in [*self._resident, *self._spilled]:
            self._drop(i)
        with disk_errors(self._folder):
            if self._folder.is_dir() and not any(self._folder.iterdir()):
                self._folder.rmdir()

    def _drop(self, i: int) -> None:
        if i in self._resident:
            self._bytes -= self._resident.pop(i).nbytes
        if i in self._spilled:
            del self._spilled[i]
            self._path(i).unlink(missing_ok=True)

    def _path(self, i: int) -> Path:
        return self._folder / f"{i:06d}.bin"


def _bytes_of(contiguous: Tensor) -> memoryview:
    return contiguous.view(-1).view(torch.uint8).numpy().data
