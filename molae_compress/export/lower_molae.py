"""Experts as one node of this package's operator library per bank: `molae::LatentExperts`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from molae_compress.errors import ExportError
from molae_compress.export.banks import BankTensors, BasisTensors, ExpertTensors
from molae_compress.export.emitter import Emitter
from molae_compress.kernels import DOMAIN
from molae_compress.kernels.activation import Activation
from molae_compress.kernels.gpu_tiles import ACTIVATIONS
from molae_compress.tensors import PIVOT_DTYPE

if TYPE_CHECKING:
    import onnx_ir as ir

VERSION, OPERATOR = 1, "LatentExperts"


def check_fits(experts: ExpertTensors, kind: Activation | None) -> None:
    """Raises `ExportError` if the operator has no such activation, or the model normalises outputs."""
    if kind is not None and experts.after is None:
        return
    what = "the model has another" if experts.after is None else "the model normalises the output of every expert"
    raise ExportError(
        f"The experts '{experts.spec.name}' cannot be a molae::LatentExperts node.",
        why=f"The operator has the usual activations ({', '.join(ACTIVATIONS)}) and nothing after the experts; {what}.",
        remedy="Export with --experts standard.",
    )


def lower(
    emit: Emitter, experts: ExpertTensors, kind: Activation, x: ir.Value, index: ir.Value, weight: ir.Value
) -> ir.Value:
    """Writes the nodes; returns the routed sums `[T,H]`.

    Args:
        emit: where to.
        experts: what; `check_fits` has let them pass.
        kind: their activation.
        x: `[T,H]`.
        index: `[T,K]` int64.
        weight: `[T,K]`.
    """
    parts = [_bank(emit, number, bank, experts, kind, x, index, weight) for number, bank in enumerate(experts.banks)]
    y = parts[0]
    for part in parts[1:]:
        y = emit.op("Add", y, part)
    return y


def _bank(
    emit: Emitter,
    number: int,
    bank: BankTensors,
    experts: ExpertTensors,
    kind: Activation,
    x: ir.Value,
    index: ir.Value,
    weight: ir.Value,
) -> ir.Value:
    spec, prefix = bank.spec, f"bank_{number}."
    if not experts.in_place:
        index = emit.op("Gather", emit.weight(f"{prefix}place", places(bank, experts.spec.num_experts)), index)
    encode = bank.encode or _all_columns(spec.num_experts, spec.hidden, bank.core_ERJ)
    inputs = [
        x,
        index,
        weight,
        *_basis(emit, f"{prefix}encode", encode),
        emit.weight(f"{prefix}core", bank.core_ERJ, lambda core: core.flatten(0, 1)),
        *_basis(emit, f"{prefix}up_encode", bank.up_encode),
        _optional(emit, f"{prefix}core_up", bank.up_core_ERI),
        _optional(emit, f"{prefix}core_bias", bank.bias_in_EJ, flat=False),
        emit.weight(f"{prefix}down", bank.down_ENI, lambda down: down.flatten(0, 1)),
        *_basis(emit, f"{prefix}decode", bank.decode),
        _optional(emit, f"{prefix}decode_bias", bank.bias_out_EH, flat=False),
    ]
    return emit.op(
        OPERATOR,
        *inputs,
        domain=DOMAIN,
        num_experts=spec.num_experts,
        input_group=encode.group,
        output_group=1 if bank.decode is None else bank.decode.group,
        rank_in=encode.rank,
        rank_out=0 if bank.decode is None else bank.decode.rank,
        gated=int(spec.has_gate),
        interleaved=int(spec.interleaved),
        activation=kind.kind,
        alpha=kind.alpha,
        limit=kind.limit,
        up_offset=kind.up_offset,
    )


def places(bank: BankTensors, num_experts: int) -> Tensor:
    """[E] int64: where each expert of the module lies in the bank, one past its end where it does not."""
    place_E = torch.full((num_experts,), len(bank.experts))
    place_E[list(bank.experts)] = torch.arange(len(bank.experts))
    return place_E


def _all_columns(num_experts: int, hidden: int, like: Tensor) -> BasisTensors:
    """The basis of dense experts: interpolative of full rank, which is the hidden state itself and takes no numbers."""
    return BasisTensors(like.new_empty(1, hidden, 0), torch.arange(hidden)[None], num_experts, hidden)


def _basis(emit: Emitter, name: str, basis: BasisTensors | None) -> tuple[ir.Value | None, ir.Value | None]:
    if basis is None:
        return None, None
    weight = emit.weight(name, basis.weight_GRW, lambda whole: whole.flatten(0, 1))
    if basis.pivots_GR is None:
        return weight, None
    return weight, emit.weight(f"{name}_pivots", basis.pivots_GR, lambda pivots: pivots.reshape(-1).to(PIVOT_DTYPE))


def _optional(emit: Emitter, name: str, tensor: Tensor | None, *, flat: bool = True) -> ir.Value | None:
    if tensor is None:
        return None
    return emit.weight(name, tensor, (lambda whole: whole.flatten(0, 1)) if flat else Tensor.contiguous)
