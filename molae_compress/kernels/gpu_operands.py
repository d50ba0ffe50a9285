"""What the launches of GPU kernels take and hand on: sorted slots, rows, matrices, and columns of interpolative bases.

Shape suffixes: see `molae_compress.tensors`; N, K and J are widths.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from molae_compress.kernels.activation import IDENTITY, Activation


@dataclass(frozen=True)
class Slots:
    """Routed slots sorted by expert.

    Attributes:
        order_S: int32 slot of each row; rows of no expert come last.
        ends_E: int32, one past the last row of each expert.
        top_k: slots of a token.
    """

    order_S: Tensor
    ends_E: Tensor
    top_k: int


@dataclass(frozen=True)
class Rows:
    """Where the rows of a grouped product are read and written, and what group they are of.

    Attributes:
        count: rows, those of no group included.
        slots: the sorted slots; None where all rows are of one group.
        group_size: experts of a group.
        gather: row i reads row `order[i] // gather`; 0: row i.
        scatter: row i is written to row `order[i] // scatter`; 0: row i.
    """

    count: int
    slots: Slots | None = None
    group_size: int = 0
    gather: int = 0
    scatter: int = 0


@dataclass(frozen=True)
class Matrices:
    """The matrices of a grouped product, and how gate and up lie in them.

    Attributes:
        weight: `[G,K,J]` if transposed, else `[G,J,K]`, contiguous; J = 2N with a gate in one matrix, else N.
        transposed: orientation.
        gated: gate and up are in `weight` (J = 2N), or `weight_up` is there.
        interleaved: columns of gate and up alternate, in `weight` and in the bias; with two matrices in the bias only.
        weight_up: matrices of up, where they have inputs of their own.
        bias: `[G,J]`.
        activation: applied after the bias.
    """

    weight: Tensor
    transposed: bool
    gated: bool = False
    interleaved: bool = False
    weight_up: Tensor | None = None
    bias: Tensor | None = None
    activation: Activation = IDENTITY

    @property
    def gate(self) -> int:
        """GATE of the kernels."""
        if self.weight_up is not None:
            return 3
        return 0 if not self.gated else 2 if self.interleaved and self.transposed else 1

    @property
    def width(self) -> int:
        """N: columns of the output."""
        stored = self.weight.shape[2 if self.transposed else 1]
        return stored // 2 if self.gate in (1, 2) else stored


@dataclass(frozen=True)
class Columns:
    """The columns of interpolative bases.

    Attributes:
        pivots: int32 [G*R].
        rest: int32 [G*(H-R)]: all others.
        position: int32 [G*H]: where a column lies in (pivots, rest).
        rank: R.
    """

    pivots: Tensor
    rest: Tensor
    position: Tensor
    rank: int
