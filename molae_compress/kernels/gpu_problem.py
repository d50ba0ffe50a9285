"""One call of the operator `molae::LatentExperts`, as data: its inputs and attributes, and how they are laid out.

Shape suffixes: see `molae_compress.tensors`. Gi and Go are the groups of the two sides, Ri and Ro their ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from molae_compress.kernels.activation import Activation


@dataclass(frozen=True)
class LatentTensors:
    """The weights of one bank of latent experts, latent dimension in front.

    Attributes:
        encode: `[Gi*Ri,H]`, or `[Gi*Ri,H-Ri]` with `encode_pivots`; of the gate if there is `up_encode`.
        core: `[E*Ri,J]`, or `[E*Ri,I]` of the gate if there is `core_up`.
        down: `[E*Ro,I]`, or `[E*H,I]` without `decode`.
        encode_pivots: int32 `[Gi*Ri]`, ascending inside a group.
        up_encode: like `encode`, of the up projection.
        up_encode_pivots: like `encode_pivots`.
        core_up: `[E*Ri,I]`.
        core_bias: `[E,J]`, in the model's own order of rows.
        decode: `[Go*Ro,H]`, or `[Go*Ro,H-Ro]` with `decode_pivots`.
        decode_pivots: int32 `[Go*Ro]`.
        decode_bias: `[E,H]`.
    """

    encode: Tensor
    core: Tensor
    down: Tensor
    encode_pivots: Tensor | None = None
    up_encode: Tensor | None = None
    up_encode_pivots: Tensor | None = None
    core_up: Tensor | None = None
    core_bias: Tensor | None = None
    decode: Tensor | None = None
    decode_pivots: Tensor | None = None
    decode_bias: Tensor | None = None


@dataclass(frozen=True)
class LatentExpertsProblem:
    """Inputs and attributes of one call.

    Attributes:
        x_TH: inputs.
        index_TK: int64 expert of each slot; outside 0..E-1 it is of none.
        weight_TK: routing weights.
        tensors: the weights.
        num_experts: E.
        input_group: experts per input group.
        output_group: experts per output group.
        rank_in: Ri.
        rank_out: Ro; 0 where the second projection is dense.
        gated: J = 2I.
        interleaved: rows of gate and up alternate, in `core` and in `core_bias`.
        activation: between the projections.
    """

    x_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    tensors: LatentTensors
    num_experts: int
    input_group: int
    output_group: int
    rank_in: int
    rank_out: int
    gated: bool
    interleaved: bool
    activation: Activation
