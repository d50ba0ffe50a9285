"""The least time that a GPU can take for one layer of experts: operations and bytes of every step, by hand.

    python benchmarks/gpu_roofline.py
    python benchmarks/gpu_roofline.py --tokens 4096 --hidden 2048 --intermediate 768 --experts 128 --top-k 8 --rank 1024

Nothing is measured: it is arithmetic on sizes, against two numbers of a data sheet. A step takes at least the larger of its
operations divided by the peak and its bytes divided by the bandwidth; each tensor counts once, weights of experts that no
token has are not read, and routing is uniform. `docs/kernels.md` explains the table.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

PEAK, BANDWIDTH = 989e12, 3.35e12  # H100 SXM: dense bf16 operations and bytes per second
BYTES = 2


class Step(NamedTuple):
    """Operations and bytes of one step."""

    name: str
    operations: float
    numbers: float

    @property
    def seconds(self) -> float:
        return max(self.operations / PEAK, self.numbers * BYTES / BANDWIDTH)

    @property
    def bound(self) -> str:
        return "operations" if self.operations / PEAK > self.numbers * BYTES / BANDWIDTH else "bytes"


def latent_steps(T: int, H: int, I: int, E: int, K: int, R: int) -> list[Step]:
    """One basis a side and cores at rank R."""
    S, hit = T * K, experts_hit(T, E, K)
    return [
        Step("encode", 2 * T * H * R, T * H + H * R + T * R),
        Step("core, gate", 2 * S * R * 2 * I, hit * R * 2 * I + T * R + S * I),
        Step("down", 2 * S * I * R, hit * I * R + S * I + S * R),
        Step("routed sum", 0, S * R + T * R),
        Step("decode", 2 * T * R * H, T * R + R * H + T * H),
    ]


def dense_steps(T: int, H: int, I: int, E: int, K: int) -> list[Step]:
    """The same experts before compression."""
    S, hit = T * K, experts_hit(T, E, K)
    return [
        Step("gate and up", 2 * S * H * 2 * I, hit * H * 2 * I + T * H + S * I),
        Step("down", 2 * S * I * H, hit * I * H + S * I + S * H),
        Step("routed sum", 0, S * H + T * H),
    ]


def experts_hit(T: int, E: int, K: int) -> float:
    """Experts that at least one of T tokens has, on average."""
    return E * (1 - (1 - K / E) ** T)


def table(title: str, steps: list[Step]) -> list[str]:
    total = sum(step.seconds for step in steps)
    operations = sum(step.operations for step in steps)
    lines = [f"{title}: {total * 1e6:.0f} us at least, {operations / total / PEAK:.0%} of peak"]
    lines += [
        f"  {step.name:<12}{step.operations / 1e9:>9.2f} GFLOP{step.numbers * BYTES / 1e6:>9.1f} MB"
        f"{step.operations / step.numbers / BYTES:>7.0f} FLOP/B{step.seconds * 1e6:>8.1f} us  {step.bound}"
        for step in steps
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 64, 512, 4096, 16384])
    sizes = {"--hidden": 2048, "--intermediate": 768, "--experts": 128, "--top-k": 8, "--rank": 1024}
    for name, value in sizes.items():
        parser.add_argument(name, type=int, default=value)
    chosen = parser.parse_args()
    H, I, E, K = chosen.hidden, chosen.intermediate, chosen.experts, chosen.top_k
    for T in chosen.tokens:
        print("\n".join(table(f"{T} tokens, rank {chosen.rank}", latent_steps(T, H, I, E, K, chosen.rank))))
        print("\n".join(table(f"{T} tokens, dense", dense_steps(T, H, I, E, K))))


if __name__ == "__main__":
    main()
