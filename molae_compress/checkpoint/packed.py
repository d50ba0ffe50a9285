"""Weights in few bits with scales, in the formats that are read: which tensors of a checkpoint they are, and their values.

- The size of a block comes from config.json and the number of scales must fit it. It does not follow from that number:
  24 rows under two scales may be blocks of 12, or a block of 16 and the rest.
- Products are made in float32 and rounded to bfloat16 once.

Shape suffixes: E experts, R rows of one matrix, C columns of it, N some rows of one or several, B bytes of a row, W groups
of 32 numbers in a row; S rows of scales, those of all matrices of a stack, D columns of scales.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molae_compress.checkpoint.finite import check_finite, decoded
from molae_compress.checkpoint.reader import Checkpoint, TensorEntry, TensorHeader
from molae_compress.errors import CheckpointError

AT_A_TIME = 2**18  # numbers dequantised together: few enough for a cache

_SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")  # the last are the exponents of F8_E8M0 as well
_DEFAULT_BLOCK = (128, 128)  # of transformers, where config.json names none

# The sixteen numbers of four bits (E2M1), by their code.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_MXFP4_PART = re.compile(r"(?P<weight>.+)_(?P<part>blocks|scales)")
_MXFP4_WEIGHTS = ("gate_up_proj", "down_proj")
_MXFP4_BYTES = 16  # of a group of 32 numbers


@dataclass(frozen=True)
class BlockFp8:
    """A matrix, or a stack of them, in F8_E4M3, with one scale for each block of `block` rows and columns."""

    weight: TensorEntry
    scales: TensorEntry
    block: tuple[int, int]
    others: tuple[str, ...] = ()  # scales of activations, which mean nothing to a plain weight

    @property
    def header(self) -> TensorHeader:
        return TensorHeader(self.weight.name, "BF16", self.weight.shape)

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.weight.name, self.scales.name, *self.others)

    def pieces(self, stored: Checkpoint, count: int) -> Iterator[Tensor]:
        """Yields the values in order, some rows at a time."""
        rows, columns = self.weight.shape[-2:]
        in_rows, in_columns = self.block
        scales_SD = _scales(stored, self.scales).float().view(-1, math.ceil(columns / in_columns))
        scales_SD = scales_SD.expand(math.prod(self.weight.shape[:-2]) * math.ceil(rows / in_rows), -1)
        first = 0
        for flat in stored.pieces(self.weight.name, max(1, min(count, AT_A_TIME) // columns) * columns):
            weight_NC = decoded(flat).view(-1, columns)
            row_N = torch.arange(first, first + len(weight_NC))
            scale_row_N = row_N // rows * math.ceil(rows / in_rows) + row_N % rows // in_rows
            scales_NC = scales_SD[scale_row_N].repeat_interleave(in_columns, dim=1)[:, :columns]
            first += len(weight_NC)
            yield from weight_NC.mul_(scales_NC).bfloat16().flatten().split(count)


@dataclass(frozen=True)
class Mxfp4:
    """A stack of matrices in numbers of four bits, two in a byte, with one power of two for 32 of them in a row.

    `blocks` is [E,R,W,16] and `scales` [E,R,W]; the parameter they make is transposed, [E,32*W,R].
    """

    weight: str
    blocks: TensorEntry
    scales: TensorEntry

    @property
    def header(self) -> TensorHeader:
        experts, rows, groups, _ = self.blocks.shape
        return TensorHeader(self.weight, "BF16", (experts, 2 * _MXFP4_BYTES * groups, rows))

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.blocks.name, self.scales.name)

    def pieces(self, stored: Checkpoint, count: int) -> Iterator[Tensor]:
        """Yields the values in order; one expert is dequantised at a time."""
        _, columns, rows = self.header.shape
        numbers = torch.tensor(_FP4, dtype=torch.bfloat16)
        # By byte, the lower half of which comes first; a pair is moved as one number.
        pairs = torch.stack([numbers.repeat(16), numbers.repeat_interleave(16)], dim=1).view(torch.int32).flatten()
        step = max(1, AT_A_TIME // columns)
        for packed, scales_RW in zip(
            stored.pieces(self.blocks.name, rows * columns // 2), _scales(stored, self.scales), strict=True
        ):
            weight_CR = torch.empty(columns, rows, dtype=torch.bfloat16)
            for row, bytes_NB in enumerate(packed.view(rows, -1).split(step)):
                here = slice(row * step, row * step + len(bytes_NB))
                values = pairs.index_select(0, bytes_NB.flatten().int()).view(torch.bfloat16)
                values_NW32 = values.view(len(bytes_NB), -1, 2 * _MXFP4_BYTES)
                # The scale is a power of two: the product is exact, or too large, which is refused.
                weight_CR[:, here] = (values_NW32 * scales_RW[here].bfloat16().unsqueeze(-1)).flatten(1).T
            yield from weight_CR.flatten().split(count)


PackedTensor = BlockFp8 | Mxfp4


def _block_fp8(entries: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> dict[str, PackedTensor]:
    """The weights that have a tensor `<weight>_scale_inv` beside them."""
    block = _block_size(settings)
    packed: dict[str, PackedTensor] = {}
    for name, scales in entries.items():
        if not name.endswith("_scale_inv"):
            continue
        weight = entries.get(name.removesuffix("_scale_inv"))
        if weight is None:
            raise _unfit(name, f"are the scales of '{name.removesuffix('_scale_inv')}', which is not there", "scales")
        _check_type(weight, "F8_E4M3")
        _check_type(scales, *_SCALE_TYPES)
        fitting = _fitting_block(weight, scales, block)
        own = weight.name.removesuffix("weight") if weight.name.endswith(".weight") else f"{weight.name}_"
        others = (f"{own}activation_scale",) if f"{own}activation_scale" in entries else ()
        packed[weight.name] = BlockFp8(weight, scales, fitting, others)
    return packed


def _block_size(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if a whole matrix does."""
    if settings.get("expert_dtype", "fp8") == "fp8":
        match settings.get("weight_block_size", _DEFAULT_BLOCK):
            case None:
                return None
            case (int(rows), int(columns)) if rows > 0 and columns > 0:
                return rows, columns
    asked = {key: settings[key] for key in ("expert_dtype", "weight_block_size") if key in settings}
    raise CheckpointError(
        f"The weights of this model are quantised with a variant of the method 'fp8' that is not read here: {asked}.",
        why="Understood are F8_E4M3 numbers with one scale for each block of a matrix, or one for all of it.",
        remedy="Use the unquantised release of the model, or one with plain block-wise fp8.",
    )


