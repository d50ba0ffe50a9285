"""Reading safetensors checkpoints: all headers first, then one tensor at a time.

Notable choices:

- Headers are parsed here, because a plan needs the names, types and shapes of a model of any size in about a second,
  and because a damaged folder must be refused before hours of work, not in the middle of them.
- Tensor bytes are read with plain seek and read into memory of their own. A mapped file would keep every page it has
  touched resident for as long as any handle on it lives.
- Pickles are never opened: loading one runs the code in it.
- A NaN or an infinity in a weight is refused where it is read, with the name of the tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from molae_compress.checkpoint.finite import check_finite
from molae_compress.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CHUNK_BYTES = 16 * 2**20
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The limit of the safetensors library; a larger number means that the first bytes are not a header length at all.
_MAX_HEADER_BYTES = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_AGAIN = "Download or copy it again, and compare its size with the original."
_SAMPLES, _SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class TensorHeader:
    """A tensor of a checkpoint without its values; `dtype` is the safetensors code, e.g. `BF16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type of `dtype`."""
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class TensorEntry(TensorHeader):
    """Where one tensor lies: bytes `start` to `end` of `file`, counted from the start of the file."""

    file: Path
    start: int
    end: int


class StoredTensors(Protocol):
    """What reads and copies tensors of a checkpoint, whether they lie in its files as they are or are made from them."""

    @property
    def path(self) -> Path:
        """The folder, or the file."""

    @property
    def entries(self) -> Mapping[str, TensorHeader]:
        """Tensor name -> type and shape, in the order of the files."""

    @property
    def quantization(self) -> str | None:
        """The method by which the files hold some of the weights in fewer bits; None if every tensor lies there as it is."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as they are read."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as the files hold them."""

    def read(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own; raises `CheckpointError` if it cannot be read or is not finite."""

    def chunks(self, name: str, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yields the bytes of one tensor in pieces of at most `size` bytes, each checked as `read` checks."""

    def fingerprint(self) -> str:
        """A sha256 of what lies in the files."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder, or of a single safetensors file.

    Attributes:
        path: the folder, or the file.
        files: the safetensors files, in the order of their names.
        entries: tensor name -> where it lies, in the order of files and of offsets in them.
        metadata: the string metadata of the headers, merged in the order of files.
    """

    path: Path
    files: tuple[Path, ...]
    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Reads and checks the headers of a model folder or of one safetensors file; no tensor is read.

        Raises:
            CheckpointError: no weights, only pickles, a shard that is missing, truncated or malformed, an index that
                does not agree with its shards, or a data type that torch does not know.
        """
        files, weight_map = _weights_of(path)
        entries: dict[str, TensorEntry] = {}
        metadata: dict[str, str] = {}
        for file in files:
            file_metadata, file_entries = _read_header(file)
            metadata |= file_metadata
            for entry in file_entries:
                if entry.name in entries:
                    raise CheckpointError(
                        f"The tensor '{entry.name}' is stored twice, in '{entries[entry.name].file.name}' and in "
                        f"'{file.name}' of '{path}'.",
                        why="It is not known which of the two is right.",
                        remedy="Remove the file that does not belong to the checkpoint, or download it again.",
                    )
                entries[entry.name] = entry
        for name, file_name in weight_map.items():
            if name not in entries or entries[name].file.name != file_name:
                raise CheckpointError(
                    f"The index of '{path}' places the tensor '{name}' in '{file_name}', which does not hold it.",
                    why="Index and weights come from different versions of the model.",
                    remedy="Download the index and all weights files again.",
                )
        return cls(path, tuple(files), entries, metadata)

    @property
    def quantization(self) -> None:
        """Tensors are read as they lie in the files."""
        return None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def stored_bytes(self) -> int:
        """The same: a tensor is read as it is stored."""
        return self.total_bytes

    def read(self, name: str) -> Tensor:
        """Reads one tensor into memory of its own.

        Raises:
            CheckpointError: the file cannot be read, or a floating tensor holds a NaN or an infinity.
        """
        entry = self.entries[name]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        with _opened(entry.file) as file:
            file.seek(entry.start)
            _fill(file, raw.numpy().data, entry)
        values = raw.view(entry.torch_dtype)
        check_finite(name, values, where=f"in '{entry.file}'", single=values.numel() == 1)
        return values.view(entry.shape)

    def pieces(self, name: str, count: int) -> Iterator[Tensor]:
        """Yields one tensor in flat pieces of `count` numbers, the last maybe of fewer, each checked as `read` checks."""
        entry = self.entries[name]
        itemsize = entry.torch_dtype.itemsize
        with _opened(entry.file) as file:
            file.seek(entry.start)
            for offset in range(0, entry.nbytes, count * itemsize):
                raw = bytearray(min(count * itemsize, entry.nbytes - offset))
                _fill(file, memoryview(raw), entry)
                values = torch.frombuffer(raw, dtype=entry.torch_dtype)
                check_finite(name, values, where=f"in '{entry.file}'", single=entry.nbytes == itemsize)
                yield values

    def chunks(self, name: str, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yields the bytes of one tensor in pieces of at most `size` bytes, each checked as `read` checks."""
        for values in self.pieces(name, max(1, size // self.entries[name].torch_dtype.itemsize)):
            yield values.view(torch.uint8).numpy().tobytes()

    def fingerprint(self) -> str:
        """A sha256 that says whether this is still the same checkpoint, wherever it lies and whenever it was written.

        It covers all names, types, shapes, offsets and file sizes, and a few small samples of the contents of every
        file: two trainings of one architecture have equal headers. It is no checksum of the contents.
        """
        digest = hashlib.sha256()
        for entry in self.entries.values():
            fields = [entry.name, entry.file.name, entry.dtype, entry.shape, entry.start, entry.end]
            digest.update(json.dumps(fields).encode())
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with _opened(path) as file:
                for index in range(_SAMPLES):
                    file.seek(size * index // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """A file opened unbuffered for reading; errors of the system become `CheckpointError`."""
    try:
        with FileIO(path) as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"The weights file '{path}' cannot be read ({error.strerror or error}).",
            remedy="Check that it still exists and that its disk is healthy and mounted.",
        ) from error


def _fill(file: FileIO, view: memoryview, entry: TensorEntry) -> None:
    # One system call reads at most 2 GiB.
    while len(view):
        count = file.readinto(view)
        if not count:
            raise _damaged(entry.file, f"ended inside the tensor '{entry.name}'")
        view = view[count:]


def _damaged(path: Path, detail: str) -> CheckpointError:
    return CheckpointError(
        f"The weights file '{path}' {detail}.",
        why="Its download or copy was interrupted, or it was changed.",
        remedy=_AGAIN,
    )


def _weights_of(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a folder (or the file itself), and the index's tensor name -> file name if any."""
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        raise CheckpointError(f"The model folder '{path}' does not exist.", remedy="Check the path.")
    if (path / INDEX_NAME).exists():
        weight_map = _read_index(path / INDEX_NAME)
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"The checkpoint '{path}' lacks {len(missing)} of the {len(names)} weights files that its index names: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}.",
                why="Its download or copy was interrupted.",
                remedy="Download or copy the missing files.",
            )
        return [path / name for name in names], weight_map
    found = [path / SINGLE_NAME] if (path / SINGLE_NAME).is_file() else sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}
    if found:
        raise CheckpointError(
            f"The folder '{path}' holds {len(found)} safetensors files but no '{INDEX_NAME}'.",
            why="It is not known which of them make up the model.",
            remedy="Download the index of the model too.",
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"The folder '{path}' holds its weights as pickles only ({', '.join(pickles[:3])}).",
            why="Loading a pickle runs whatever code is in it, so they are never opened here.",
            remedy="Use a safetensors release of the model, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors.",
        )
    raise CheckpointError(
        f"The folder '{path}' holds no weights.",
        why=f"Neither '{INDEX_NAME}' nor a *.safetensors file is in it.",
        remedy="Give the folder that holds config.json and the weights of the model.",
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        well_formed = all(isinstance(file, str) and Path(file).name == file for file in weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed or not weight_map:
        raise CheckpointError(
            f"The index '{path}' cannot be read.",
            why='It must be JSON with an entry "weight_map" from tensor names to names of files beside it.',
            remedy=_AGAIN,
        )
    return dict(weight_map)


def _read_header(path: Path) -> tuple[dict[str, str], list[TensorEntry]]:
    """Metadata and tensors (in the order of offsets) of one safetensors file, checked against the size of the file."""
    size = path.stat().st_size
    with _opened(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise _damaged(path, f"is truncated or no safetensors file: {size} bytes, and its header alone {length + 8}")
        if length > _MAX_HEADER_BYTES:
            raise _damaged(path, f"is no safetensors file: its header would have {length} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = dict(header.pop("__metadata__", {}))
        entries = [_entry(path, name, value, 8 + length) for name, value in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"has a malformed header ({error})") from error
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = 8 + length
    for entry in entries:
        if entry.start != position:
            raise _damaged(path, f"has a malformed header: the tensor '{entry.name}' overlaps another or leaves a gap")
        position = entry.end
    if position > size:
        raise _damaged(path, f"is truncated: it has {size} bytes, its header promises {position}")
    if position < size:
        raise _damaged(path, f"has {size - position} bytes more than its header describes")
    return metadata, entries


def _entry(path: Path, name: str, value: dict[str, Any], offset: int) -> TensorEntry:
    """One tensor of a header whose data begin at `offset`; ValueError, KeyError or TypeError if malformed."""
    dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in DTYPES:
        raise CheckpointError(
            f"The tensor '{name}' in '{path}' has the data type '{dtype}', which torch cannot hold.",
            why=f"The types that can be read are {', '.join(DTYPES)}.",
            remedy="Use a release of the model in bfloat16, float16 or float32.",
        )
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"tensor '{name}'")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise ValueError(f"tensor '{name}' of shape {list(shape)} and type {dtype} cannot have {end - start} bytes")
    return TensorEntry(name, dtype, shape, path, offset + start, offset + end)
