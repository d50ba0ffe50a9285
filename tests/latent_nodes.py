"""Nodes of the operator library, the numbers to feed them, and slow plain programs for what they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from molae_compress.kernels import build, register
from molae_compress.modeling.bases import basis_matrix
from molae_compress.tensors import Bank, ExpertsSpec, LatentShape

Feeds = dict[str, Tensor | None]

GEMM_INPUTS = ("a", "b", "ends", "bias", "row_weight")
LATENT_INPUTS = (
    "x", "index", "weight", "encode", "encode_pivots", "core", "up_encode", "up_encode_pivots", "core_up", "core_bias",
    "down", "decode", "decode_pivots", "decode_bias",
)  # fmt: skip
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Relative to the largest number of a result: float arithmetic in another order, or roundings of both results."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def model_of(op: str, feeds: Feeds, **attributes: Any) -> bytes:
    """A model of one node whose inputs are all fed when it runs; those that are None are left out of the node."""
    names = GEMM_INPUTS if op == "GroupedGemm" else LATENT_INPUTS
    given = {name: tensor for name, tensor in feeds.items() if tensor is not None}
    inputs = [name if name in given else "" for name in names]
    while not inputs[-1]:
        inputs.pop()
    nodes = [
        helper.make_node(op, inputs, ["typed"], domain="molae", **attributes),
        helper.make_node("Cast", ["typed"], ["y"], to=TensorProto.FLOAT),  # numpy has no bfloat16
    ]
    values = [
        helper.make_tensor_value_info(name, ONNX_TYPES[tensor.dtype], [f"{name}_{i}" for i in range(tensor.dim())])
        for name, tensor in given.items()
    ]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("molae", 1)]
    return bytes(
        helper.make_model(
            helper.make_graph(nodes, "node", values, [result]), opset_imports=opsets, ir_version=10
        ).SerializeToString()
    )


def run_node(op: str, feeds: Feeds, *, threads: int = 1, **attributes: Any) -> Tensor:
    """What one node makes of `feeds`, in their type."""
    import onnxruntime

    build()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    register(options)
    session = onnxruntime.InferenceSession(model_of(op, feeds, **attributes), options, providers=["CPUExecutionProvider"])
    assert all(dimension is not None for dimension in session.get_outputs()[0].shape)  # inferred when the graph was loaded
    binding = bind(session, feeds)
    session.run_with_iobinding(binding)
    first = next(tensor for tensor in feeds.values() if tensor is not None)
    return torch.from_numpy(binding.get_outputs()[0].numpy()).to(first.dtype)


def bind(session: Any, feeds: Feeds) -> Any:
    """An IO binding of all inputs and of `y`: only so can bfloat16 be fed."""
    import onnxruntime

    binding = session.io_binding()
    for name, tensor in feeds.items():
        if tensor is not None:
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(*_bits(tensor))
            binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    return binding


def _bits(tensor: Tensor) -> tuple[Any, int]:
    element = ONNX_TYPES[tensor.dtype]
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy(), element


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Asserts that two results are equal up to rounding of the type of `found`."""
    assert found.shape == expected.shape
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    # Where all of it is small, it is the difference of numbers of order 1: the tail of gelu, say, is within 4e-7.
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=TOLERANCE[found.dtype] * max(scale, 0.1))


def latent_attributes(bank: Bank, **activation: Any) -> dict[str, Any]:
    """The attributes of the node of a bank; `activation` are those that are not in it."""
    shape, spec = bank.shape, bank.spec
    return {
        "num_experts": spec.num_experts,
        "input_group": shape.input_group,
        "output_group": shape.output_group,
        "rank_in": shape.rank_in,
        "rank_out": shape.rank_out or 0,
        "gated": int(spec.has_gate),
        "interleaved": int(spec.interleaved),
        **activation,
    }


