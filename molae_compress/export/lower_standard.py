"""Experts in plain ONNX operators, for any runtime: a loop over the experts that were hit.

One iteration gathers the tokens of an expert, reads that expert's weights and adds to the output. Prefill never holds more
than one expert's weights and rows beside the stored ones (gathering weights for every token would multiply them by the
number of tokens), and decoding reads only the experts of the token. What is computed between the projections is the
model's own activation, traced. Sums are taken in float32, the only type in which all runtimes add by index.
Shape suffixes: see `molae_compress.tensors`; n rows of one expert, N width of what is summed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from molae_compress.errors import ExportError
from molae_compress.export.banks import BasisTensors, ExpertTensors
from molae_compress.export.emitter import Emitter
from molae_compress.export.graph import OPSET, quiet, without_notes
from molae_compress.export.lower_moe import routing_matrix
from molae_compress.export.lower_molae import places

if TYPE_CHECKING:
    import onnx_ir as ir


class _Rows(nn.Module):
    """A function of rows as a module, with the modules it belongs to, so that their weights are found."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        self.__dict__["function"] = function

    def forward(self, x_NM: Tensor) -> Tensor:
        result: Tensor = self.__dict__["function"](x_NM)
        return result


def trace_rows(function: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, name: str) -> ir.Graph:
    """The graph of a function `[N,width]` to `[N,M]`, for any N.

    Raises:
        ExportError: torch cannot trace it.
    """
    with quiet():
        try:
            program = torch.onnx.export(
                _Rows(function).eval(),
                (torch.ones(3, width, dtype=dtype),),
                dynamic_shapes=({0: "rows"},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
            raise ExportError(
                f"What '{name}' computes between or after its projections cannot be exported.",
                why=str(error.__cause__ or error).strip().split("\n")[0],
                remedy="Report the model class to the project.",
            ) from error
    assert program is not None
    graph: ir.Graph = without_notes(program.model).graph
    return graph


def lower(
    emit: Emitter,
    experts: ExpertTensors,
    activation: ir.Graph,
    after: ir.Graph | None,
    x: ir.Value,
    index: ir.Value,
    weight: ir.Value,
) -> ir.Value:
    """Writes the nodes; returns the routed sums `[T,H]`.

    Args:
        emit: where to.
        experts: what.
        activation: their activation, traced.
        after: what follows the second projection, traced.
        x: `[T,H]`.
        index: `[T,K]` int64.
        weight: `[T,K]`.
    """
    parts = [_Bank(emit, experts, number, activation, after).of(x, index, weight) for number in range(len(experts.banks))]
    y = parts[0]
    for part in parts[1:]:
        y = emit.op("Add", y, part)
    return y


class _Bank:
    """One bank being written."""

    def __init__(
        self, emit: Emitter, experts: ExpertTensors, number: int, activation: ir.Graph, after: ir.Graph | None
    ) -> None:
        self.emit, self.bank, self.activation, self.after = emit, experts.banks[number], activation, after
        self.body = Emitter(emit.graph, f"{emit.prefix}/bank_{number}", emit.dtype)
        self.total = None if experts.in_place else experts.spec.num_experts
        self.name = f"bank_{number}."

    def of(self, x: ir.Value, index: ir.Value, weight: ir.Value) -> ir.Value:
        """[T,H]: what the experts of the bank add."""
        emit, bank = self.emit, self.bank
        E = bank.spec.num_experts
        if self.total is not None:
            index = emit.op("Gather", emit.weight(f"{self.name}place", places(bank, self.total)), index)
        hit = emit.op("Unique", emit.op("Reshape", index, emit.constant([-1])), sorted=1)
        if self.total is not None:  # slots of other banks' experts point behind the last one
            hit = emit.op("Compress", hit, emit.op("Less", hit, emit.constant(E)))
        latents = (
            [x] if bank.encode is None else [self._shared(x, basis) for basis in (bank.encode, bank.up_encode) if basis]
        )
        decode = bank.decode if bank.decode is not None and bank.decode.groups == 1 and self.after is None else None
        width = bank.spec.hidden if decode is None else decode.rank
        sizes = emit.op("Concat", emit.op("Shape", index, start=0, end=1), emit.constant([width]), axis=0)
        none = emit.op("Expand", emit.constant(0.0, torch.float32), sizes)
        total = emit.op("Loop", emit.op("Size", hit), None, none, body=self._loop(hit, index, weight, latents, decode))
        y = emit.narrowed(total)
        if decode is not None:
            y = self._decoded(emit, y, decode, None)
        if bank.bias_out_EH is not None:
            routing = routing_matrix(emit, index, weight, E + 1 if self.total is not None else E)
            bias = emit.weight(f"{self.name}bias_out", bank.bias_out_EH, self._with_stranger)
            y = emit.op("Add", y, emit.op("MatMul", emit.narrowed(routing), bias))
        return y

    def _with_stranger(self, bias_EH: Tensor) -> Tensor:
        """A row of zeros for slots of other banks' experts."""
        return bias_EH if self.total is None else torch.nn.functional.pad(bias_EH, (0, 0, 0, 1))

    def _loop(
        self, hit: ir.Value, index: ir.Value, weight: ir.Value, latents: list[ir.Value], decode: BasisTensors | None
    ) -> ir.Graph:
        """The body: number of the iteration, condition and sums to condition and sums."""
        import onnx_ir as ir

        body, bank = self.body, self.bank
        number, going, sums = (
            ir.Value(name=f"{body.prefix}/{name}", type=ir.TensorType(kind), shape=shape)
            for name, kind, shape in (
                ("iteration", ir.DataType.INT64, ir.Shape([])),
                ("going", ir.DataType.BOOL, ir.Shape([])),
                ("sums", ir.DataType.FLOAT, None),
            )
        )
        expert = body.op("Gather", hit, number)
        slots_n2 = body.op("Transpose", body.op("NonZero", body.op("Equal", index, expert)), perm=[1, 0])
        token_n = body.op("Gather", slots_n2, body.constant(0), axis=1)
        weight_n1 = body.op("Unsqueeze", body.op("GatherND", weight, slots_n2), body.constant([1]))
        bases = [bank.encode, bank.up_encode]
        rows = {id(latent): body.op("Gather", latent, token_n) for latent in latents}
        read = [
            self._encoded(rows[id(latent)], basis, expert, number)
            for number, (latent, basis) in enumerate(zip(latents, bases, strict=False))
        ]
        h = self._first(read, expert)
        u = body.op("MatMul", body.inline(self.activation, h, "activation"), self._of_expert("down", bank.down_ENI, expert))
        if bank.decode is not None and decode is None:
            u = self._decoded(body, u, bank.decode, expert)
        if self.after is not None:
            u = body.inline(self.after, u, "after")
        share = body.widened(body.op("Mul", u, weight_n1))
        added = body.op("ScatterND", sums, body.op("Unsqueeze", token_n, body.constant([1])), share, reduction="add")
        added.type = ir.TensorType(ir.DataType.FLOAT)
        still = body.op("Identity", going)
        still.type, still.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
        return ir.Graph([number, going, sums], [still, added], nodes=body.nodes, name=f"{body.prefix}/body")

    def _shared(self, x: ir.Value, basis: BasisTensors) -> ir.Value:
        """`[T,R]` where all experts share the basis, else `x`, to be encoded in the loop."""
        if basis.groups > 1:
            return x
        return self._apply(self.emit, x, basis, None, "encode" if basis is self.bank.encode else "up_encode")

    def _encoded(self, rows: ir.Value, basis: BasisTensors | None, expert: ir.Value, number: int) -> ir.Value:
        if basis is None or basis.groups == 1:
            return rows
        return self._apply(self.body, rows, basis, expert, ("encode", "up_encode")[number])

    def _apply(self, emit: Emitter, x: ir.Value, basis: BasisTensors, expert: ir.Value | None, name: str) -> ir.Value:
        """`[n,R]` of `[n,H]`."""
        weight = self._of_group(emit, name, basis, basis.weight_GRW.transpose(1, 2), expert)
        if basis.pivots_GR is None:
            return emit.op("MatMul", x, weight)
        kept = emit.op("Gather", x, self._of_group(emit, f"{name}_pivots", basis, basis.pivots_GR.int(), expert), axis=1)
        if basis.rank == basis.hidden:
            return kept
        rest = emit.op("Gather", x, self._of_group(emit, f"{name}_rest", basis, basis.rest_GC().int(), expert), axis=1)
        return emit.op("Add", kept, emit.op("MatMul", rest, weight))

    def _decoded(self, emit: Emitter, u: ir.Value, basis: BasisTensors, expert: ir.Value | None) -> ir.Value:
        """`[n,H]` of `[n,R]`."""
        weight = self._of_group(emit, "decode", basis, basis.weight_GRW, expert)
        if basis.pivots_GR is None:
            return emit.op("MatMul", u, weight)
        whole = u if basis.rank == basis.hidden else emit.op("Concat", u, emit.op("MatMul", u, weight), axis=1)
        order_GH = torch.cat((basis.pivots_GR, basis.rest_GC()), dim=1).argsort(dim=1).int()
        return emit.op("Gather", whole, self._of_group(emit, "decode_order", basis, order_GH, expert), axis=1)

    def _first(self, read: list[ir.Value], expert: ir.Value) -> ir.Value:
        """`[n,J]`: the first projection, in the model's order of rows."""
        body, bank, spec = self.body, self.bank, self.bank.spec
        h = body.op("MatMul", read[0], self._of_expert("core", bank.core_ERJ, expert))
        if bank.up_core_ERI is not None:
            up = body.op("MatMul", read[1], self._of_expert("core_up", bank.up_core_ERI, expert))
            if spec.interleaved:
                pair = [body.op("Unsqueeze", half, body.constant([2])) for half in (h, up)]
                h = body.op("Reshape", body.op("Concat", *pair, axis=2), body.constant([-1, spec.rows]))
            else:
                h = body.op("Concat", h, up, axis=1)
        if bank.bias_in_EJ is None:
            return h
        return body.op("Add", h, self._of_expert("bias_in", bank.bias_in_EJ, expert, transposed=False))

    def _of_expert(self, name: str, tensor: Tensor, expert: ir.Value, *, transposed: bool | None = None) -> ir.Value:
        """The slice of one expert; `down` is stored the way round it is used."""
        turned = name == "down" if transposed is None else transposed
        stored = self.body.weight(f"{self.name}{name}", tensor.transpose(1, 2) if turned else tensor)
        return self.body.op("Gather", stored, expert)

    def _of_group(self, emit: Emitter, name: str, basis: BasisTensors, tensor: Tensor, expert: ir.Value | None) -> ir.Value:
        """The slice of the expert's group, or the only one."""
        if expert is None:
            return emit.weight(f"{self.name}{name}", tensor[0])
        stored = emit.weight(f"{self.name}{name}", tensor)
        group = expert if basis.group == 1 else emit.op("Div", expert, emit.constant(basis.group))
        return emit.op("Gather", stored, group)
