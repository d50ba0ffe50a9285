"""A causal language model traced to an ONNX graph with its key-value cache as inputs and outputs; experts are slots.

Inputs and outputs are named as onnxruntime-genai wants them. Positions are computed in the graph from the attention
mask, so that rows padded on the left come out right whatever runs the model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from molae_compress.errors import ExportError
from molae_compress.export.slots import SLOT_DOMAIN, SLOT_NAME, experts_of, slots_in

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 20
_TALKATIVE = ("torch.onnx", "torch.export", "torch._dynamo", "torch.__trace", "onnxscript", "onnx_ir")
_BATCH, _LENGTH, _PAST, _PADDED = 2, 3, 4, 2  # of the sample that is traced; any sizes that differ do


@dataclass(frozen=True)
class CacheShape:
    """The key-value cache of a model: alike in all layers.

    Attributes:
        layers: their number.
        heads: of keys and values.
        key_width: of a key.
        value_width: of a value; values are padded with zeros to the width of keys, for runtimes that know one width only.
    """

    layers: int
    heads: int
    key_width: int
    value_width: int


class WithCache(nn.Module):
    """The model as a function of tensors: ids, mask and cache to logits and cache."""

    def __init__(self, model: PreTrainedModel, shape: CacheShape) -> None:
        super().__init__()
        self.model, self.shape = model, shape

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """Logits `[B,L,V]`, then keys and values of every layer, past ones included."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values[..., : self.shape.value_width], layer)
        position_BP = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        # Gathered, not sliced: the tracer would have to be told how the sizes of mask, cache and ids hang together.
        last_L = torch.arange(input_ids.shape[1], device=input_ids.device) + past[0][0].shape[2]
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_BP[:, last_L],
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits.float() if out.logits.dtype == torch.bfloat16 else out.logits  # numpy has no bfloat16
        extra = self.shape.key_width - self.shape.value_width
        kept = [(keys, F.pad(values, (0, extra)) if extra else values) for keys, values in _pairs(cache)]
        return (logits, *(tensor for pair in kept for tensor in pair))


def cache_shape(model: PreTrainedModel) -> CacheShape:
    """What the cache of a model looks like, asked of the model itself.

    Raises:
        ExportError: it keeps something else than keys and values, or not the same in all layers.
    """
    cache = DynamicCache()
    try:
        with torch.no_grad():
            out = model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert out.logits.shape[1] == 2  # AttributeError: a model without a head
        sizes = {(tuple(keys.shape), tuple(values.shape)) for keys, values in _pairs(cache)}
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        reason = str(error).strip().split("\n")[0]
        raise _refusal(model, f"It does not run with a cache of keys and values alone ({reason}).") from error
    if len(sizes) != 1:
        raise _refusal(model, "Its layers do not all keep keys and values of one size.")
    ((key, value),) = sizes
    if len(key) != 4 or key[:3] != value[:3] or key[2] != 2 or value[3] > key[3]:
        raise _refusal(model, f"It keeps keys of shape {key} and values of shape {value}.")
    return CacheShape(len(cache.layers), key[1], key[3], value[3])


