"""How fast the operators of the domain `molae` are on the CPU, beside ONNX Runtime's own MoE operator and torch.

    python benchmarks/onnx_speed.py                    # minutes; results/onnx.json, the table of docs/onnx-operators.md
    python benchmarks/onnx_speed.py --hidden 512 --intermediate 256 --rounds 5 --results trial.json
    python benchmarks/onnx_speed.py --json             # for a program

One experts module of random weights is run as

    molae      one `molae::LatentExperts` node
    ort-moe    `MatMul`, `com.microsoft::MoE`, `MatMul`: the layer form only
    torch      the latent module in PyTorch, `experts_implementation="grouped_mm"`
    dense      the experts before compression: `com.microsoft::MoE`

on a prompt and on single tokens. Programs take turns, and a ratio is the median over the rounds of (time of the other) /
(time of `molae`) in the same round, above 1 where `molae` is faster: other load on the machine hits both. Every call has
tokens of its own, so that experts do not stay in the cache. Goals: at least 1 against ort-moe and torch of the same form;
a library under 5 MB that loads within 50 ms.

The name is not `onnx.py` because scripts here would then import it in place of the package.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from molae_compress.kernels import build, library_path, register
from molae_compress.modeling.bases import Basis
from molae_compress.modeling.routed import make_route, routed_linear, routed_sum
from molae_compress.tensors import LatentShape
from onnx_results import RESULTS, store

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
CALLS = 8  # with tokens of their own, one after another
MAX_BYTES, MAX_SECONDS = 5_000_000, 0.05

Program = Callable[[int], None]


@dataclass(frozen=True)
class Sizes:
    hidden: int
    intermediate: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Row:
    """One comparison: milliseconds a call, medians over the rounds."""

    form: str
    dtype: str
    tokens: int
    threads: int
    other: str
    molae_ms: float
    other_ms: float
    ratio: float


def shape_of(form: str, sizes: Sizes, keep: float) -> LatentShape:
    """Layer form, or a basis of each expert's own and interpolative; ranks such that about `keep` of the numbers stay."""
    E, H, I = sizes.experts, sizes.hidden, sizes.intermediate
    if form == "layer":
        rank = round(keep * 3 * E * H * I / (3 * E * I + 2 * H) / 8) * 8
        return LatentShape("layer", rank, rank, E, E)
    side = {2 * I: 0, I: 0}
    for rows in side:  # R (rows + H - R) = keep * rows * H
        total = rows + H
        side[rows] = max(8, round((total - (total**2 - 4 * keep * rows * H) ** 0.5) / 2 / 8) * 8)
    return LatentShape("grouped", side[2 * I], side[I], 1, 1, storage="interpolative")


