"""Experts as ONNX Runtime's own operator, `com.microsoft::MoE`, between two plain matrix products.

It computes its routing from logits. Any routing is put into it: the logarithms of the routing weights at the experts
chosen, minus ten thousand elsewhere, and `normalize_routing_weights` give the weights divided by their sum, by which the
output is then multiplied. That normalisation is never turned off: without it the CPU kernel is wrong in float16.
Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molae_compress.errors import ExportError
from molae_compress.export.banks import BankTensors, BasisTensors, ExpertTensors
from molae_compress.export.emitter import Emitter
from molae_compress.kernels.activation import Activation

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, VERSION = "com.microsoft", 1
_NOT_CHOSEN = -1e4  # fits float16
_PLAIN = {"relu": "relu", "gelu_tanh": "gelu", "silu": "silu", "identity": "identity"}


def lower(
    emit: Emitter, experts: ExpertTensors, kind: Activation, x: ir.Value, index: ir.Value, weight: ir.Value
) -> ir.Value:
    """Writes the nodes; returns the routed sums `[T,H]`. Arguments as in `lower_molae.lower`."""
    attributes = _activation(experts, kind)
    assert attributes is not None
    (bank,) = experts.banks
    E, H, dtype = bank.spec.num_experts, bank.spec.hidden, emit.dtype
    rank = max(bank.core_ERJ.shape[1], bank.down_ENI.shape[1])
    assert index.shape is not None
    z = x
    if bank.encode is not None:
        encode = bank.encode
        z = emit.op("MatMul", x, emit.stored("encode", (H, rank), dtype, lambda: _padded(encode, rank).T))
    routing = routing_matrix(emit, index, weight, E)
    chosen = emit.op("Greater", routing, emit.constant(0.0, torch.float32))
    logits = emit.op("Where", chosen, emit.op("Log", routing), emit.constant(_NOT_CHOSEN, torch.float32))
    u = emit.op(
        "MoE",
        z,
        emit.narrowed(logits),
        emit.weight("fc1", bank.core_ERJ, lambda core: _first(core, bank, rank)),
        None if bank.bias_in_EJ is None else emit.weight("fc1_bias", bank.bias_in_EJ, lambda bias: bias[:, _order(bank)]),
        emit.weight("fc2", bank.down_ENI, lambda down: F.pad(down, (0, 0, 0, rank - down.shape[1]))),
        domain=DOMAIN,
        k=index.shape[1],
        normalize_routing_weights=1,
        **attributes,
    )
    y = emit.op("Mul", u, emit.op("ReduceSum", weight, emit.constant([1]), keepdims=1))
    if bank.decode is not None:
        decode = bank.decode
        y = emit.op("MatMul", y, emit.stored("decode", (rank, H), dtype, lambda: _padded(decode, rank)))
    if bank.bias_out_EH is not None:
        y = emit.op("Add", y, emit.op("MatMul", emit.narrowed(routing), emit.weight("bias_out", bank.bias_out_EH)))
    return y


def routing_matrix(emit: Emitter, index: ir.Value, weight: ir.Value, num_experts: int) -> ir.Value:
    """[T,E] float32: the routing weights of all experts, zeros included. In 16 bit no CPU kernel adds by index."""
    sizes = emit.op("Concat", emit.op("Shape", index, start=0, end=1), emit.constant([num_experts]), axis=0)
    none = emit.op("Expand", emit.constant(0.0, torch.float32), sizes)
    return emit.op("ScatterElements", none, index, emit.widened(weight), axis=1, reduction="add")


def check_fits(experts: ExpertTensors, kind: Activation | None) -> None:
    """Raises `ExportError` unless the experts have an activation of the operator, and one basis a side or none."""
    problem = None
    if experts.after is not None:
        problem = "the model normalises the output of every expert"
    elif kind is None or _activation(experts, kind) is None:
        problem = "of the activations it has only relu, tanh-gelu, silu, identity and gated silu"
    elif len(experts.banks) > 1:
        problem = f"the experts are stored in {len(experts.banks)} banks of different ranks"
    elif not experts.in_place:
        problem = "the experts are stored in another order than the router knows"
    else:
        problem = _misfit(experts.banks[0])
    if problem is not None:
        raise ExportError(
            f"The experts '{experts.spec.name}' cannot be a com.microsoft::MoE node: {problem}.",
            why="That operator reads one input for all experts, and gives one sum for all of them.",
            remedy="Export with --experts molae or --experts standard, or compress with `basis.profile: serving`.",
        )


def _misfit(bank: BankTensors) -> str | None:
    if bank.up_encode is not None:
        return "gate and up projection have bases of their own"
    for name, basis in (("input", bank.encode), ("output", bank.decode)):
        if basis is not None and basis.groups > 1:
            return f"there are {basis.groups} {name} bases"
    return "one side of them is dense" if (bank.encode is None) != (bank.decode is None) else None


def _activation(experts: ExpertTensors, kind: Activation) -> dict[str, Any] | None:
    """Attributes of the operator, or None if it has none for this activation."""
    if not experts.spec.has_gate:
        return {"activation_type": _PLAIN[kind.kind]} if kind.kind in _PLAIN and kind.alpha == 1.0 else None
    if kind.kind != "silu":
        return None
    return {
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # gate and up rows alternate, the only order that the CPU kernel knows
        "activation_alpha": kind.alpha,
        "activation_beta": kind.up_offset,
        "swiglu_limit": kind.limit or None,
    }


def _order(bank: BankTensors) -> Tensor:
    """[J]: rows of the first projection, gate and up alternating."""
    return torch.stack(bank.spec.gate_rows(), dim=1).flatten() if bank.spec.has_gate else torch.arange(bank.spec.rows)


def _first(core_ERJ: Tensor, bank: BankTensors, rank: int) -> Tensor:
    """[E,J,R] with gate and up rows alternating, padded with zero columns to `rank`."""
    return F.pad(core_ERJ.transpose(1, 2)[:, _order(bank)], (0, rank - core_ERJ.shape[1]))


def _padded(basis: BasisTensors, rank: int) -> Tensor:
    """[R,H]: the one basis, written out and padded with zero rows to `rank`."""
    return F.pad(basis.matrix_GRH()[0], (0, 0, 0, rank - basis.rank))
