"""What the routed experts cost one token, as the modules compute it.

Multiply-adds, bytes of weights, bytes kept for the backward pass, numbers sent between devices. Biases, norms and
activations are left out where multiply-adds are counted. Shape suffixes: see `molae_compress.tensors`.
"""

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


def backward_operations(spec: ExpertsSpec, shape: AnyShape | None) -> int:
    """Those of the backward pass: every product is there twice, for the gradient of its input and of its weights."""
    return 2 * operations(spec, shape)


def kept_bytes(spec: ExpertsSpec, shape: AnyShape | None, dtype: torch.dtype) -> int:
    """Bytes of activations that one token leaves behind for the backward pass, all experts alike busy.

    Of the experts backend `grouped_mm` and an activation that keeps its rows, the gate's output and the product, as
    `silu(gate) * up` does; clamps and the like keep more. Of the inputs of a basis in interpolative storage those columns
    are kept that it does not pass through. Vectors of one index a slot are left out.

    Args:
        spec: of the module.
        shape: how it is stored; None for the dense module.
        dtype: of the activations.
    """
    H, K = spec.hidden, spec.top_k
    inside = spec.rows + (2 if spec.has_gate else 1) * spec.intermediate + 1  # the last one is the routing weight
    if shape is None:
        return dtype.itemsize * K * (2 * H + inside)
    total = 0.0
    for bank in shape.banks(spec):
        part = bank.shape
        slots, share = K * bank.spec.num_experts / spec.num_experts, bank.spec.num_experts / spec.num_experts
        whole_in, whole_out = (group == bank.spec.num_experts for group in (part.input_group, part.output_group))
        whole_out = whole_out and part.rank_out is not None and not spec.has_output_norm
        branches = len(part.branches())
        # the inputs as they are serve all branches, without some columns only the branch whose columns these are
        read = H if part.storage == "orthonormal" else branches * (H - part.rank_in)
        numbers = slots * inside + read * (share if whole_in else slots)
        numbers += slots * branches * part.rank_in
        if part.rank_out is not None:
            numbers += part.rank_out * slots
        numbers += (part.rank_out or 0) * share if whole_out else H * slots
        total += dtype.itemsize * numbers
    return round(total)


def sent_numbers(spec: ExpertsSpec, shape: AnyShape | None) -> int:
    """Numbers on the wire for one token in a forward pass under expert parallelism, dispatch and combine.

    All experts are taken to be alike busy, and no two of a token to be on one device. The backward pass sends as many.
    """
    if shape is None:
        return 2 * spec.top_k * spec.hidden
    return round(sum(len(bank.experts) * _sent(bank.spec, bank.shape) for bank in shape.banks(spec)) / spec.num_experts)


def _sent(spec: ExpertsSpec, shape: LatentShape) -> int:
    H, whole_in, whole_out = spec.hidden, shape.input_group == spec.num_experts, shape.output_group == spec.num_experts
    # A latent row is sent only where that is less than the hidden state: separate bases of high rank have more.
    sent_in = min(H, len(shape.branches()) * shape.rank_in) if whole_in else H
    sent_out = shape.rank_out if whole_out and shape.rank_out is not None and not spec.has_output_norm else H
    return spec.top_k * (sent_in + sent_out)


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