def routing(sizes: Sizes, tokens: int, call: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(call)
    scores_TE = torch.randn(tokens, sizes.experts, generator=generator)
    weight_TK, index_TK = scores_TE.softmax(-1).topk(sizes.top_k)
    weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    x_TH = torch.randn(tokens, sizes.hidden, generator=generator)
    return x_TH.to(dtype), index_TK, weight_TK.to(dtype)


def random_weights(sizes: Sizes, shape: LatentShape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of the node by name, in the order of its definition."""
    E, H, I, R, R_out = sizes.experts, sizes.hidden, sizes.intermediate, shape.rank_in, shape.rank_out or 0
    groups, out_groups = E // shape.input_group, E // shape.output_group
    cut = shape.storage == "interpolative"

    def normal(*size: int) -> Tensor:
        return (torch.randn(size) * size[-1] ** -0.5).to(dtype)

    def pivots(count: int, rank: int) -> Tensor:
        return torch.cat([torch.randperm(H)[:rank].sort().values for _ in range(count)]).to(torch.int32)

    weights = {"encode": normal(groups * R, H - R * cut), "core": normal(E * R, 2 * I)}
    weights |= {"down": normal(E * R_out, I), "decode": normal(out_groups * R_out, H - R_out * cut)}
    if cut:
        weights |= {"encode_pivots": pivots(groups, R), "decode_pivots": pivots(out_groups, R_out)}
    return weights


def as_initializer(name: str, tensor: Tensor) -> Any:
    if tensor.dtype is torch.bfloat16:
        bits = tensor.contiguous().view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, TensorProto.BFLOAT16, list(tensor.shape), bits, raw=True)
    return numpy_helper.from_array(tensor.contiguous().numpy(), name)


def session_of(nodes: list[Any], weights: dict[str, Tensor], inputs: dict[str, Tensor], threads: int) -> Any:
    import onnxruntime

    kinds = {torch.int64: TensorProto.INT64} | {dtype: ONNX_TYPES[name] for name, dtype in TYPES.items()}
    values = [helper.make_tensor_value_info(name, kinds[tensor.dtype], [None, None]) for name, tensor in inputs.items()]
    result = helper.make_tensor_value_info("y", kinds[inputs["x"].dtype], [None, None])
    initializers = [as_initializer(name, tensor) for name, tensor in weights.items()]
    graph = helper.make_graph(nodes, "experts", values, [result], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("molae", 1), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    register(options)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_program(nodes: list[Any], weights: dict[str, Tensor], calls: list[dict[str, Tensor]], threads: int) -> Program:
    """Inputs are bound once: what is timed is the run."""
    import onnxruntime

    session = session_of(nodes, weights, calls[0], threads)
    bindings, kept = [], []
    for inputs in calls:
        binding = session.io_binding()
        for name, tensor in inputs.items():
            array = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
            kinds = {torch.int64: TensorProto.INT64} | {dtype: ONNX_TYPES[name] for name, dtype in TYPES.items()}
            kept.append(array)
            binding.bind_ortvalue_input(
                name, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kinds[tensor.dtype])
            )
        binding.bind_output("y")
        bindings.append(binding)

    def run(call: int, kept: list[Any] = kept) -> None:
        session.run_with_iobinding(bindings[call])

    return run


def molae_program(sizes: Sizes, shape: LatentShape, weights: dict[str, Tensor], calls: list[Any], threads: int) -> Program:
    order = ("encode", "encode_pivots", "core", "", "", "", "", "down", "decode", "decode_pivots")
    names = ["x", "index", "weight", *(name if name in weights else "" for name in order)]
    attributes = {
        "num_experts": sizes.experts,
        "input_group": shape.input_group,
        "output_group": shape.output_group,
        "rank_in": shape.rank_in,
        "rank_out": shape.rank_out,
        "gated": 1,
        "activation": "silu",
    }
    node = helper.make_node("LatentExperts", names, ["y"], domain="molae", **attributes)
    feeds = [dict(zip(("x", "index", "weight"), call, strict=True)) for call in calls]
    return onnx_program([node], weights, feeds, threads)


def moe_program(sizes: Sizes, width: int, weights: dict[str, Tensor], calls: list[Any], threads: int) -> Program:
    """`com.microsoft::MoE` at hidden size `width`, between two products if that is not the model's; random experts."""
    E, I, dtype = sizes.experts, sizes.intermediate, calls[0][0].dtype
    inner = {
        "fc1": (torch.randn(E, 2 * I, width) * width**-0.5).to(dtype),
        "fc2": (torch.randn(E, width, I) * I**-0.5).to(dtype),
    }
    latent = width != sizes.hidden
    attributes = {
        "k": sizes.top_k,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 1,
    }
    moe = ["z" if latent else "x", "router", "fc1", "", "fc2"], ["u" if latent else "y"]
    nodes = [helper.make_node("MoE", *moe, domain="com.microsoft", **attributes)]
    if latent:
        inner |= {"encode_t": weights["encode"].T, "decode": weights["decode"]}
        nodes = [
            helper.make_node("MatMul", ["x", "encode_t"], ["z"]),
            *nodes,
            helper.make_node("MatMul", ["u", "decode"], ["y"]),
        ]
    feeds = [
        {"x": x, "router": torch.full((x.shape[0], E), -1e4, dtype=dtype).scatter(1, index, weight.log())}
        for x, index, weight in calls
    ]
    return onnx_program(nodes, inner, feeds, threads)


def torch_program(sizes: Sizes, shape: LatentShape, weights: dict[str, Tensor], calls: list[Any], threads: int) -> Program:
    """The steps of `LatentExperts` in torch, with the products of transformers' `grouped_mm`."""
    E, H, dtype = sizes.experts, sizes.hidden, calls[0][0].dtype
    where: dict[str, Any] = {"device": torch.device("cpu"), "dtype": dtype}
    storage = shape.storage
    assert shape.rank_out is not None
    encode = Basis(E // shape.input_group, shape.input_group, shape.rank_in, H, storage, decode=False, **where)
    decode = Basis(E // shape.output_group, shape.output_group, shape.rank_out, H, storage, decode=True, **where)
    for basis, stem in ((encode, "encode"), (decode, "decode")):
        basis.weight.data, basis.pivots = weights[stem], weights.get(f"{stem}_pivots")
    core, down = weights["core"].view(E, shape.rank_in, -1), weights["down"].view(E, shape.rank_out, -1)

    @torch.inference_mode()
    def run(call: int) -> None:
        torch.set_num_threads(threads)
        x_TH, index_TK, weight_TK = calls[call]
        route = make_route(index_TK, E, "grouped_mm")
        shared = shape.input_group == E
        z_SR = encode(x_TH)[route.token_S] if shared else encode(x_TH[route.token_S], route)
        gate_SI, up_SI = routed_linear(z_SR, core, route, 1, transposed=True).chunk(2, dim=-1)
        u_SR = routed_linear(F.silu(gate_SI) * up_SI, down, route, 1, transposed=False)
        if shared:
            decode(routed_sum(u_SR, weight_TK, route))
        else:
            routed_sum(decode(u_SR, route), weight_TK, route)

    return run


def times_of(programs: dict[str, Program], rounds: int) -> dict[str, list[float]]:
    """Seconds a call, of each round; the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_number in range(rounds + 1):
        for name, program in programs.items():
            started = time.perf_counter()
            for call in range(CALLS):
                program(call)
            if round_number:
                seconds[name].append((time.perf_counter() - started) / CALLS)
    return seconds


def compare(form: str, sizes: Sizes, keep: float, dtype_name: str, tokens: int, threads: int, rounds: int) -> list[Row]:
    dtype, shape = TYPES[dtype_name], shape_of(form, sizes, keep)
    weights = random_weights(sizes, shape, dtype)
    calls = [routing(sizes, tokens, call, dtype) for call in range(CALLS)]
    programs = {
        "molae": molae_program(sizes, shape, weights, calls, threads),
        "torch": torch_program(sizes, shape, weights, calls, threads),
    }
    if dtype_name != "bfloat16":  # for which ONNX Runtime has no such operator on the CPU
        if form == "layer":
            programs["ort-moe"] = moe_program(sizes, shape.rank_in, weights, calls, threads)
        programs["dense"] = moe_program(sizes, sizes.hidden, weights, calls, threads)
    seconds = times_of(programs, rounds)
    ours = seconds.pop("molae")
    return [
        Row(
            form,
            dtype_name,
            tokens,
            threads,
            name,
            1e3 * statistics.median(ours),
            1e3 * statistics.median(theirs),
            statistics.median(their / our for their, our in zip(theirs, ours, strict=True)),
        )
        for name, theirs in seconds.items()
    ]


def loading() -> tuple[int, float]:
    """Bytes of the library and seconds to load it: median of several fresh processes."""
    program = "import ctypes, sys, time; t = time.perf_counter(); ctypes.CDLL(sys.argv[1]); print(time.perf_counter() - t)"
    command = [sys.executable, "-c", program, str(library_path())]
    seconds = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    return library_path().stat().st_size, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.5, help="share of the numbers of the dense experts")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=["float32", "bfloat16"])
    parser.add_argument("--forms", nargs="+", choices=("layer", "grouped"), default=["layer", "grouped"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="other parts of the file stay as they are")
    args = parser.parse_args()
    torch.manual_seed(0)
    build()
    sizes = Sizes(args.hidden, args.intermediate, args.experts, args.top_k)
    size, seconds = loading()
    if args.json:
        print(json.dumps({"library_bytes": size, "load_seconds": seconds}), flush=True)
    else:
        goals = f"goals {MAX_BYTES / 1e6:g} MB, {1e3 * MAX_SECONDS:g} ms"
        print(f"library {size / 1e6:.2f} MB, loads in {1e3 * seconds:.1f} ms ({goals})")
    rows = []
    for form in args.forms:
        shape = shape_of(form, sizes, args.keep)
        if not args.json:
            described = " ".join(f"{name}={value}" for name, value in asdict(sizes).items())
            print(f"{form}: {described} ranks={shape.rank_in}/{shape.rank_out}")
        for dtype in args.dtypes:
            for threads in args.threads:
                for tokens in (args.prompt, 1):
                    for row in compare(form, sizes, args.keep, dtype, tokens, threads, args.rounds):
                        rows.append(asdict(row))
                        if args.json:
                            print(json.dumps(asdict(row)), flush=True)
                            continue
                        print(
                            f"  {row.dtype:8} {row.tokens:4} tokens {row.threads} threads: molae {row.molae_ms:8.2f} ms, "
                            f"{row.other:8} {row.other_ms:8.2f} ms, ratio {row.ratio:.2f}",
                            flush=True,
                        )
    about = {"sizes": asdict(sizes), "keep": args.keep, "library_bytes": size, "load_seconds": seconds}
    store("operators", {**about, "rows": rows}, args.results)


if __name__ == "__main__":
    main()
