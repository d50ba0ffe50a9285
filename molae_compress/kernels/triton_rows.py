"""What surrounds the products: tokens sorted by expert, columns that are no pivots, and the sum over a token's experts.

All of it is deterministic. Letters: T tokens, K experts per token, S = T*K slots, E experts, N columns of the output;
B slots of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_of(index_ptr, slot_B, slots, experts):
    """Expert of each slot; what is no expert of this operator, or lies past the end, counts as number `experts`."""
    expert_B = tl.load(index_ptr + slot_B, mask=slot_B < slots, other=-1)
    return tl.where((expert_B >= 0) & (expert_B < experts), expert_B, experts).to(tl.int32)


@triton.jit
def count_kernel(index_ptr, counts_ptr, slots, experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """counts[e,b]: slots of expert e in block b, for e up to and including `experts`."""
    block = tl.program_id(0)
    expert_B = expert_of(index_ptr, block * BLOCK + tl.arange(0, BLOCK), slots, experts)
    bin_E = tl.arange(0, BINS)
    tl.store(counts_ptr + bin_E * tl.num_programs(0) + block, tl.histogram(expert_B, BINS), mask=bin_E <= experts)


@triton.jit
def scan_kernel(counts_ptr, ends_ptr, blocks, experts, CHUNK: tl.constexpr):
    """Turns counts[e,b] into the first row of each block of each expert, in one program; ends[e]: one past its last."""
    total = 0
    for first in range(0, (experts + 1) * blocks, CHUNK):
        place_B = first + tl.arange(0, CHUNK)
        inside_B = place_B < (experts + 1) * blocks
        count_B = tl.load(counts_ptr + place_B, mask=inside_B, other=0)
        after_B = total + tl.cumsum(count_B, 0)
        tl.store(counts_ptr + place_B, after_B - count_B, mask=inside_B)
        closes_B = inside_B & (place_B % blocks == blocks - 1) & (place_B // blocks < experts)
        tl.store(ends_ptr + place_B // blocks, after_B, mask=closes_B)
        total += tl.sum(count_B)


@triton.jit
def place_kernel(index_ptr, starts_ptr, order_ptr, slots, experts, BLOCK: tl.constexpr):
    """order[row]: the slot of each row; rows of an expert keep the order of their slots, those of no expert come last."""
    block = tl.program_id(0)
    slot_B = block * BLOCK + tl.arange(0, BLOCK)
    expert_B = expert_of(index_ptr, slot_B, slots, experts)
    earlier_BB = (expert_B[:, None] == expert_B[None, :]) & (slot_B[None, :] < slot_B[:, None])
    before_B = tl.sum(earlier_BB.to(tl.int32), axis=1)
    start_B = tl.load(starts_ptr + expert_B * tl.num_programs(0) + block)
    tl.store(order_ptr + start_B + before_B, slot_B, mask=slot_B < slots)


@triton.jit
def tiles_kernel(ends_ptr, tiles_ptr, groups, group_size, BM, GROUPS: tl.constexpr):
    """tiles[g]: tiles of BM rows that groups 0..g have together."""
    group_G = tl.arange(0, GROUPS)
    there_G = group_G < groups
    last_G = (group_G + 1) * group_size - 1
    end_G = tl.load(ends_ptr + last_G, mask=there_G, other=0)
    start_G = tl.load(ends_ptr + last_G - group_size, mask=there_G & (group_G > 0), other=0)
    tl.store(tiles_ptr + group_G, tl.cumsum((end_G - start_G + BM - 1) // BM, 0), mask=there_G)


@triton.jit
def columns_kernel(pivots_ptr, columns_ptr, position_ptr, H, R, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Of each group: the H-R columns that are no pivots, ascending, and where column h lies in (pivots, columns).

    Pivots ascend, so the number of them below a column is found by bisection in STEPS steps.
    """
    group = tl.program_id(0)
    h_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low_B = tl.zeros((BLOCK,), dtype=tl.int32)
    high_B = tl.zeros((BLOCK,), dtype=tl.int32) + R
    for _ in tl.static_range(STEPS):
        middle_B = (low_B + high_B) // 2
        open_B = low_B < high_B
        below_B = tl.load(pivots_ptr + group * R + middle_B, mask=open_B, other=0) < h_B
        low_B = tl.where(open_B & below_B, middle_B + 1, low_B)
        high_B = tl.where(open_B & (below_B == 0), middle_B, high_B)
    inside_B = h_B < H
    pivot_B = tl.load(pivots_ptr + group * R + low_B, mask=inside_B & (low_B < R), other=-1) == h_B
    tl.store(columns_ptr + group * (H - R) + h_B - low_B, h_B, mask=inside_B & (pivot_B == 0))
    tl.store(position_ptr + group * H + h_B, tl.where(pivot_B, low_B, R + h_B - low_B), mask=inside_B)


@triton.jit
def combine_kernel(
    value_ptr,
    kept_ptr,
    position_ptr,
    index_ptr,
    weight_ptr,
    bias_ptr,
    base_ptr,
    out_ptr,
    N,
    R,
    top_k,
    experts,
    group_size,
    has_index,
    has_weight,
    has_value,
    has_bias,
    has_base,
    POSITION: tl.constexpr,
    BN: tl.constexpr,
):
    """out[t] = base[t] + sum over k of weight[t,k] * (value[t*top_k+k] + bias[expert]), in fp32 and in the order of k.

    Slots of no expert are left out. POSITION: column n of a value is number position[group,n] of (kept [R], value [N-R]).
    """
    token = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BN + tl.arange(0, BN)
    inside_N = n_N < N
    sum_N = tl.load(base_ptr + token * N + n_N, mask=n_N < N * has_base, other=0.0).to(tl.float32)
    for k in range(0, top_k):
        slot = token * top_k + k
        expert = tl.load(index_ptr + slot, mask=has_index > 0, other=0).to(tl.int64)
        there = tl.where((expert >= 0) & (expert < experts), N, 0)
        weight = tl.load(weight_ptr + slot, mask=there * has_weight > 0, other=1.0).to(tl.float32)
        read_N = n_N < there * has_value
        if POSITION:
            place_N = tl.load(position_ptr + expert // group_size * N + n_N, mask=n_N < there, other=0)
            kept_N = tl.load(kept_ptr + slot * R + place_N, mask=read_N & (place_N < R), other=0.0)
            other_N = tl.load(value_ptr + slot * (N - R) + place_N - R, mask=read_N & (place_N >= R), other=0.0)
            value_N = kept_N.to(tl.float32) + other_N.to(tl.float32)
        else:
            value_N = tl.load(value_ptr + slot * N + n_N, mask=read_N, other=0.0).to(tl.float32)
        bias_N = tl.load(bias_ptr + expert * N + n_N, mask=n_N < there * has_bias, other=0.0).to(tl.float32)
        sum_N += weight * (value_N + bias_N)
    tl.store(out_ptr + token * N + n_N, sum_N.to(out_ptr.dtype.element_ty), mask=inside_N)
