"""From slots to nodes that a runtime has: the three lowerings, and what each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from molae_compress.export import lower_moe, lower_molae, lower_standard
from molae_compress.export.banks import ExpertTensors
from molae_compress.export.emitter import Emitter
from molae_compress.export.slots import SLOT_DOMAIN
from molae_compress.kernels import DOMAIN
from molae_compress.kernels.activation import Activation, find_activation

if TYPE_CHECKING:
    import onnx_ir as ir

Lowering = Literal["molae", "ort-moe", "standard"]
LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)


@dataclass(frozen=True)
class Prepared:
    """An experts module and its activation, if that is one of those that kernels know."""

    experts: ExpertTensors
    kind: Activation | None


def prepare(experts: Sequence[ExpertTensors], how: Lowering) -> list[Prepared]:
    """Looks at the experts before anything is computed.

    Raises:
        ExportError: the lowering cannot hold some of them.
    """
    found = [Prepared(each, _activation(each)) for each in experts]
    for each in found:
        if how == "molae":
            lower_molae.check_fits(each.experts, each.kind)
        elif how == "ort-moe":
            lower_moe.check_fits(each.experts, each.kind)
    return found


def _activation(experts: ExpertTensors) -> Activation | None:
    return find_activation(experts.activate, gated=experts.spec.has_gate, interleaved=experts.spec.interleaved)


def lower_(model: ir.Model, prepared: Sequence[Prepared], how: Lowering, dtype: torch.dtype) -> None:
    """Puts nodes of a lowering in place of every slot, and the experts' weights into the graph.

    Args:
        model: a traced graph; changed in place.
        prepared: what the numbers of the slots stand for.
        how: which nodes.
        dtype: of weights and activations.

    Raises:
        ExportError: an activation cannot be traced.
    """
    import onnx_ir as ir

    traced: dict[object, ir.Graph] = {}
    for slot in [node for node in model.graph if node.domain == SLOT_DOMAIN]:
        number = slot.attributes["number"].as_int()
        x, index, weight = slot.inputs
        assert x is not None
        assert index is not None
        assert weight is not None
        emit = Emitter(model.graph, f"experts_{number}", dtype)
        y = _lowered(emit, prepared[number], how, traced, (x, index, weight))
        ir.convenience.replace_nodes_and_values(model.graph, slot, [slot], emit.nodes, slot.outputs, [y])
    del model.opset_imports[SLOT_DOMAIN]
    if how == "molae":
        model.opset_imports[DOMAIN] = lower_molae.VERSION
    elif how == "ort-moe":
        model.opset_imports[lower_moe.DOMAIN] = lower_moe.VERSION


def _lowered(
    emit: Emitter,
    prepared: Prepared,
    how: Lowering,
    traced: dict[object, ir.Graph],
    inputs: tuple[ir.Value, ir.Value, ir.Value],
) -> ir.Value:
    experts, kind = prepared.experts, prepared.kind
    if how == "standard":
        spec, name = experts.spec, experts.spec.name
        activation = _traced(traced, experts.activate, kind, spec.rows, emit.dtype, name)
        after = None if experts.after is None else _traced(traced, experts.after, None, spec.hidden, emit.dtype, name)
        return lower_standard.lower(emit, experts, activation, after, *inputs)
    assert kind is not None
    return (lower_molae.lower if how == "molae" else lower_moe.lower)(emit, experts, kind, *inputs)


def _traced(
    traced: dict[object, ir.Graph],
    function: Callable[[Tensor], Tensor],
    kind: Activation | None,
    width: int,
    dtype: torch.dtype,
    name: str,
) -> ir.Graph:
    """The graph of an activation: traced once for all layers in which it is the same, as it is in nearly all models."""
    key: object = (kind, width) if kind is not None else (id(function), width)
    if key not in traced:
        traced[key] = lower_standard.trace_rows(function, width, dtype, name)
    return traced[key]
