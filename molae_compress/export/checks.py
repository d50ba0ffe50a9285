"""Whether an exported model computes what the model computes in torch: the last step of every export.

Two runs are compared, one without padding and one with rows padded on the left, each a prefill, two steps of one token and
one of several. The reference is torch in float32, on the weights as they were rounded for the export. A 16-bit export is
checked twice: its file with all arithmetic widened to float32, which proves graph and weights up to the rounding of the
graph's constants; and as it is, where the runtime has kernels for its type, within what its arithmetic allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from molae_compress.errors import ExportError
from molae_compress.export.graph import CacheShape, names
from molae_compress.export.runtime import runtime_errors
from molae_compress.layouts import LAYER_NUMBER

if TYPE_CHECKING:
    import onnxruntime as ort

TOLERANCE = 1e-4  # of a float32 export: of every logit, relative to the largest where that is above one
# Of 16-bit exports, of the typical token, relative to its logits: with float32 arithmetic one unit in the last place, for
# constants that the graph holds rounded. In their own arithmetic the errors of all layers add up, and an early token of a
# short row that goes to another expert moves all tokens after it; a wrong kernel is off by about the logits themselves.
WIDENED_TOLERANCE = {kind: torch.finfo(kind).eps for kind in (torch.float16, torch.bfloat16)}
HALF_TOLERANCE = {kind: 100 * eps for kind, eps in WIDENED_TOLERANCE.items()}
_PREFILL, _WINDOW_AT_MOST = 12, 256
_STEPS = (1, 1, 2)


@dataclass(frozen=True)
class Run:
    """A few tokens, and what torch makes of them.

    Attributes:
        name: for messages.
        ids_BL: of all steps.
        mask_BL: 0 where a row is padded.
        lengths: of the steps.
        logits_BLV: of torch.
    """

    name: str
    ids_BL: Tensor
    mask_BL: Tensor
    lengths: tuple[int, ...]
    logits_BLV: Tensor

    def parts(self) -> tuple[tuple[str, int, int], ...]:
        """Prefill and decoding: name, start and end."""
        first, end = self.lengths[0], sum(self.lengths)
        return ("prefill", 0, first), ("decoding", first, end)


def reference_runs(model: PreTrainedModel) -> list[Run]:
    """The runs that an export of `model` is to repeat, with the model's own answers in float32."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    prefill = max(_PREFILL, window + 4 if window <= _WINDOW_AT_MOST else 0)
    room = int(getattr(config, "max_position_embeddings", 0) or prefill + sum(_STEPS)) - sum(_STEPS)
    lengths = (min(prefill, room), *_STEPS)
    generator = torch.Generator().manual_seed(0)
    found = []
    with in_float32(model):
        for name, padding in (("without padding", (0,)), ("padded on the left", (0, lengths[0] // 3, lengths[0] - 2))):
            shape = (len(padding), sum(lengths))
            ids_BL = torch.randint(0, config.vocab_size, shape, generator=generator)
            mask_BL = (torch.arange(shape[1]) >= torch.tensor(padding)[:, None]).long()
            found.append(Run(name, ids_BL, mask_BL, lengths, _torch_logits(model, ids_BL, mask_BL, lengths)))
    return found


def check(
    session: ort.InferenceSession, shape: CacheShape, runs: list[Run], allowed: float, *, typical: bool
) -> dict[str, float]:
    """Compares an exported model with the runs.

    Args:
        session: of the exported model.
        shape: of its cache.
        runs: what torch says.
        allowed: the largest error that is all right.
        typical: rounding is part of the comparison. It can send a token to another expert where two are as good as equal,
            so that the error of the typical token of each row counts, not the largest.

    Returns:
        The error of each run, prefill and decoding apart.

    Raises:
        ExportError: an error is above what is allowed, or a number is not finite.
    """
    found = {}
    for run in runs:
        logits_BLV = _onnx_logits(session, shape, run)
        for part, start, end in run.parts():
            name = f"{part}, {run.name}"
            real_BL = run.mask_BL[:, start:end].bool()
            measure = _typical_error if typical else _largest_error
            found[name] = measure(logits_BLV[:, start:end], run.logits_BLV[:, start:end], real_BL)
            if not found[name] <= allowed:
                raise ExportError(
                    f"The exported model differs from the model in torch by {found[name]:.2g} ({name}); "
                    f"allowed is {allowed:.2g}.",
                    why="Logits of the same tokens were compared.",
                    remedy="Nothing was written. Export with another --experts, and report the model class to the project.",
                )
    return found


def _largest_error(found_BLV: Tensor, wanted_BLV: Tensor, real_BL: Tensor) -> float:
    """Of any logit; one that is not finite is an error without limit."""
    found, wanted = found_BLV[real_BL], wanted_BLV[real_BL]
    return float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max())) if found.isfinite().all() else torch.inf


def _typical_error(found_BLV: Tensor, wanted_BLV: Tensor, real_BL: Tensor) -> float:
    """Of the median token of the worst row, relative to the length of its logits."""
    if not found_BLV[real_BL].isfinite().all():
        return torch.inf
    error_BL = (found_BLV - wanted_BLV).norm(dim=-1) / wanted_BLV.norm(dim=-1)
    return max(float(error_L[real_L].median()) for error_L, real_L in zip(error_BL, real_BL, strict=True))


def _torch_logits(model: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor, lengths: tuple[int, ...]) -> Tensor:
    cache, found, start = DynamicCache(), [], 0
    position_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
    for length in lengths:
        end = start + length
        with torch.no_grad():
            out = model(
                input_ids=ids_BL[:, start:end],
                attention_mask=mask_BL[:, :end],
                position_ids=position_BL[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        found.append(out.logits.float())
        start = end
    return torch.cat(found, dim=1)


def _onnx_logits(session: ort.InferenceSession, shape: CacheShape, run: Run) -> Tensor:
    inputs, outputs = names(shape)
    batch = run.ids_BL.shape[0]
    type_name = next(value.type for value in session.get_inputs() if value.name == inputs[2])
    kind = np.float16 if type_name == "tensor(float16)" else np.float32
    past = [np.zeros((batch, shape.heads, 0, shape.key_width), kind)] * (len(inputs) - 2)
    found, start = [], 0
    for length in run.lengths:
        end = start + length
        feed: list[Any] = [run.ids_BL[:, start:end].numpy(), run.mask_BL[:, :end].numpy(), *past]
        with runtime_errors("The exported model cannot be run"):
            logits, *past = session.run(outputs, dict(zip(inputs, feed, strict=True)))
        found.append(torch.from_numpy(logits).float())
        start = end
    return torch.cat(found, dim=1)


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """The model computing in float32 on its own 16-bit weights, one decoder layer widened at a time."""
    layers = {name[: match.end()] for name, _ in model.named_modules() if (match := LAYER_NUMBER.search(name)) is not None}
    outside = [
        (module, (module,))
        for name, module in model.named_modules()
        if LAYER_NUMBER.search(name) is None and any(True for _ in _tensors((module,)))
    ]
    parts = [(layer, tuple(layer.modules())) for layer in map(model.get_submodule, sorted(layers))] + outside
    handles = []
    for module, owners in parts:
        held: list[tuple[dict[str, Any], str, Tensor]] = []

        def widen(*_: Any, owners: Any = owners, held: Any = held) -> None:
            for place, name, tensor in list(_tensors(owners)):
                held.append((place, name, tensor))
                wide = tensor.detach().float()
                place[name] = nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide

        def narrow(*_: Any, held: Any = held) -> None:
            while held:
                place, name, tensor = held.pop()
                place[name] = tensor

        handles += [
            module.register_forward_pre_hook(widen, prepend=True),
            module.register_forward_hook(narrow, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(modules: tuple[nn.Module, ...]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """16-bit parameters and buffers of modules themselves, and where they are kept."""
    for module in modules:
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is not None and tensor.dtype in WIDENED_TOLERANCE:
                    yield place, name, tensor


def write_widened(path: Path, target: Path) -> None:
    """Writes the graph of a 16-bit model with float32 arithmetic, on the same file of weights: they are cast when read."""
    import onnx_ir as ir

    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    model = ir.load(path)
    casts = []
    for value in list(model.graph.initializers.values()):
        if value.dtype in half:
            cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(ir.DataType.FLOAT))], name=f"{value.name}/widened")
            wide = cast.outputs[0]
            value.replace_all_uses_with(wide)
            cast.replace_input_with(0, value)
            wide.name, wide.type, wide.shape = f"{value.name}.widened", ir.TensorType(ir.DataType.FLOAT), value.shape
            casts.append(cast)
    for node in model.graph.all_nodes():
        for attribute in list(node.attributes.values()):
            if attribute.name == "to" and ir.DataType(attribute.as_int()) in half:
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in half:
                wide_tensor = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide_tensor)
    for graph in (model.graph, *model.graph.subgraphs()):
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        for value in values:
            if value.dtype in half:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    first = model.graph[0]
    model.graph.insert_before(first, casts)
    ir.save(model, target)