def _fitting_block(weight: TensorEntry, scales: TensorEntry, block: tuple[int, int] | None) -> tuple[int, int]:
    """The block each scale stands for, once the shapes are known to fit."""
    if len(weight.shape) < 2 or 0 in weight.shape:
        raise _unfit(weight.name, f"has the shape {list(weight.shape)}, which is no matrix")
    *stack, rows, columns = weight.shape
    if block is None:
        if math.prod(scales.shape) not in (1, math.prod(stack)):
            expected = f"one number for each of its {math.prod(stack)} matrices" if stack else "one number"
            raise _unfit(weight.name, f"has scales of shape {list(scales.shape)} instead of {expected}")
        return rows, columns
    expected_shape = (*stack, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    if scales.shape != expected_shape:
        raise _unfit(
            weight.name,
            f"has scales of shape {list(scales.shape)} instead of {list(expected_shape)}, for its shape "
            f"{list(weight.shape)} in blocks of {block[0]} x {block[1]}",
        )
    return block


def _mxfp4(entries: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> dict[str, PackedTensor]:
    """The experts that lie there as `<weight>_blocks` and `<weight>_scales`."""
    packed: dict[str, PackedTensor] = {}
    for name in entries:
        match = _MXFP4_PART.fullmatch(name)
        if match is None:
            continue
        weight, other = match["weight"], {"blocks": "scales", "scales": "blocks"}[match["part"]]
        if not weight.endswith(_MXFP4_WEIGHTS):
            raise _unfit(name, f"is none of those that are known to be packed so ({', '.join(_MXFP4_WEIGHTS)} of gpt-oss)")
        if f"{weight}_{other}" not in entries:
            raise _unfit(name, f"lies there without '{weight}_{other}'")
        if weight in entries:
            raise _unfit(weight, f"lies there twice, plain and as '{name}'")
        blocks, scales = entries[f"{weight}_blocks"], entries[f"{weight}_scales"]
        _check_type(blocks, "U8")
        _check_type(scales, "U8")
        if len(blocks.shape) != 4 or 0 in blocks.shape or blocks.shape != (*scales.shape, _MXFP4_BYTES):
            raise _unfit(
                blocks.name,
                f"has the shape {list(blocks.shape)} and its scales {list(scales.shape)}, instead of "
                f"[experts, rows, groups, {_MXFP4_BYTES}] and [experts, rows, groups]",
            )
        packed[weight] = Mxfp4(weight, blocks, scales)
    return packed


_Finder = Callable[[Mapping[str, TensorEntry], Mapping[str, Any]], dict[str, PackedTensor]]

# Method -> what finds its tensors among those of a checkpoint, given its quantization_config; and the ending of its scales.
FORMATS: dict[str, tuple[_Finder, str]] = {
    "fp8": (_block_fp8, "_scale_inv"),
    "mxfp4": (_mxfp4, "_scales"),
}


def _scales(stored: Checkpoint, entry: TensorEntry) -> Tensor:
    """Scales in a floating type; bytes are exponents, from 2^-127 to 2^127."""
    scales = stored.read(entry.name)
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
        check_finite(entry.name, scales.flatten(), where=f"in '{entry.file}'")
    return scales


def _check_type(entry: TensorEntry, *allowed: str) -> None:
    if entry.dtype not in allowed:
        raise _unfit(entry.name, f"has the type {entry.dtype} instead of {' or '.join(allowed)}")


def refuse_packed(entries: Iterable[TensorHeader], fault: str) -> None:
    """Refuses what can only be the numbers or scales of a quantised weight, where nothing says how to read them."""
    for entry in entries:
        match = _MXFP4_PART.fullmatch(entry.name)
        is_mxfp4 = match is not None and match["weight"].endswith(_MXFP4_WEIGHTS) and entry.dtype == "U8"
        if is_mxfp4 or entry.dtype.startswith("F8_"):
            raise _unfit(entry.name, f"has the type {entry.dtype}, but {fault}")


def _unfit(name: str, fault: str, noun: str = "tensor") -> CheckpointError:
    return CheckpointError(
        f"The quantised {noun} '{name}' {fault}.",
        why="Without scales that fit, the numbers of a quantised weight mean nothing.",
        remedy="Download config.json and all weights files of the same version of the model again, or use its "
        "unquantised release.",
    )
