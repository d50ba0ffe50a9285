"""How long the fit of one layer takes, against the time its own matrix products take at the machine's fp32 GEMM rate.

    python benchmarks/solver.py                  # Qwen3-30B-A3B shape, minutes on two cores
    python benchmarks/solver.py --experts 8      # the same work per expert, for a quick look
    python benchmarks/solver.py --json           # for a program

One layer of random but structured bf16 weights and low-rank calibration inputs is solved, both phases, in each shape.
Goal: a ratio of at most 2 with one basis a side (`all/all`). Products are counted as they are dispatched; eigenproblems,
factorisations and triangular solves are not products, but their time counts. Work that does not grow with the experts
(two eigenproblems of the hidden size) weighs more the fewer experts there are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from molae_compress.solver.layer import solve_layer
from molae_compress.solver.population import Calibrated
from molae_compress.solver.spectra import Fit
from molae_compress.tensors import DenseExperts, ExpertsSpec, LatentShape

GOAL = 2.0
PRODUCT = 2048  # side of the square products that measure the rate
PRODUCTS = 7


@dataclass(frozen=True)
class Timing:
    """One solve: seconds, operations of its products, the rate measured beside it, and how far it is from that rate."""

    shape: str
    experts: int
    tokens: int
    seconds: float
    flops: int
    gflops_per_second: float
    ratio: float


def gemm_rate() -> float:
    """Operations per second of fp32 products: median of several, on the threads the solver gets."""
    a, b = torch.randn(PRODUCT, PRODUCT), torch.randn(PRODUCT, PRODUCT)
    a @ b
    seconds = []
    for _ in range(PRODUCTS):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * PRODUCT**3 / statistics.median(seconds)


def swiglu(h_NJ: Tensor) -> Tensor:
    gate_NI, up_NI = h_NJ.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_NI) * up_NI


def structured(count: int, rows: int, width: int, generator: torch.Generator) -> Tensor:
    """[count, rows, width] bf16: half of the energy in a subspace shared by all, with falling spectrum."""
    shared = torch.randn(width // 2, width, generator=generator)
    shared *= torch.linspace(1.0, 0.1, width // 2)[:, None] / width**0.5
    out = torch.empty(count, rows, width, dtype=torch.bfloat16)
    for i in range(count):
        own = torch.randn(rows, width, generator=generator) * 0.4
        out[i] = (torch.randn(rows, width // 2, generator=generator) @ shared + own) / width**0.5
    return out


def layer(spec: ExpertsSpec, tokens: int, seed: int = 0) -> tuple[DenseExperts, Calibrated]:
    """Random weights, and tokens of a Gaussian of low effective rank with random routing."""
    generator = torch.Generator().manual_seed(seed)
    dense = DenseExperts(
        spec,
        structured(spec.num_experts, spec.rows, spec.hidden, generator),
        structured(spec.num_experts, spec.hidden, spec.intermediate, generator),
        swiglu,
    )
    mix_HH = torch.randn(spec.hidden, spec.hidden, generator=generator) / spec.hidden**0.5
    scale_H = torch.arange(1, spec.hidden + 1) ** -0.5
    x_TH = (torch.randn(tokens, spec.hidden, generator=generator) * scale_H @ mix_HH).bfloat16()
    scores_TE = torch.rand(tokens, spec.num_experts, generator=generator)
    gate_TK, index_TK = scores_TE.softmax(-1).topk(spec.top_k)
    gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
    return dense, Calibrated(x_TH, index_TK, gate_TK, torch.ones(tokens), spec.num_experts)


def measure(name: str, shape: LatentShape, dense: DenseExperts, samples: Calibrated) -> Timing:
    """Solves once; a fresh `Calibrated`, so that nothing is cached."""
    samples = Calibrated(samples.x_TH, samples.index_TK, samples.gate_TK, samples.token_T, samples.num_experts)
    rates = [gemm_rate()]
    with FlopCounterMode(display=False) as counter:
        started = time.perf_counter()
        solve_layer(dense, samples, shape, Fit(), torch.bfloat16)
        seconds = time.perf_counter() - started
    rates.append(gemm_rate())
    flops, rate = counter.get_total_flops(), sum(rates) / 2
    tokens = samples.x_TH.shape[0]
    return Timing(name, dense.spec.num_experts, tokens, seconds, flops, rate / 1e9, seconds / (flops / rate))


def shapes(spec: ExpertsSpec, rank: int) -> dict[str, LatentShape]:
    """The three shapes: one basis a side, the same in layer form, and small groups keeping about half of the numbers."""
    every = spec.num_experts
    return {
        "all/all": LatentShape("grouped", rank, rank, every, every),
        "layer": LatentShape("layer", rank, rank, every, every),
        "2/1": LatentShape("grouped", 7 * rank // 10, 3 * rank // 10, 2, 1, storage="interpolative"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128, help="experts; tokens scale along")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens with 128 experts")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--shapes", nargs="+", choices=("all/all", "layer", "2/1"), default=["all/all", "2/1"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    spec = ExpertsSpec("experts", 0, args.experts, args.hidden, args.intermediate, top_k=min(8, args.experts))
    dense, samples = layer(spec, max(1, args.tokens * args.experts // 128))
    chosen = shapes(spec, args.rank)
    for name in args.shapes:
        timing = measure(name, chosen[name], dense, samples)
        if args.json:
            print(json.dumps(asdict(timing) | {"threads": torch.get_num_threads(), "goal": GOAL}), flush=True)
            continue
        print(
            f"{timing.shape:8} E={timing.experts} H={args.hidden} I={args.intermediate} tokens={timing.tokens} "
            f"threads={torch.get_num_threads()}: solve {timing.seconds:.1f} s, products {timing.flops / 1e12:.3f} Tflop "
            f"at {timing.gflops_per_second:.1f} Gflop/s fp32 = {timing.flops / timing.gflops_per_second / 1e9:.1f} s, "
            f"ratio {timing.ratio:.2f}" + (f" (goal {GOAL:g})" if name == "all/all" else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()
