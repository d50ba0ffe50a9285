"""Quantised checkpoints read as plain ones: a packed weight and its scales are one bfloat16 tensor to everybody else.

Two formats are understood, those of DeepSeek-V3 and of gpt-oss (`packed`); any other is refused by name. Notable choices:

- What lies in the files decides, as where transformers dequantises: a weight with scales is dequantised, a tensor of a
  plain type is passed on bit for bit, whatever `modules_to_not_convert` says of either.
- Every tensor of the files belongs to exactly one tensor that is read. A weight without its scales, or scales without
  their weight, are refused: cast as it is, such a weight would be off by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molae_compress.checkpoint.finite import check_finite
from molae_compress.checkpoint.packed import AT_A_TIME, FORMATS, PackedTensor, refuse_packed
from molae_compress.checkpoint.reader import CHUNK_BYTES, Checkpoint, StoredTensors, TensorHeader
from molae_compress.errors import CheckpointError

_CONFIG_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class DequantizedCheckpoint:
    """A checkpoint with packed weights, read as if it held them in bfloat16; all other tensors are as they lie there.

    Attributes:
        stored: the files.
        quantization: the method, as config.json names it.
        entries: tensor name -> type and shape as it is read; a packed tensor stands where its weight lies.
    """

    stored: Checkpoint
    quantization: str
    entries: dict[str, TensorHeader]
    _packed: Mapping[str, PackedTensor]

    @classmethod
    def of(cls, stored: Checkpoint, quantization: str, packed: Mapping[str, PackedTensor]) -> DequantizedCheckpoint:
        """Puts tensors that are made of several in their place."""
        at = {tensor.parts[0]: tensor for tensor in packed.values()}
        hidden = {part for tensor in packed.values() for part in tensor.parts}
        assert len(hidden) == sum(len(tensor.parts) for tensor in packed.values()), "a stored tensor belongs to two"
        read: list[TensorHeader] = [
            at[name].header if name in at else entry
            for name, entry in stored.entries.items()
            if name in at or name not in hidden
        ]
        return cls(stored, quantization, {entry.name: entry for entry in read}, packed)

    @property
    def path(self) -> Path:
        """The folder."""
        return self.stored.path

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return self.stored.files

    @property
    def metadata(self) -> dict[str, str]:
        """The string metadata of their headers."""
        return self.stored.metadata

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as they are read."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as the files hold them."""
        return self.stored.total_bytes

    def read(self, name: str) -> Tensor:
        """Reads or dequantises one tensor.

        Raises:
            CheckpointError: a file cannot be read, or a value of the tensor or of its scales is not finite.
        """
        if name not in self._packed:
            return self.stored.read(name)
        entry, first = self.entries[name], 0
        values = torch.empty(math.prod(entry.shape), dtype=entry.torch_dtype)
        for piece in self._pieces(name, AT_A_TIME):
            values[first : first + len(piece)] = piece
            first += len(piece)
        assert first == len(values)
        return values.view(entry.shape)

    def chunks(self, name: str, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yields the bytes of one tensor in pieces of at most `size` bytes, each checked as `read` checks."""
        if name not in self._packed:
            yield from self.stored.chunks(name, size)
            return
        for piece in self._pieces(name, max(1, size // self.entries[name].torch_dtype.itemsize)):
            yield piece.view(torch.uint8).numpy().tobytes()

    def fingerprint(self) -> str:
        """That of the files; how they are read follows from config.json, which it does not cover."""
        return self.stored.fingerprint()

    def _pieces(self, name: str, count: int) -> Iterator[Tensor]:
        for piece in self._packed[name].pieces(self.stored, count):
            check_finite(name, piece, where=f"dequantised from '{self.path}'")
            yield piece


def open_source(folder: Path, config: Mapping[str, Any]) -> StoredTensors:
    """Opens a checkpoint that is to be compressed or compared with: plain, or in a quantised format that is understood.

    Args:
        folder: of the model.
        config: its parsed `config.json`.

    Raises:
        CheckpointError: the files cannot be read, their quantisation is not understood or disagrees with `config`, or a
            packed weight and its scales do not fit each other.
    """
    settings = _settings(config)
    if not settings:
        checkpoint = Checkpoint.open(folder)
        refuse_packed(checkpoint.entries.values(), "config.json has no quantization_config that says how to read it")
        return checkpoint
    for entry in settings:
        if _method(entry) not in FORMATS:
            raise _unknown(_method(entry))
    if any(entry != settings[0] for entry in settings):
        raise CheckpointError(
            f"config.json says {len(settings)} different things about how the weights are quantised: "
            f"{', '.join(map(str, settings))}.",
            why="It is not known which of them holds for a tensor.",
            remedy="Use the unquantised release of the model.",
        )
    checkpoint, method = Checkpoint.open(folder), _method(settings[0])
    unpack, ending = FORMATS[method]
    packed = unpack(checkpoint.entries, settings[0])
    source = DequantizedCheckpoint.of(checkpoint, method, packed)
    plain = [entry for name, entry in source.entries.items() if entry is checkpoint.entries.get(name)]
    refuse_packed(plain, f"no scales are beside it, which the method '{method}' names '<weight>{ending}'")
    if not packed:
        raise CheckpointError(
            f"config.json says that weights are quantised with the method '{method}', but no tensor in '{folder}' is.",
            why="Configuration and weights belong to different releases, or the weights are packed in another format.",
            remedy="Download both again; if the weights are plain, remove quantization_config from config.json.",
        )
    return source


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a parsed `config.json`, without what it and the configurations in it say about quantised weights."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _CONFIG_KEYS
    }


def _settings(config: Mapping[str, Any]) -> list[Any]:
    """What a configuration and those nested in it say about quantisation."""
    found = [config[key] for key in _CONFIG_KEYS if config.get(key)]
    nested = [value for key, value in config.items() if isinstance(value, dict) and key not in _CONFIG_KEYS]
    return found + [entry for value in nested for entry in _settings(value)]


def _method(entry: Any) -> str:
    """The name of a quantisation method; bitsandbytes once wrote none."""
    if not isinstance(entry, dict):
        return f"unknown: {entry}"
    bits = entry.get("load_in_8bit") or entry.get("load_in_4bit")
    return str(entry.get("quant_method", "bitsandbytes" if bits else "unknown"))


def _unknown(method: str) -> CheckpointError:
    if method == "molae":
        return CheckpointError(
            "This model is compressed by molae_compress already ('quant_method': 'molae' in its config.json).",
            remedy="Compress the original model, or write a dense copy with 'molae-compress expand' first.",
        )
    return CheckpointError(
        f"The weights of this model are quantised with the method '{method}' (quantization_config in its config.json).",
        why=f"Only plain floating-point weights can be factorised; of the quantised ones {' and '.join(FORMATS)} are read "
        "as such.",
        remedy="Use the unquantised release of the model; or, if transformers can undo this method, load it, call "
        "model.dequantize(), save it with save_pretrained, and compress that folder.",
    )
