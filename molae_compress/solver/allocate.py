"""Allocation: ranks for every layer and side from one budget, by water-filling on measured error curves.

A curve lists what a choice costs (numbers stored) and the error it leaves, all curves in one unit of error. Greedy on
the lower convex hulls is optimal for every budget it meets exactly (Everett, 1963); what it leaves over is spent on the
best steps that still fit.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Curve:
    """The choices of one layer's side: ranks ascending, with strictly ascending costs and the error left by each."""

    ranks: tuple[int, ...]
    costs: tuple[int, ...]
    errors: tuple[float, ...]

    def from_rank(self, least: float) -> Curve:
        """Without the choices below a rank; the last remains in any case."""
        first = min(sum(rank < least for rank in self.ranks), len(self.ranks) - 1)
        return Curve(self.ranks[first:], self.costs[first:], self.errors[first:])

    def gain(self, start: int, target: int) -> float:
        """Fall in error per unit of cost between two choices."""
        return (self.errors[start] - self.errors[target]) / (self.costs[target] - self.costs[start])


def tail_errors(energy_GM: Tensor, ranks: Sequence[int]) -> tuple[float, ...]:
    """Error of each rank for groups that share one rank: energies [G,M] beyond it, summed over groups."""
    energy_M = energy_GM.sum(0)
    tail = energy_M.flip(0).cumsum(0).flip(0)
    return tuple(float(tail[rank]) if rank < len(tail) else 0.0 for rank in ranks)


def tails_at(energy_GM: Tensor, ranks: Sequence[int]) -> Tensor:
    """[G,R]: for each group alone, the energies beyond each rank."""
    tail_GM = energy_GM.flip(1).cumsum(1).flip(1)
    tail_GM = torch.cat([tail_GM, tail_GM.new_zeros(len(tail_GM), 1)], dim=1)
    return tail_GM[:, torch.tensor(ranks).clamp(max=energy_GM.shape[1])]


def bought(tables: Sequence[tuple[Tensor, Tensor]], budget: int) -> list[Tensor] | None:
    """What each of very many curves takes of a budget that is spent where the error falls most per cost.

    The same choice as steps along the hulls, found from its price: every curve takes the point of least error + price *
    cost, and the price is the lowest at which the budget suffices (bisection).

    Args:
        tables: errors [U,R] of U curves, and costs [R] that they share.
        budget: for all of them together.

    Returns:
        costs [U] for each table; None if the cheapest choices exceed the budget.
    """

    def taken(price: float) -> list[Tensor]:
        return [cost_R[(error_UR + price * cost_R).argmin(1)] for error_UR, cost_R in tables]

    if sum(float(cost_R[0]) * len(error_UR) for error_UR, cost_R in tables) > budget:
        return None
    largest = max(float(error_UR.max()) for error_UR, _ in tables)
    low, high = -80.0, 2.0  # of the price, as an exponent of e times the largest error
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(float(cost_U.sum()) for cost_U in taken(largest * math.exp(middle))) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return taken(largest * math.exp(high))


def at_lowest_price(choose: Callable[[float], Choice], fits: Callable[[Choice], bool]) -> Choice | None:
    """What is chosen at the lowest price that makes it fit, found by bisection; None if even the highest does not.

    Prices are powers of e from -40, next to nothing, to 20, beside which nothing else counts.
    """
    low, high = -40.0, 20.0
    found = choose(math.exp(high))
    if not fits(found):
        return None
    for _ in range(20):
        middle = (low + high) / 2
        tried = choose(math.exp(middle))
        if fits(tried):
            found, high = tried, middle
        else:
            low = middle
    return found


def allocate(curves: Sequence[Curve], budget: int) -> list[int] | None:
    """Index of the chosen rank in each curve, total cost within `budget`; None if even the cheapest choices exceed it.

    Never worse than taking the same index in every curve.
    """
    level = _water_level(curves, budget)
    if level is None:
        return None
    chosen = _fill(curves, level, budget)
    uniform = _same_index(curves, budget)
    return _fill(curves, uniform, budget) if _total_error(curves, uniform) < _total_error(curves, chosen) else chosen