def _pairs(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer; raises `AttributeError` where a layer keeps something else."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def names(shape: CacheShape) -> tuple[list[str], list[str]]:
    """Names of the inputs and of the outputs, in their order."""
    pairs = [(layer, kind) for layer in range(shape.layers) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{layer}.{kind}" for layer, kind in pairs)]
    return inputs, ["logits", *(f"present.{layer}.{kind}" for layer, kind in pairs)]


def trace(model: PreTrainedModel, shape: CacheShape) -> ir.Model:
    """The graph of a model in evaluation mode, with one node `molae.export::Experts` per experts module.

    Weights of the graph are those of the model, not copies.

    Raises:
        ExportError: torch cannot trace the model.
    """
    import onnxscript

    _register_slot()
    opset = onnxscript.values.Opset(SLOT_DOMAIN, 1)

    def node(x: Any, index: Any, weight: Any, number: int) -> Any:
        return opset.Experts(x, index, weight, number=number)

    inputs, outputs = names(shape)
    mask = torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.long)
    mask[0, :_PADDED] = 0  # a mask of ones would be dropped from the graph
    dtype = model.get_input_embeddings().get_parameter("weight").dtype
    past = [
        tuple(torch.zeros(_BATCH, shape.heads, _PAST, shape.key_width, dtype=dtype) for _ in range(2))
        for _ in range(shape.layers)
    ]
    batch, length = {0: "batch_size"}, {0: "batch_size", 2: "past_sequence_length"}
    dynamic = {
        "input_ids": batch | {1: "sequence_length"},
        "attention_mask": batch | {1: "total_sequence_length"},
        "past": [(length, length)] * shape.layers,
    }
    with slots_in(model, experts_of(model)), quiet():
        try:
            program = torch.onnx.export(
                WithCache(model, shape).eval(),
                (torch.zeros(_BATCH, _LENGTH, dtype=torch.long), mask, past),
                input_names=inputs,
                output_names=outputs,
                opset_version=OPSET,
                dynamic_shapes=dynamic,
                custom_translation_table={torch.ops.molae_export.experts.default: node},
                dynamo=True,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error.__cause__ or error).strip().split("\n")[0]
            raise _refusal(model, f"torch.onnx.export gives up: {reason}") from error
    assert program is not None
    return _named(program.model, inputs, outputs)


def _named(model: ir.Model, inputs: list[str], outputs: list[str]) -> ir.Model:
    """The traced model, its faces checked and weights stored the way round they are used."""
    found = [value.name for value in model.graph.inputs]
    if found != inputs or [value.name for value in model.graph.outputs] != outputs:
        raise ExportError(
            f"The traced graph takes {found} and gives {[value.name for value in model.graph.outputs]}.",
            why="An input that the model never reads is missing, or the tracer has renamed something.",
            remedy="Report the model class to the project.",
        )
    _store_transposed_(model)
    return without_notes(model)


def without_notes(model: ir.Model) -> ir.Model:
    """The model without the tracer's notes on every node: they are many times the graph, and name files of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(model)
    return model


def _store_transposed_(model: ir.Model) -> None:
    """Weights that the graph only reads transposed are stored that way round, so that no session does it again."""
    import onnx_ir as ir
    from onnx_ir.tensor_adapters import TorchTensor

    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) > 1 or weight.const_value is None:
            continue
        held, order = weight.const_value, node.attributes["perm"].as_ints()
        if not isinstance(held, TorchTensor):
            continue

        def turned(held: Any = held, order: Any = order) -> Any:
            return TorchTensor(held.raw.permute(*order).contiguous())

        shape = ir.Shape([held.shape[axis] for axis in order])
        name = f"{weight.name}.transposed"
        stored = ir.Value(name=name, shape=shape, type=ir.TensorType(held.dtype))
        stored.const_value = ir.LazyTensor(turned, held.dtype, shape, name=name)
        model.graph.register_initializer(stored)
        node.outputs[0].replace_all_uses_with(stored)
        model.graph.remove(node, safe=True)
        assert weight.name is not None
        del model.graph.initializers[weight.name]


def _register_slot() -> None:
    """Tells the onnx package of the slot's node: the exporter refuses a node without a schema."""
    import onnx

    if onnx.defs.has(SLOT_NAME, SLOT_DOMAIN):
        return
    schema = onnx.defs.OpSchema
    kinds = [("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "Activations and weights.")]
    inputs = [schema.FormalParameter("x", "T"), schema.FormalParameter("index", "tensor(int64)")]
    onnx.defs.register_schema(
        schema(
            SLOT_NAME,
            SLOT_DOMAIN,
            1,
            doc="Where experts were taken out of a model.",
            inputs=[*inputs, schema.FormalParameter("weight", "T")],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=kinds,
            attributes=[schema.Attribute("number", schema.AttrType.INT, "Which experts.")],
        )
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what tracer and optimiser report about their passes, whole graphs among it, off the terminal and out of logs."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _refusal(model: PreTrainedModel, why: str) -> ExportError:
    return ExportError(
        f"{type(model).__name__} cannot be exported to ONNX.",
        why=why,
        remedy="docs/onnx.md lists the families that can; run this one with transformers.",
    )
