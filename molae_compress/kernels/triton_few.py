"""Products of a few rows: no sort, no tensor cores, the matrices of the experts hit read once from memory.

With a few tokens the time goes into reading weights, one product a number; rows need no tile, so every slot is worked on by
itself and finds its expert in the routing table. Letters: N columns of the output, K of the input; C, K of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from molae_compress.kernels.triton_gemm import activated


@triton.jit
def partial_sums(
    acc,
    a_ptr,
    w_ptr,
    columns_ptr,
    c_C,
    step,
    shift,
    scale,
    K,
    WIDTH,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds `scale * a w` to `acc`, which is summed over its axis of K at the very end.

    Column c of the product is column `step * c + shift` of a matrix [K,WIDTH] if transposed, else that row of [WIDTH,K].
    """
    for first in tl.range(0, K, BK, num_stages=STAGES):
        k_K = first + tl.arange(0, BK)
        read_K = tl.load(columns_ptr + k_K, mask=k_K < K, other=0) if COLUMNS else k_K
        a_K = tl.load(a_ptr + read_K, mask=k_K < K, other=0.0).to(tl.float32) * scale
        at_C = step * c_C + shift
        if TRANSPOSED:
            inside = (k_K < K)[:, None] & (at_C < WIDTH)[None, :]
            acc += a_K[:, None] * tl.load(w_ptr + k_K[:, None] * WIDTH + at_C[None, :], mask=inside, other=0.0)
        else:
            inside = (at_C < WIDTH)[:, None] & (k_K < K)[None, :]
            acc += a_K[None, :] * tl.load(w_ptr + at_C[:, None] * K + k_K[None, :], mask=inside, other=0.0)
    return acc