def _total_cost(curves: Sequence[Curve], chosen: Sequence[int]) -> int:
    return sum(curve.costs[k] for curve, k in zip(curves, chosen, strict=True))


def _total_error(curves: Sequence[Curve], chosen: Sequence[int]) -> float:
    return sum(curve.errors[k] for curve, k in zip(curves, chosen, strict=True))


def _same_index(curves: Sequence[Curve], budget: int) -> list[int]:
    """The highest index that all curves can afford together, a curve's last one if it has fewer."""
    for index in range(max((len(curve.costs) for curve in curves), default=1) - 1, 0, -1):
        chosen = [min(index, len(curve.costs) - 1) for curve in curves]
        if _total_cost(curves, chosen) <= budget:
            return chosen
    return [0] * len(curves)


def _water_level(curves: Sequence[Curve], budget: int) -> list[int] | None:
    """Steps along the hulls in the order of their gain, as far as the budget goes; None if the cheapest exceed it."""
    if sum(curve.costs[0] for curve in curves) > budget:
        return None
    chosen = [0] * len(curves)
    left = budget - _total_cost(curves, chosen)
    hulls = [_hull(curve) for curve in curves]
    queue = [(-curve.gain(0, hull[0]), i, 0) for i, (curve, hull) in enumerate(zip(curves, hulls, strict=True)) if hull]
    heapq.heapify(queue)
    while queue:
        _, i, step = heapq.heappop(queue)
        curve, target = curves[i], hulls[i][step]
        price = curve.costs[target] - curve.costs[chosen[i]]
        if price > left:
            continue
        left, chosen[i] = left - price, target
        if step + 1 < len(hulls[i]):
            heapq.heappush(queue, (-curve.gain(target, hulls[i][step + 1]), i, step + 1))
    return chosen


def _hull(curve: Curve) -> list[int]:
    """Indices after the first on the falling part of the lower convex hull of (cost, error)."""
    hull = [0]
    for k in range(1, len(curve.costs)):
        while len(hull) > 1 and curve.gain(hull[-2], hull[-1]) < curve.gain(hull[-2], k):
            hull.pop()
        hull.append(k)
    return [k for previous, k in pairwise(hull) if curve.gain(previous, k) > 0]


def _fill(curves: Sequence[Curve], chosen: Sequence[int], budget: int) -> list[int]:
    """Spends what is left over on whatever step, long or short, gains most per cost among those that still fit."""
    filled = list(chosen)
    left = budget - _total_cost(curves, filled)
    while True:
        fits = [
            (-curve.gain(filled[i], k), i, k)
            for i, curve in enumerate(curves)
            for k in range(filled[i] + 1, len(curve.costs))
            if curve.costs[k] - curve.costs[filled[i]] <= left
        ]
        gain, i, k = min(fits, default=(0.0, 0, 0))
        if gain >= 0:
            return filled
        left -= curves[i].costs[k] - curves[i].costs[filled[i]]
        filled[i] = k


def partition(values: Sequence[float], count: int) -> list[list[int]]:
    """Indices of `values` in at most `count` sets of similar ones: least sum of squared distances to the means of sets.

    Exact, by dynamic programming over the sorted values.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    sums, squares = [0.0], [0.0]
    for index in order:
        sums.append(sums[-1] + values[index])
        squares.append(squares[-1] + values[index] ** 2)

    def spread(start: int, end: int) -> float:
        return squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / (end - start)

    ends = range(len(order) + 1)
    best = [0.0] + [float("inf")] * len(order)
    cuts: list[list[int]] = []
    for _ in range(min(count, len(order))):
        found = [min(((best[start] + spread(start, end), start) for start in range(end)), default=(0.0, 0)) for end in ends]
        best, starts = [error for error, _ in found], [start for _, start in found]
        cuts.append(starts)
    sets, end = [], len(order)
    for starts in reversed(cuts):
        if end == 0:
            break
        sets.append(order[starts[end] : end])
        end = starts[end]
    return sets[::-1]
