"""What the routed experts cost one token: multiply-adds, and bytes of weights; as the modules compute it."""

from __future__ import annotations

import math

import torch

from molae_compress.tensors import PIVOT_DTYPE, AnyShape, ExpertsSpec, LatentShape


def dense_multiply_adds(spec: ExpertsSpec) -> tuple[int, int]:
    """Of the first and of the second projection, for one token."""
    slots = spec.top_k * spec.hidden
    return slots * spec.rows, slots * spec.intermediate


def multiply_adds(spec: ExpertsSpec, shape: LatentShape, among: int) -> tuple[int, int]:
    """Of the input and of the output side of one bank, for `among` tokens: as many as the whole module has experts.

    All experts are taken to be alike busy, so each gets K of the `among * K` slots. A basis of single slots is applied to
    those of its experts; one that all experts of the bank share, to every token.

    Args:
        spec: of the bank, with as many experts as it has.
        shape: of the bank.
        among: experts of the module.
    """
    H, I, slots = spec.hidden, spec.intermediate, spec.top_k * spec.num_experts

    def of_bases(rank: int, group: int, *, each_slot: bool = False) -> int:
        free = rank if shape.storage == "interpolative" else 0
        uses = among if group == spec.num_experts and not each_slot else slots
        return uses * rank * (H - free)

    first = len(shape.branches()) * of_bases(shape.rank_in, shape.input_group) + slots * spec.rows * shape.rank_in
    if shape.rank_out is None:
        return first, slots * H * I
    decoded = of_bases(shape.rank_out, shape.output_group, each_slot=spec.has_output_norm)
    return first, slots * I * shape.rank_out + decoded


def operations(spec: ExpertsSpec, shape: AnyShape | None) -> int:
    """Floating-point operations for one token, two per multiply-add; without a shape, of the dense module."""
    if shape is None:
        return 2 * sum(dense_multiply_adds(spec))
    among = spec.num_experts
    return 2 * round(sum(sum(multiply_adds(bank.spec, bank.shape, among)) for bank in shape.banks(spec)) / among)


def active_bytes(spec: ExpertsSpec, shape: AnyShape, dtype: torch.dtype) -> int:
    """Bytes of weights that one token alone reads, each weight once, on average over all choices of K experts.

    Args:
        spec: of the module.
        shape: how it is stored.
        dtype: of its floating-point tensors.
    """
    E, K = spec.num_experts, spec.top_k
    total = 0.0
    for bank in shape.banks(spec):
        for name, size in bank.shape.tensors(bank.spec).items():
            stem = name.partition(".")[0]
            group = bank.shape.input_group if stem.endswith("encode") else bank.shape.output_group if stem == "decode" else 1
            shared = group == bank.spec.num_experts and (stem.endswith("encode") or stem == "decode")
            # of a group, the share of choices with one of its experts among the K
            share = 1.0 if shared else 1.0 - math.comb(E - group, K) / math.comb(E, K)
            itemsize = (PIVOT_DTYPE if name.endswith(".pivots") else dtype).itemsize
            total += share * torch.Size(size).numel() * itemsize
    return round(total)