@triton.jit
def few_rows_kernel(
    a_ptr,
    a_up_ptr,
    w_ptr,
    w_up_ptr,
    out_ptr,
    index_ptr,
    columns_ptr,
    pivots_ptr,
    bias_ptr,
    N,
    K,
    stride_a,
    experts,
    group_size,
    gather,
    has_index,
    has_bias,
    interleaved,
    kind,
    slope,
    cubic,
    limit,
    up_offset,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATE: tl.constexpr,
    FAMILY: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[i] = a[i // gather] times the matrix of the group of expert index[i], with bias and gated activation.

    Without an index all rows are of group 0. Rows of no expert are left as they are. GATE and COLUMNS as in
    `grouped_gemm_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(index_ptr + row, mask=has_index > 0, other=0).to(tl.int64)
    if (expert >= 0) & (expert < experts):
        group = expert // group_size
        c_C = tl.program_id(1) * BN + tl.arange(0, BN)
        column_C = c_C < N
        a_row = row // gather * stride_a
        if GATE == 2:
            both = tl.zeros((BK, 2 * BN), dtype=tl.float32)
            b_C = tl.program_id(1) * 2 * BN + tl.arange(0, 2 * BN)
            both = partial_sums(
                both,
                a_ptr + a_row,
                w_ptr + group * 2 * N * K,
                columns_ptr,
                b_C,
                1,
                0,
                1.0,
                K,
                2 * N,
                BK,
                True,
                False,
                STAGES,
            )
            gate_C, up_C = tl.split(tl.reshape(tl.sum(both, axis=0), (BN, 2)))
        else:
            acc = tl.zeros((BK, BN) if TRANSPOSED else (BN, BK), dtype=tl.float32)
            if GATE == 1:
                step = tl.where(interleaved > 0, 2, 1)
                gate = partial_sums(
                    acc, a_ptr + a_row, w_ptr + group * 2 * N * K, columns_ptr, c_C,
                    1 if TRANSPOSED else step, 0, 1.0, K, 2 * N, BK, TRANSPOSED, False, STAGES,
                )  # fmt: skip
                up = partial_sums(
                    acc, a_ptr + a_row, w_ptr + group * 2 * N * K, columns_ptr, c_C,
                    1 if TRANSPOSED else step, N if TRANSPOSED else tl.where(interleaved > 0, 1, N), 1.0, K, 2 * N,
                    BK, TRANSPOSED, False, STAGES,
                )  # fmt: skip
            else:
                gate = partial_sums(
                    acc, a_ptr + a_row, w_ptr + group * N * K, columns_ptr + group * K, c_C, 1, 0, 1.0, K, N,
                    BK, TRANSPOSED, COLUMNS, STAGES,
                )  # fmt: skip
                up = gate
                if GATE == 3:
                    up = partial_sums(
                        acc, a_up_ptr + a_row, w_up_ptr + group * N * K, columns_ptr, c_C, 1, 0, 1.0, K, N,
                        BK, TRANSPOSED, False, STAGES,
                    )  # fmt: skip
            gate_C = tl.sum(gate, axis=0 if TRANSPOSED else 1)
            up_C = tl.sum(up, axis=0 if TRANSPOSED else 1)
        if COLUMNS:
            pivot_C = tl.load(pivots_ptr + group * N + c_C, mask=column_C, other=0)
            gate_C += tl.load(a_ptr + a_row + pivot_C, mask=column_C, other=0.0).to(tl.float32)
        if has_bias > 0:
            if GATE == 0:
                gate_C += tl.load(bias_ptr + expert * N + c_C, mask=column_C, other=0.0).to(tl.float32)
            else:
                gate_at_C = tl.where(interleaved > 0, 2 * c_C, c_C) + expert * 2 * N
                up_at_C = tl.where(interleaved > 0, 2 * c_C + 1, c_C + N) + expert * 2 * N
                gate_C += tl.load(bias_ptr + gate_at_C, mask=column_C, other=0.0).to(tl.float32)
                up_C += tl.load(bias_ptr + up_at_C, mask=column_C, other=0.0).to(tl.float32)
        value_C = activated(gate_C, up_C, kind, slope, cubic, limit, up_offset, FAMILY, GATE > 0)
        tl.store(out_ptr + row * N + c_C, value_C.to(out_ptr.dtype.element_ty), mask=column_C)


@triton.jit
def few_combine_kernel(
    a_ptr,
    w_ptr,
    out_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    N,
    K,
    top_k,
    experts,
    group_size,
    has_bias,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[t] = sum over k of weight[t,k] * (a[t*top_k+k] times the matrix of the group of its expert, + bias[expert]).

    The last product and the routed sum in one launch. With one group the rows are summed first and the matrix is read once.
    """
    token = tl.program_id(0).to(tl.int64)
    c_C = tl.program_id(1) * BN + tl.arange(0, BN)
    column_C = c_C < N
    bias_C = tl.zeros((BN,), dtype=tl.float32)
    acc = tl.zeros((BK, BN) if TRANSPOSED else (BN, BK), dtype=tl.float32)
    for k in range(0, top_k):
        slot = token * top_k + k
        expert = tl.load(index_ptr + slot).to(tl.int64)
        if (expert >= 0) & (expert < experts):
            weight = tl.load(weight_ptr + slot).to(tl.float32)
            more_C = tl.load(bias_ptr + expert * N + c_C, mask=c_C < N * has_bias, other=0.0)
            bias_C += weight * more_C.to(tl.float32)
            if not ONE_GROUP:
                acc = partial_sums(
                    acc, a_ptr + slot * K, w_ptr + expert // group_size * N * K, a_ptr, c_C, 1, 0, weight, K, N,
                    BK, TRANSPOSED, False, STAGES,
                )  # fmt: skip
    if ONE_GROUP:
        for first in tl.range(0, K, BK, num_stages=STAGES):
            k_K = first + tl.arange(0, BK)
            sum_K = tl.zeros((BK,), dtype=tl.float32)
            for k in range(0, top_k):
                slot = token * top_k + k
                expert = tl.load(index_ptr + slot).to(tl.int64)
                there = (expert >= 0) & (expert < experts)
                weight = tl.load(weight_ptr + slot, mask=there, other=0.0).to(tl.float32)
                a_K = tl.load(a_ptr + slot * K + k_K, mask=k_K < tl.where(there, K, 0), other=0.0)
                sum_K += weight * a_K.to(tl.float32)
            if TRANSPOSED:
                inside = (k_K < K)[:, None] & column_C[None, :]
                acc += sum_K[:, None] * tl.load(w_ptr + k_K[:, None] * N + c_C[None, :], mask=inside, other=0.0)
            else:
                inside = column_C[:, None] & (k_K < K)[None, :]
                acc += sum_K[None, :] * tl.load(w_ptr + c_C[:, None] * K + k_K[None, :], mask=inside, other=0.0)
    value_C = bias_C + tl.sum(acc, axis=0 if TRANSPOSED else 1)
    tl.store(out_ptr + token * N + c_C, value_C.to(out_ptr.dtype.element_ty), mask=column_C)
