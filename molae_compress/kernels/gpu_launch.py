"""The kernels as functions of torch tensors: one function launches one kernel (or the three of a sort).

On CUDA tensors they compile when first called; under `TRITON_INTERPRET=1` they run on CPU. Import this module only where
they are used: it imports triton. Shape suffixes: see `molae_compress.tensors`; N and M are widths.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from molae_compress.kernels.activation import Activation
from molae_compress.kernels.gpu_operands import Columns, Matrices, Rows, Slots
from molae_compress.kernels.gpu_tiles import (
    COLUMNS_BLOCK,
    COMBINE_BLOCK,
    FEW_STAGES,
    FEW_WARPS,
    MAX_GROUPS,
    ONE_GROUP_WARPS,
    SCAN_CHUNK,
    SORT_BLOCK,
    Tile,
    bins_for,
    few_tile,
    fitted,
    programs_for,
    steps_for,
    tile_for,
)
from molae_compress.kernels.triton_few import few_combine_kernel, few_rows_kernel
from molae_compress.kernels.triton_gemm import grouped_gemm_kernel
from molae_compress.kernels.triton_rows import (
    columns_kernel,
    combine_kernel,
    count_kernel,
    place_kernel,
    scan_kernel,
    tiles_kernel,
)

INTERPRETED_PROGRAMS = 3  # few, so that a persistent program has several tiles


def sort_slots(index_TK: Tensor, experts: int) -> Slots:
    """Sorts the slots by expert, stably. Indices outside 0..E-1 are of no expert.

    Args:
        index_TK: int64, contiguous.
        experts: E.
    """
    slots, like = index_TK.numel(), index_TK.new_empty(0, dtype=torch.int32)
    blocks = triton.cdiv(slots, SORT_BLOCK)
    counts_EB = like.new_empty((experts + 1) * blocks)
    order_S, ends_E = like.new_empty(slots), like.new_empty(experts)
    count_kernel[(blocks,)](index_TK, counts_EB, slots, experts, BLOCK=SORT_BLOCK, BINS=bins_for(experts))
    scan_kernel[(1,)](counts_EB, ends_E, blocks, experts, CHUNK=SCAN_CHUNK)
    place_kernel[(blocks,)](index_TK, counts_EB, order_S, slots, experts, BLOCK=SORT_BLOCK)
    return Slots(order_S, ends_E, index_TK.shape[1])


def other_columns(pivots: Tensor, groups: int, hidden: int) -> Columns:
    """The columns that are no pivots. `pivots` is int32 [G*R], ascending inside a group."""
    rank = pivots.shape[0] // groups
    columns = Columns(pivots, pivots.new_empty(groups * (hidden - rank)), pivots.new_empty(groups * hidden), rank)
    grid = (groups, triton.cdiv(hidden, COLUMNS_BLOCK))
    columns_kernel[grid](pivots, columns.rest, columns.position, hidden, rank, STEPS=steps_for(rank), BLOCK=COLUMNS_BLOCK)
    return columns


def grouped_gemm(
    a: Tensor,
    matrices: Matrices,
    rows: Rows,
    *,
    a_up: Tensor | None = None,
    columns: Columns | None = None,
    row_weight: Tensor | None = None,
    add_to: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Rows of `a` times the matrix of their group: `[rows.count, N]`; rows of no group are undefined.

    Args:
        a: input rows, contiguous.
        matrices: one for each group.
        rows: where they are read and written.
        a_up: inputs of `matrices.weight_up`.
        columns: the input side is interpolative: `a[pivots] + a[rest] w`.
        row_weight: multiplies the output; by slot where rows have slots, else by row.
        add_to: fp32 [.,N] to which the output is added, in any order, in place of being returned.
        tile: another one than `tile_for` chooses.
    """
    weight, N = matrices.weight, matrices.width
    groups, K = weight.shape[0], weight.shape[1 if matrices.transposed else 2]
    out = a.new_empty(rows.count, N) if add_to is None else add_to
    exact = a.dtype == torch.float32
    chosen = tile or tile_for(rows.count, groups, gathered=columns is not None, exact=exact)
    tile = fitted(chosen, _architecture(a), gated=matrices.gate > 0)
    slots, bias, none = rows.slots, matrices.bias, _no_integers(a)
    if rows.count == 0 or N == 0:
        return out
    programs = programs_for(tile, rows.count, groups, N, matrices.gate > 0, _multiprocessors(a))
    tiles_G = none if slots is None else _tiles(slots, groups, rows.group_size, tile)
    grouped_gemm_kernel[(programs,)](
        a,
        a if a_up is None else a_up,
        weight,
        weight if matrices.weight_up is None else matrices.weight_up,
        out,
        none if slots is None else slots.ends_E,
        tiles_G,
        none if slots is None else slots.order_S,
        none if columns is None else columns.rest,
        none if columns is None else columns.pivots,
        a if bias is None else bias,
        a if row_weight is None else row_weight,
        N,
        K,
        a.shape[1],
        N,
        rows.count,
        groups,
        0 if slots is None else rows.group_size,
        rows.gather,
        rows.scatter,
        0 if row_weight is None else 1 if slots is None else 2,
        int(bias is not None),
        int(matrices.interleaved),
        *_activation(matrices.activation),
        BM=tile.rows,
        BN=tile.columns_of(matrices.gate > 0),
        BK=tile.depth,
        GROUPS=_padded(groups),
        TRANSPOSED=matrices.transposed,
        GATE=matrices.gate,
        FAMILY=matrices.activation.family,
        COLUMNS=columns is not None,
        ATOMIC=add_to is not None,
        UPCAST=_is_interpreted() and a.dtype == torch.bfloat16,
        PRECISION="ieee" if exact else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def few_rows(
    a: Tensor,
    matrices: Matrices,
    count: int,
    *,
    index_TK: Tensor | None = None,
    experts: int = 1,
    group_size: int = 1,
    gather: int = 1,
    a_up: Tensor | None = None,
    columns: Columns | None = None,
) -> Tensor:
    """`[count,N]`: row i is row `i // gather` of `a` times the matrix of the group of expert `index_TK.view(-1)[i]`.

    Without an index all rows are of group 0. Rows of no expert are undefined. Other arguments as for `grouped_gemm`.
    """
    weight, N, bias = matrices.weight, matrices.width, matrices.bias
    K = weight.shape[1 if matrices.transposed else 2]
    out, none = a.new_empty(count, N), _no_integers(a)
    BN, BK = few_tile(matrices.transposed)
    if count == 0 or N == 0:
        return out
    few_rows_kernel[(count, triton.cdiv(N, BN))](
        a,
        a if a_up is None else a_up,
        weight,
        weight if matrices.weight_up is None else matrices.weight_up,
        out,
        none if index_TK is None else index_TK,
        none if columns is None else columns.rest,
        none if columns is None else columns.pivots,
        a if bias is None else bias,
        N,
        K,
        a.shape[1],
        experts,
        group_size,
        gather,
        int(index_TK is not None),
        int(bias is not None),
        int(matrices.interleaved),
        *_activation(matrices.activation),
        BN=BN,
        BK=BK,
        TRANSPOSED=matrices.transposed,
        GATE=matrices.gate,
        FAMILY=matrices.activation.family,
        COLUMNS=columns is not None,
        STAGES=FEW_STAGES,
        num_warps=FEW_WARPS,
    )
    return out


def few_combine(
    a_SK: Tensor,
    matrices: Matrices,
    index_TK: Tensor,
    weight_TK: Tensor,
    *,
    experts: int,
    group_size: int,
    bias_EN: Tensor | None = None,
) -> Tensor:
    """`[T,N]`: the sum over a token's experts of routing weight times (row times matrix of its group, plus bias)."""
    weight, N = matrices.weight, matrices.width
    (T, top_k), K = index_TK.shape, a_SK.shape[1]
    out_TN = a_SK.new_empty(T, N)
    BN, BK = few_tile(matrices.transposed)
    if T:
        few_combine_kernel[(T, triton.cdiv(N, BN))](
            a_SK,
            weight,
            out_TN,
            index_TK,
            weight_TK,
            a_SK if bias_EN is None else bias_EN,
            N,
            K,
            top_k,
            experts,
            group_size,
            int(bias_EN is not None),
            BN=BN,
            BK=BK,
            TRANSPOSED=matrices.transposed,
            ONE_GROUP=weight.shape[0] == 1,
            STAGES=FEW_STAGES,
            num_warps=ONE_GROUP_WARPS if weight.shape[0] == 1 else FEW_WARPS,
        )
    return out_TN


def combine(
    out_TN: Tensor,
    *,
    experts: int = 1,
    value_SN: Tensor | None = None,
    kept_SR: Tensor | None = None,
    columns: Columns | None = None,
    group_size: int = 1,
    index_TK: Tensor | None = None,
    weight_TK: Tensor | None = None,
    bias_EN: Tensor | None = None,
    base_TN: Tensor | None = None,
) -> Tensor:
    """Writes and returns `out_TN`: base + the sum over a token's slots of weight * (value + bias of its expert).

    Args:
        out_TN: written; may be `base_TN`.
        experts: E; slots whose index is outside 0..E-1 are left out.
        value_SN: a row for each slot; in the order of (pivots, rest) without the pivots where `columns` are given.
        kept_SR: what belongs at the pivots.
        columns: the output side is interpolative.
        group_size: experts that share pivots.
        index_TK: experts of each token; without it a token has one slot, of expert 0.
        weight_TK: routing weights; 1 without.
        bias_EN: added to each slot.
        base_TN: where the sum starts.
    """
    like, none = out_TN, _no_integers(out_TN)
    T, N = out_TN.shape
    if T == 0:
        return out_TN
    combine_kernel[(T, triton.cdiv(N, COMBINE_BLOCK))](
        like if value_SN is None else value_SN,
        like if kept_SR is None else kept_SR,
        none if columns is None else columns.position,
        none if index_TK is None else index_TK,
        like if weight_TK is None else weight_TK,
        like if bias_EN is None else bias_EN,
        like if base_TN is None else base_TN,
        out_TN,
        N,
        0 if columns is None else columns.rank,
        1 if index_TK is None else index_TK.shape[1],
        experts,
        group_size,
        int(index_TK is not None),
        int(weight_TK is not None),
        int(value_SN is not None),
        int(bias_EN is not None),
        int(base_TN is not None),
        POSITION=columns is not None,
        BN=COMBINE_BLOCK,
    )
    return out_TN


def _tiles(slots: Slots, groups: int, group_size: int, tile: Tile) -> Tensor:
    """`[G]` int32: tiles of all groups up to each."""
    tiles_G = slots.ends_E.new_empty(groups)
    tiles_kernel[(1,)](slots.ends_E, tiles_G, groups, group_size, tile.rows, GROUPS=_padded(groups))
    return tiles_G


def _padded(groups: int) -> int:
    return 16 if groups <= 16 else MAX_GROUPS


def _activation(activation: Activation) -> tuple[int, float, float, float, float]:
    return activation.code, *activation.slopes, float(activation.limit), float(activation.up_offset)


def _no_integers(like: Tensor) -> Tensor:
    """What stands for a list of integers that a kernel does not read: pointers have a type."""
    return like.new_empty(0, dtype=torch.int32)


def _is_interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _architecture(a: Tensor) -> int:
    if a.device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(a.device)
    return 10 * major + minor


def _multiprocessors(a: Tensor) -> int:
    if a.device.type != "cuda":
        return INTERPRETED_PROGRAMS
    properties: Any = torch.cuda.get_device_properties(a.device)
    return int(properties.multi_processor_count)
