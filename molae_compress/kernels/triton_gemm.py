"""Grouped matrix products on the tensor cores: every row has its expert, rows of an expert lie together.

One source for torch (compiled when first called), for the operator library (compiled ahead of time by `gpu_build`) and for
tests (`TRITON_INTERPRET=1`). What each kernel computes is said by a reference in `gpu_reference`. Letters: N columns of
the output, K of the input; BM, BN, BK sizes of a tile; R rows of a tile, C columns of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(gate, up, kind, slope, cubic, limit, up_offset, FAMILY: tl.constexpr, GATED: tl.constexpr):
    """The activation between the two projections, in fp32; see `activation.Activation`.

    FAMILY 0: none. 1: gate * sigmoid(slope * gate + cubic * gate^3), which are silu and gelu_tanh. 2: by `kind`, the
    others. Families are compiled apart: the code of all in one would be most of the kernel.
    """
    if FAMILY > 0:
        if limit > 0.0:
            gate = tl.minimum(gate, limit)
            if GATED:
                up = tl.minimum(tl.maximum(up, -limit), limit)
        if FAMILY == 1:
            gate = gate * tl.sigmoid(gate * (slope + cubic * gate * gate))
        elif kind == 2:
            gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
        elif kind > 0:
            positive = tl.maximum(gate, 0.0)
            gate = tl.where(kind == 5, positive * positive, positive)
    if GATED:
        gate = gate * (up + up_offset)
    return gate


@triton.jit
def product(a_RK, w_KC, acc_RC, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """`acc + a w`, accumulated in fp32."""
    if UPCAST:  # the interpreter multiplies bfloat16 as the integers it keeps them in
        a_RK = a_RK.to(tl.float32)
        w_KC = w_KC.to(tl.float32)
    return tl.dot(a_RK, w_KC, acc_RC, input_precision=PRECISION)


@triton.jit
def weight_tile(w_ptr, k_K, c_C, N, K, WIDTH, TRANSPOSED: tl.constexpr):
    """[BK,BN] of a matrix stored as [K,WIDTH] if transposed, else as [WIDTH,K]; `c_C` are its columns as a product."""
    inside_KC = (k_K < K)[:, None] & (c_C < WIDTH)[None, :]
    place_KC = k_K[:, None] * WIDTH + c_C[None, :] if TRANSPOSED else c_C[None, :] * K + k_K[:, None]
    return tl.load(w_ptr + place_KC, mask=inside_KC, other=0.0)


@triton.jit
def grouped_gemm_kernel(
    a_ptr,
    a_up_ptr,
    w_ptr,
    w_up_ptr,
    out_ptr,
    ends_ptr,
    tiles_ptr,
    order_ptr,
    columns_ptr,
    pivots_ptr,
    bias_ptr,
    row_weight_ptr,
    N,
    K,
    stride_a,
    stride_out,
    rows,
    groups,
    group_size,
    gather,
    scatter,
    weighted,
    has_bias,
    interleaved,
    kind,
    slope,
    cubic,
    limit,
    up_offset,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATE: tl.constexpr,
    FAMILY: tl.constexpr,
    COLUMNS: tl.constexpr,
    ATOMIC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of `a` times the matrix of their group, with bias, gated activation and row weight applied before the store.

    Row i of group g satisfies ends[(g+1) * group_size - 1] > i; `group_size` 0 puts all `rows` in one group and reads no
    `ends`. Row i reads row `order[i] // gather` of `a` (0: row i) and writes row `order[i] // scatter` of `out`
    (0: row i). Programs are persistent: each takes every tile whose number is its own modulo their count, and finds the
    group of a tile among the running sums of `tiles_kernel`, so that nothing is planned on the host.

    GATE: 0 none; 1 gate and up as two tiles of one matrix; 2 the same, columns alternating in a transposed matrix (one tile
    of twice the width, split after the product); 3 gate and up with inputs and matrices of their own.
    COLUMNS: interpolative encode, out = a[pivots] + a[columns] w.   ATOMIC: adds to fp32 rows instead of storing.
    `weighted`: 0 no, 1 by row, 2 by slot `order[i]`.
    """
    grouped = tl.minimum(group_size, 1)
    across = (N + BN - 1) // BN
    total = tl.load(tiles_ptr + groups - 1, mask=grouped > 0, other=(rows + BM - 1) // BM)
    for tile in range(tl.program_id(0), total * across, tl.num_programs(0)):
        down = tile // across
        group_G = tl.arange(0, GROUPS)
        tiles_G = tl.load(tiles_ptr + group_G, mask=group_G < groups * grouped, other=total)
        # int64: products of a group's number and the size of its matrix pass 2^31
        group = tl.sum((tiles_G <= down).to(tl.int32)).to(tl.int64)
        end = tl.load(ends_ptr + (group + 1) * group_size - 1, mask=grouped > 0, other=rows)
        inner = (group > 0) & (grouped > 0)
        first = tl.load(ends_ptr + group * group_size - 1, mask=inner, other=0)
        first += (down - tl.load(tiles_ptr + group - 1, mask=inner, other=0)) * BM
        row_R = first + tl.arange(0, BM)
        inside_R = row_R < end
        ordered = tl.minimum(gather + scatter + weighted // 2, 1)
        slot_R = tl.load(order_ptr + row_R, mask=row_R < end * ordered, other=0)
        from_R = tl.where(gather > 0, slot_R // tl.maximum(gather, 1), row_R).to(tl.int64)
        at = (tile % across) * BN
        c_C = at + tl.arange(0, BN)
        if GATE == 3:
            gate_RC = tile_product(
                a_ptr + from_R * stride_a, inside_R, w_ptr + group * N * K, columns_ptr, c_C, N, K, N,
                BM, BN, BK, TRANSPOSED, COLUMNS, UPCAST, PRECISION,
            )  # fmt: skip
            up_RC = tile_product(
                a_up_ptr + from_R * stride_a, inside_R, w_up_ptr + group * N * K, columns_ptr, c_C, N, K, N,
                BM, BN, BK, TRANSPOSED, COLUMNS, UPCAST, PRECISION,
            )  # fmt: skip
        elif GATE == 2:
            both_RC = tile_product(
                a_ptr + from_R * stride_a, inside_R, w_ptr + group * 2 * N * K, columns_ptr,
                2 * at + tl.arange(0, 2 * BN), N, K, 2 * N,
                BM, 2 * BN, BK, TRANSPOSED, COLUMNS, UPCAST, PRECISION,
            )  # fmt: skip
            gate_RC, up_RC = tl.split(tl.reshape(both_RC, (BM, BN, 2)))
        elif GATE == 1:
            gate_RC, up_RC = pair_product(
                a_ptr + from_R * stride_a, inside_R, w_ptr + group * 2 * N * K, c_C, N, K, interleaved,
                BM, BN, BK, TRANSPOSED, UPCAST, PRECISION,
            )  # fmt: skip
        else:
            gate_RC = tile_product(
                a_ptr + from_R * stride_a, inside_R, w_ptr + group * N * K, columns_ptr + group * K, c_C, N, K, N,
                BM, BN, BK, TRANSPOSED, COLUMNS, UPCAST, PRECISION,
            )  # fmt: skip
            up_RC = gate_RC
        column_C = c_C < N
        inside_RC = inside_R[:, None] & column_C[None, :]
        if COLUMNS:
            pivot_C = tl.load(pivots_ptr + group * N + c_C, mask=column_C, other=0)
            kept_RC = tl.load(a_ptr + from_R[:, None] * stride_a + pivot_C[None, :], mask=inside_RC, other=0.0)
            gate_RC += kept_RC.to(tl.float32)
        if has_bias > 0:
            if GATE == 0:
                gate_RC += tl.load(bias_ptr + group * N + c_C, mask=column_C, other=0.0).to(tl.float32)[None, :]
            else:
                own_ptr = bias_ptr + group * 2 * N
                gate_C = tl.where(interleaved > 0, 2 * c_C, c_C)
                up_C = tl.where(interleaved > 0, 2 * c_C + 1, c_C + N)
                gate_RC += tl.load(own_ptr + gate_C, mask=column_C, other=0.0).to(tl.float32)[None, :]
                up_RC += tl.load(own_ptr + up_C, mask=column_C, other=0.0).to(tl.float32)[None, :]
        value_RC = activated(gate_RC, up_RC, kind, slope, cubic, limit, up_offset, FAMILY, GATE > 0)
        if weighted > 0:
            weight_R = tl.load(row_weight_ptr + tl.where(weighted == 2, slot_R, row_R), mask=inside_R, other=0.0)
            value_RC *= weight_R.to(tl.float32)[:, None]
        to_R = tl.where(scatter > 0, slot_R // tl.maximum(scatter, 1), row_R).to(tl.int64)
        to_RC = out_ptr + to_R[:, None] * stride_out + c_C[None, :]
        if ATOMIC:
            tl.atomic_add(to_RC, value_RC, mask=inside_RC, sem="relaxed")
        else:
            tl.store(to_RC, value_RC.to(out_ptr.dtype.element_ty), mask=inside_RC)


@triton.jit
def tile_product(
    a_R,
    inside_R,
    w_ptr,
    columns_ptr,
    c_C,
    N,
    K,
    WIDTH,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BM,BN] fp32: a tile of the product of the rows that start at `a_R` with one matrix."""
    acc_RC = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, K, BK):
        k_K = first + tl.arange(0, BK)
        inside_RK = inside_R[:, None] & (k_K < K)[None, :]
        read_K = tl.load(columns_ptr + k_K, mask=k_K < K, other=0) if COLUMNS else k_K
        a_RK = tl.load(a_R[:, None] + read_K[None, :], mask=inside_RK, other=0.0)
        w_KC = weight_tile(w_ptr, k_K, c_C, N, K, WIDTH, TRANSPOSED)
        acc_RC = product(a_RK, w_KC, acc_RC, UPCAST, PRECISION)
    return acc_RC


@triton.jit
def pair_product(
    a_R,
    inside_R,
    w_ptr,
    c_C,
    N,
    K,
    interleaved,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Two [BM,BN] fp32 tiles, of gate and up, from one reading of the rows.

    Rows of a matrix that is not transposed may alternate; columns of one that is follow each other.
    """
    gate_RC = tl.zeros((BM, BN), dtype=tl.float32)
    up_RC = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, K, BK):
        k_K = first + tl.arange(0, BK)
        inside_KC = (k_K < K)[:, None] & (c_C < N)[None, :]
        if TRANSPOSED:
            gate_KC = w_ptr + k_K[:, None] * (2 * N) + c_C[None, :]
            up_KC = gate_KC + N
        else:
            gate_C = tl.where(interleaved > 0, 2 * c_C, c_C)
            gate_KC = w_ptr + gate_C[None, :] * K + k_K[:, None]
            up_KC = gate_KC + tl.where(interleaved > 0, 1, N) * K
        a_RK = tl.load(a_R[:, None] + k_K[None, :], mask=inside_R[:, None] & (k_K < K)[None, :], other=0.0)
        gate_RC = product(a_RK, tl.load(gate_KC, mask=inside_KC, other=0.0), gate_RC, UPCAST, PRECISION)
        up_RC = product(a_RK, tl.load(up_KC, mask=inside_KC, other=0.0), up_RC, UPCAST, PRECISION)
    return gate_RC, up_RC