def latent_feeds(bank: Bank, tensors: Mapping[str, Tensor], x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Feeds:
    """The inputs of the node of a bank, from the tensors it stores."""
    held = {name.removeprefix(bank.prefix): tensor for name, tensor in tensors.items() if name.startswith(bank.prefix)}
    feeds: Feeds = {"x": x_TH, "index": index_TK, "weight": weight_TK}
    if bank.shape.form == "layer":
        first = "gate_up_proj" if bank.spec.has_gate else "up_proj"
        core, down = held[f"core.{first}"], held["core.down_proj"]
        feeds |= {
            "encode": held["encode.weight"],
            "core": (core if bank.spec.is_transposed else core.transpose(1, 2)).flatten(0, 1),
            "core_bias": held.get(f"core.{first}_bias"),
            "down": (down.transpose(1, 2) if bank.spec.is_transposed else down).flatten(0, 1),
            "decode": held["decode.weight"].T,
        }
    else:
        stems = bank.shape.branches()
        for (basis, core_name), prefix, place in zip(stems, ("", "up_"), ("core", "core_up"), strict=False):
            feeds |= {
                f"{prefix}encode": held[f"{basis}.weight"],
                f"{prefix}encode_pivots": held.get(f"{basis}.pivots"),
                place: held[f"core.{core_name}"],
            }
        feeds |= {
            "core_bias": held.get("core.bias"),
            "down": held["core.down"],
            "decode": held.get("decode.weight"),
            "decode_pivots": held.get("decode.pivots"),
        }
    return feeds | {"decode_bias": held.get("decode_bias")}


def random_bank(
    shape: LatentShape,
    *,
    hidden: int,
    intermediate: int,
    experts: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **spec: Any,
) -> tuple[Bank, dict[str, Tensor]]:
    """A bank of random tensors of such sizes that every one of them matters."""
    described = ExpertsSpec("experts", 0, experts, hidden, intermediate, **spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in shape.tensors(described).items():
        if name.endswith(".pivots"):
            rank = shape.rank_out if name.startswith("decode") else shape.rank_in
            assert rank is not None
            chosen = [torch.randperm(hidden, generator=generator)[:rank].sort().values for _ in range(size[0] // rank)]
            tensors[name] = torch.cat(chosen).to(torch.int32)
        else:
            tensors[name] = (torch.randn(size, generator=generator) * 0.3).to(dtype)
    return shape.banks(described)[0], tensors


def random_routing(
    bank: Bank, tokens: int, top_k: int, *, dtype: torch.dtype = torch.float32, seed: int = 1, strangers: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T,H], index [T,K] without repeats but for strangers, whose share is about `strangers`, and weight [T,K]."""
    generator = torch.Generator().manual_seed(seed)
    E = bank.spec.num_experts
    x_TH = torch.randn(tokens, bank.spec.hidden, generator=generator).to(dtype)
    index_TK = torch.rand(tokens, E, generator=generator).argsort(dim=1)[:, :top_k]
    index_TK = index_TK.masked_fill(torch.rand(tokens, top_k, generator=generator) < strangers, E)
    return x_TH, index_TK, torch.rand(tokens, top_k, generator=generator).to(dtype)


def naive_latent(feeds: Feeds, attributes: Mapping[str, Any]) -> Tensor:
    """What `molae::LatentExperts` is defined as: one slot after the other, in float64."""
    given = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in feeds.items()
        if tensor is not None
    }
    at = {"rank_out": 0, **attributes}
    E, R, R_out, H = at["num_experts"], at["rank_in"], at["rank_out"], given["x"].shape[1]

    def basis(stem: str, group: int) -> Tensor:
        return basis_matrix(given[stem], given.get(f"{stem}_pivots"), groups=E // group, hidden=H)

    y_TH = torch.zeros_like(given["x"])
    for t, k in torch.cartesian_prod(*(torch.arange(size) for size in given["index"].shape)).reshape(-1, 2).tolist():
        e, x_H = int(given["index"][t, k]), given["x"][t]
        if e == E:
            continue
        z_R = basis("encode", at["input_group"])[e // at["input_group"]] @ x_H
        h_J = z_R @ given["core"].view(E, R, -1)[e]
        if "core_up" in given:
            up_R = basis("up_encode", at["input_group"])[e // at["input_group"]] @ x_H
            both = (h_J, up_R @ given["core_up"].view(E, R, -1)[e])
            h_J = torch.stack(both, 1).flatten() if at.get("interleaved") else torch.cat(both)
        if "core_bias" in given:
            h_J = h_J + given["core_bias"][e]
        u = given["down"].view(E, -1, given["down"].shape[1])[e] @ naive_activation(h_J, at)
        if R_out:
            u = u @ basis("decode", at["output_group"])[e // at["output_group"]]
        y_TH[t] += given["weight"][t, k] * (u + given["decode_bias"][e] if "decode_bias" in given else u)
    return y_TH


def naive_activation(h_NJ: Tensor, at: Mapping[str, Any]) -> Tensor:
    """[...,I]: what lies between the projections, by its definition."""
    name, alpha, limit = at.get("activation", "identity"), at.get("alpha", 1.0), at.get("limit", 0.0) or float("inf")

    def function(gate: Tensor) -> Tensor:
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) if name == "silu" else ACTIVATIONS[name](gate)

    if not at.get("gated"):
        return function(h_NJ)
    gate, up = (h_NJ[..., ::2], h_NJ[..., 1::2]) if at.get("interleaved") else h_NJ.chunk(2, dim=-1)
    return function(gate) * (up.clamp(-limit, limit) + at.get("up_offset", 0.0))


def naive_gemm(feeds: Feeds, attributes: Mapping[str, Any]) -> Tensor:
    """What `molae::GroupedGemm` is defined as, in float64."""
    given = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in feeds.items()
        if tensor is not None
    }
    starts, width = [0, *given["ends"].tolist()], given["b"].shape[2 if attributes.get("transposed") else 1]
    y = given["a"].new_zeros(given["a"].shape[0], width // 2 if attributes.get("gated") else width)
    for g, (begin, end) in enumerate(pairwise(starts)):
        weight = given["b"][g] if attributes.get("transposed") else given["b"][g].T
        h = given["a"][begin:end] @ weight
        h = naive_activation(h + given["bias"][g] if "bias" in given else h, attributes)
        y[begin:end] = h * given["row_weight"][begin:end, None] if "row_weight" in given else h
    return y
