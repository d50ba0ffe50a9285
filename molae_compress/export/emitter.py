"""Writing nodes and weights into a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import onnx_ir as ir


class Emitter:
    """Adds nodes to a list, and weights to the graph they will belong to.

    Names all start with one prefix, so that several emitters can write into one graph and into the bodies of its loops.

    Attributes:
        nodes: emitted so far, in order.
        dtype: of weights and activations.
    """

    def __init__(self, graph: ir.Graph, prefix: str, dtype: torch.dtype) -> None:
        self.graph, self.prefix, self.dtype = graph, prefix, dtype
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output."""
        import onnx_ir as ir

        kept = {name: value for name, value in attributes.items() if value is not None}
        name = f"{self.prefix}/{op_type}_{len(self.nodes)}"
        attrs = ir.convenience.convert_attributes(kept)
        node = ir.Node(domain, op_type, inputs, attrs, num_outputs=1, name=name)
        node.outputs[0].name = f"{name}_output"
        self.nodes.append(node)
        return node.outputs[0]

    def weight(self, name: str, tensor: Tensor, prepare: Callable[[Tensor], Tensor] = Tensor.contiguous) -> ir.Value:
        """A weight of the graph, stored as `prepare(tensor)` but computed only when it is written.

        Args:
            name: unique under the prefix.
            tensor: held until then; a view costs nothing.
            prepare: what is stored; it must work on the meta device too.
        """
        like = prepare(tensor.detach().to("meta"))
        return self.stored(name, tuple(like.shape), like.dtype, lambda: prepare(tensor.detach()))

    def stored(self, name: str, shape: Sequence[int], dtype: torch.dtype, make: Callable[[], Tensor]) -> ir.Value:
        """A weight of the graph that `make` computes when it is written, of a shape and type known before."""
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

        full, kind = f"{self.prefix}.{name}", from_torch_dtype(dtype)

        def made() -> TorchTensor:
            with torch.no_grad():
                return TorchTensor(make().contiguous())

        value = ir.Value(name=full, shape=ir.Shape(shape), type=ir.TensorType(kind))
        value.const_value = ir.LazyTensor(made, kind, ir.Shape(shape), name=full)
        self.graph.register_initializer(value)
        return value

    def constant(self, values: Sequence[int] | Sequence[float] | int | float, dtype: torch.dtype = torch.int64) -> ir.Value:
        """A small constant; equal ones of a graph are stored once."""
        import onnx_ir as ir
        from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

        kind = str(dtype).removeprefix("torch.")
        name = f"molae.{kind}.{str(values).replace(' ', '')}"
        if name not in self.graph.initializers:
            tensor = torch.tensor(values, dtype=dtype)
            value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(from_torch_dtype(dtype)))
            value.const_value = TorchTensor(tensor, name=name)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def widened(self, value: ir.Value) -> ir.Value:
        """A value of the emitter's type in float32."""
        return value if self.dtype == torch.float32 else self._cast(value, torch.float32)

    def narrowed(self, value: ir.Value) -> ir.Value:
        """A float32 value in the emitter's type."""
        return value if self.dtype == torch.float32 else self._cast(value, self.dtype)

    def _cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        from onnx_ir.tensor_adapters import from_torch_dtype

        return self.op("Cast", value, to=int(from_torch_dtype(dtype)))

    def inline(self, traced: ir.Graph, x: ir.Value, name: str) -> ir.Value:
        """The nodes of a graph with one input and one output, applied to `x`; its weights go to the graph written into."""
        copy = traced.clone()
        for value in list(copy.initializers.values()):
            assert value.name is not None
            del copy.initializers[value.name]
            value.name = f"{self.prefix}.{name}.{value.name}"
            self.graph.register_initializer(value)
        copy.inputs[0].replace_all_uses_with(x, replace_graph_outputs=True)
        nodes, (output,) = list(copy), list(copy.outputs)
        copy.outputs.clear()
        copy.remove(nodes)
        for node in nodes:
            node.name = f"{self.prefix}/{name}_{len(self.nodes)}"
            for number, value in enumerate(node.outputs):
                value.name = f"{node.name}_output_{number}"
            self.nodes.append(node)
        return output
