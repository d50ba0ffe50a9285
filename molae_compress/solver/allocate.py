"""Allocation: ranks for every layer and side from one budget, by water-filling on measured error curves.

A curve lists what a choice costs (numbers stored) and the error it leaves, all curves in one unit of error. Greedy on
the lower convex hull is optimal for the relaxed problem: spend where the next number buys the largest fall in error.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """The choices of one layer's side: ranks ascending, with strictly ascending costs and the error left by each."""

    ranks: tuple[int, ...]
    costs: tuple[int, ...]
    errors: tuple[float, ...]


def tail_errors(energy_GM: Tensor, ranks: Sequence[int]) -> tuple[float, ...]:
    """Error of each rank for groups that share one rank: energies beyond it, summed over groups."""
    energy_M = energy_GM.sum(0)
    tail = energy_M.flip(0).cumsum(0).flip(0)
    return tuple(float(tail[rank]) if rank < len(tail) else 0.0 for rank in ranks)


def allocate(curves: Sequence[Curve], budget: int) -> list[int] | None:
    """Index of the chosen rank in each curve, total cost within `budget`; None if even the cheapest choices exceed it."""
    chosen = [0] * len(curves)
    left = budget - sum(curve.costs[0] for curve in curves)
    if left < 0:
        return None
    steps = [_hull(curve) for curve in curves]
    queue = [_step(curves[i], i, 0, hull[0]) for i, hull in enumerate(steps) if hull]
    heapq.heapify(queue)
    taken = [0] * len(curves)
    while queue:
        _, i, target = heapq.heappop(queue)
        price = curves[i].costs[target] - curves[i].costs[chosen[i]]
        if price > left:
            continue
        left, chosen[i], taken[i] = left - price, target, taken[i] + 1
        if taken[i] < len(steps[i]):
            heapq.heappush(queue, _step(curves[i], i, target, steps[i][taken[i]]))
    _fill(curves, chosen, left)
    return chosen


def _step(curve: Curve, i: int, start: int, target: int) -> tuple[float, int, int]:
    gain = curve.errors[start] - curve.errors[target]
    return -gain / (curve.costs[target] - curve.costs[start]), i, target


def _hull(curve: Curve) -> list[int]:
    """Indices after the first on the lower convex hull of (cost, error)."""
    hull = [0]
    for k in range(1, len(curve.costs)):
        while len(hull) > 1 and _slope(curve, hull[-2], hull[-1]) >= _slope(curve, hull[-2], k):
            hull.pop()
        hull.append(k)
    return hull[1:]


def _slope(curve: Curve, a: int, b: int) -> float:
    return (curve.errors[b] - curve.errors[a]) / (curve.costs[b] - curve.costs[a])


def _fill(curves: Sequence[Curve], chosen: list[int], left: int) -> None:
    """Spends what the hull steps left over on single steps, the best that still fits first."""
    while True:
        fits = [
            _step(curve, i, chosen[i], chosen[i] + 1)
            for i, curve in enumerate(curves)
            if chosen[i] + 1 < len(curve.costs) and curve.costs[chosen[i] + 1] - curve.costs[chosen[i]] <= left
        ]
        if not fits or min(fits)[0] >= 0:
            return
        _, i, target = min(fits)
        left -= curves[i].costs[target] - curves[i].costs[chosen[i]]
        chosen[i] = target
