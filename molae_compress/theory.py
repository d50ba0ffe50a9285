"""When a latent form is lossless, and when it is smaller: the conditions as functions, checked against brute force by tests.

One basis B of R rows serves a group of experts exactly, W_e = A_e B for all e of it, if and only if R is at least the rank
of the stack of all W_e, which is H less the dimension of their common null space. `docs/theory.md` has the proofs, and
what it means for gate and up rows, for groups on either side, and for biases. Shape suffixes: see
`molae_compress.tensors`; N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from molae_compress.tensors import AnyShape, Bank, DenseExperts, ExpertsSpec, LatentShape


@dataclass(frozen=True)
class Requirement:
    """What one basis of a latent shape must be able to hold, so that nothing is lost.

    Attributes:
        side: `input` or `output`.
        core: the cores that use the basis: `gate_up`, `gate`, `up` or `down`.
        experts: those that share it, by their index in the module.
        rank: the least rank at which the weights fit exactly: that of the stack.
        available: the rank that the shape has there.
    """

    side: Literal["input", "output"]
    core: str
    experts: tuple[int, ...]
    rank: int
    available: int

    @property
    def holds(self) -> bool:
        """Whether the rank of the shape is enough."""
        return self.rank <= self.available


def requirements(
    dense: DenseExperts, shape: AnyShape, *, inputs_TH: Tensor | None = None, rtol: float | None = None
) -> tuple[Requirement, ...]:
    """The condition of every basis of a shape; a second projection that stays dense has none, nor have biases.

    Args:
        dense: the experts.
        shape: the latent form, whose groups (and gate and up apart or joint) decide which weights share a basis.
        inputs_TH: if given, exactness is asked for these inputs and all that are combinations of them, not for any input.
        rtol: singular values below this share of the largest count as zero; see `stack_rank`.
    """
    found: list[Requirement] = []
    for bank in shape.banks(dense.spec):
        found += _input_side(dense, bank, inputs_TH, rtol)
        if bank.shape.rank_out is not None:
            for experts in _groups(bank, bank.shape.output_group):
                # Columns of the second projection are what the output basis must span.
                rank = stack_rank((dense.w_out_EHI[e].T for e in experts), rtol=rtol)
                found.append(Requirement("output", "down", experts, rank, bank.shape.rank_out))
    return tuple(found)


def is_lossless(dense: DenseExperts, shape: AnyShape, *, inputs_TH: Tensor | None = None, rtol: float | None = None) -> bool:
    """Whether latent experts of this shape can be the dense ones exactly, up to rounding; arguments as `requirements`."""
    return all(requirement.holds for requirement in requirements(dense, shape, inputs_TH=inputs_TH, rtol=rtol))


def stack_rank(weights: Iterable[Tensor], *, rtol: float | None = None) -> int:
    """Rank of matrices [N,H] written below each other: the dimension of the sum of their row spaces.

    Args:
        weights: one after the other; only [H,H] is held beside one of them.
        rtol: singular values below this share of the largest count as zero; by default the larger side of the stack times
            the rounding of the matrices' type.
    """
    values, tolerance = _singular_values(weights)
    if not len(values) or values[0] == 0:
        return 0
    return int((values > values[0] * (tolerance if rtol is None else rtol)).sum())


def common_null_space(weights: Iterable[Tensor], *, rtol: float | None = None) -> Tensor:
    """[H-rank,H], float64: orthonormal directions that every one of the matrices [N,H] maps to zero."""
    triangle_NH, rows, eps = _triangle(weights)
    _, values, vt_HH = torch.linalg.svd(triangle_NH, full_matrices=True)
    tolerance = max(rows, vt_HH.shape[1]) * eps if rtol is None else rtol
    rank = int((values > values[0] * tolerance).sum()) if len(values) and values[0] > 0 else 0
    null_XH: Tensor = vt_HH[rank:]
    return null_XH


def least_error(weights: Iterable[Tensor], rank: int) -> float:
    """The least sum of squared errors that matrices [N,H] can have as cores times one basis of this rank (Eckart, Young)."""
    values, _ = _singular_values(weights)
    return float(values[rank:].square().sum())


def break_even(spec: ExpertsSpec, shape: LatentShape) -> tuple[int, int | None]:
    """The largest ranks (input, output) at which a side stores fewer numbers than dense; 0 if none does.

    A basis of g experts with M rows (columns, on the output side) in all, M = g J or g I, takes R (M + H) numbers in
    orthonormal storage and R (M + H - R + 1) in interpolative storage, against M H. The output side is None
    where it stays dense.
    """
    H = spec.hidden
    rows = spec.rows if shape.gate_up == "joint" else spec.intermediate

    def largest(count: int) -> int:
        if shape.storage == "orthonormal":
            return min(H, (count * H - 1) // (count + H))
        # R (M + H + 1 - R) < M H below the smaller root
        middle = count + H + 1
        root = (middle - math.sqrt(middle * middle - 4 * count * H)) / 2
        return min(H, math.ceil(root) - 1)

    return largest(shape.input_group * rows), None if shape.rank_out is None else largest(
        shape.output_group * spec.intermediate
    )


def _input_side(dense: DenseExperts, bank: Bank, inputs_TH: Tensor | None, rtol: float | None) -> Iterable[Requirement]:
    row_sets = dense.spec.gate_rows() if bank.shape.gate_up == "separate" else (torch.arange(dense.spec.rows),)
    for (_, core), rows in zip(bank.shape.branches(), row_sets, strict=True):
        for experts in _groups(bank, bank.shape.input_group):
            weights = (dense.w_in_EJH[e][rows] for e in experts)
            if inputs_TH is not None:
                x_HT = inputs_TH.double().T
                # back in the type of the weights, whose rounding decides what counts as zero
                weights = ((w_NH.double() @ x_HT.to(w_NH.device)).to(w_NH.dtype) for w_NH in weights)
            yield Requirement("input", core, experts, stack_rank(weights, rtol=rtol), bank.shape.rank_in)


def _groups(bank: Bank, size: int) -> list[tuple[int, ...]]:
    """Experts that share a basis: neighbours in the order in which the bank stores them."""
    return [bank.experts[start : start + size] for start in range(0, len(bank.experts), size)]


def _singular_values(weights: Iterable[Tensor]) -> tuple[Tensor, float]:
    """Of the stack, descending; and the share of the largest that counts as zero."""
    triangle_NH, rows, eps = _triangle(weights)
    return torch.linalg.svdvals(triangle_NH), max(rows, triangle_NH.shape[1]) * eps


def _triangle(weights: Iterable[Tensor]) -> tuple[Tensor, int, float]:
    """A matrix of the stack's singular values and row space, of at most H rows; the stack's rows, and its rounding."""
    held: Tensor | None = None
    rows, eps = 0, 0.0
    for w_NH in weights:
        rows, eps = rows + w_NH.shape[0], max(eps, torch.finfo(w_NH.dtype).eps)
        held = w_NH.double() if held is None else torch.cat((held, w_NH.double()))
        if held.shape[0] > held.shape[1]:
            held = torch.linalg.qr(held, mode="r").R
    assert held is not None
    return held, rows, eps
