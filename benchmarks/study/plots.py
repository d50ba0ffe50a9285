"""Pictures of results. The same results give the same SVG, byte by byte, with the same matplotlib (extra `dev`)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .methods import OURS
from .results import Results

# Told apart with any kind of colour blindness (Okabe and Ito); ours are drawn thick.
COLOURS = {
    "quality": "#0072b2",
    "one bank": "#0072b2",
    "serving": "#56b4e9",
    "self-generated": "#000000",
    "data-free": "#000000",
    "paper": "#7f7f7f",
    "svd-llm": "#e69f00",
    "pifa": "#e69f00",
    "mobe": "#009e73",
    "mobe-even": "#009e73",
    "slbf": "#cc79a7",
    "d2-moe": "#7f7f7f",
    "hc-smoe": "#7f7f7f",
    "reap": "#7f7f7f",
    "channels": "#d55e00",
}
DASHED = ("one bank", "serving", "data-free", "svd-llm", "mobe", "d2-moe", "reap")
LABELS = {
    "quality": "this package, default",
    "one bank": "this package, one rank a side",
    "serving": "this package, serving",
    "self-generated": "this package, on its own text",
    "data-free": "this package, data-free",
    "paper": "MoLAE, the paper's",
    "svd-llm": "SVD-LLM v2",
    "pifa": "SVD-LLM v2 as PIFA",
    "mobe": "MoBE, gate and up",
    "mobe-even": "MoBE, even split",
    "slbf": "SLBF",
    "d2-moe": "D2-MoE",
    "hc-smoe": "HC-SMoE",
    "reap": "REAP",
    "channels": "channel pruning",
}
LAYERS = ("quality", "channels", "slbf")


def curve(results: Results, method: str) -> list[tuple[float, float, float, float]]:
    """Share kept, and the mean, lowest and highest KL over the seeds, at every budget a method can keep to."""
    points = []
    for keep in results.keeps:
        if rows := results.of(method, keep):
            kl, share = results.values(rows, "kl"), results.mean(rows, "share")
            assert share is not None
            points.append((share, sum(kl) / len(kl), min(kl), max(kl)))
    return sorted(points)


def by_layer(results: Results) -> dict[str, dict[str, list[float]]]:
    """Per budget and method err_h of every layer, the mean over the seeds."""
    out: dict[str, dict[str, list[float]]] = {}
    for keep in results.keeps:
        rows = {method: [row["layers"] for row in results.of(method, keep) if row["layers"]] for method in LAYERS}
        means = {m: [sum(part) / len(part) for part in zip(*found, strict=True)] for m, found in rows.items() if found}
        if means:
            out[f"{keep:g}"] = means
    return out


def fingerprint(data: Any) -> str:
    """What a picture holds of its results, so that a test finds it out of date."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def quality_data(results: Results, methods: Sequence[str]) -> dict[str, list[tuple[float, float, float, float]]]:
    return {method: found for method in methods if (found := curve(results, method))}


def draw_quality(results: Results, path: Path, methods: Sequence[str], height: float) -> None:
    """KL against the share kept, one line a method with its name at the right end."""
    data = quality_data(results, methods)
    plt = _matplotlib(path)
    figure, axes = plt.subplots(figsize=(7.4, height), layout="constrained")
    for method, points in data.items():
        x, y = [100 * point[0] for point in points], [point[1] for point in points]
        bounds = [[point[1] - point[2] for point in points], [point[3] - point[1] for point in points]]
        axes.errorbar(
            x,
            y,
            yerr=bounds,
            fmt="--o" if method in DASHED else "-o",
            color=COLOURS[method],
            linewidth=2.4 if method in OURS else 1.2,
            markersize=5 if method in OURS else 3,
            capsize=2,
        )
    axes.set_yscale("log")
    _plain_ticks(axes, [value for points in data.values() for point in points for value in point[1:2]])
    axes.set_xticks(ticks := sorted(100 * keep for keep in results.keeps), [f"{tick:g}%" for tick in ticks])
    right = max(100 * point[0] for points in data.values() for point in points)
    ends = {method: points[-1][1] for method, points in data.items()}
    for method, level in _apart(ends, axes.get_ylim(), 0.21 / height).items():
        x, y = 100 * data[method][-1][0], ends[method]
        weight = "bold" if method in OURS else "normal"
        arrow = {"arrowstyle": "-", "color": COLOURS[method], "linewidth": 0.6, "relpos": (0, 0.5)}
        place = (right + 2, level)
        axes.annotate(
            LABELS[method], (x, y), place, va="center", color=COLOURS[method], weight=weight, fontsize=9, arrowprops=arrow
        )
    axes.set_xlim(right=right + 13)
    axes.set_xlabel("parameters of the routed experts that are kept")
    axes.set_ylabel("KL to the original (nats per token)")
    axes.set_title(f"{results.model}: lower is better", loc="left", fontsize=10)
    _save(figure, path, fingerprint(data))
    plt.close(figure)


def draw_layers(results: Results, path: Path) -> None:
    """err_h of every layer, one panel a budget."""
    data = by_layer(results)
    plt = _matplotlib(path)
    figure, several = plt.subplots(1, len(data), figsize=(7.4, 2.9), sharey=True, squeeze=False, layout="constrained")
    for axes, (keep, found) in zip(several[0], data.items(), strict=True):
        for method, errors in found.items():
            line = "-o" if method in OURS else "--s"
            axes.plot(range(len(errors)), errors, line, color=COLOURS[method], label=LABELS[method], markersize=4)
        axes.set_yscale("log")
        axes.set_xticks(range(max(len(errors) for errors in found.values())))
        axes.set_title(f"{float(keep):.0%} kept", loc="left", fontsize=10)
        axes.set_xlabel("layer")
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    several[0][0].set_ylabel("err_h")
    several[0][0].legend(frameon=False, fontsize=8)
    _save(figure, path, fingerprint(data))
    plt.close(figure)


def _apart(ends: Mapping[str, float], limits: tuple[float, float], step: float) -> dict[str, float]:
    """Levels of labels on a log scale, `step` of its height apart at least, each as near to its own place as that allows."""
    low, high = (math.log(limit) for limit in limits)
    order = sorted(ends, key=lambda method: ends[method])
    places = {method: (math.log(ends[method]) - low) / (high - low) for method in order}
    for _ in range(200):
        for under, above in pairwise(order):
            lack = step - (places[above] - places[under])
            if lack > 0:
                places[above] += lack / 2
                places[under] -= lack / 2
    return {method: math.exp(low + place * (high - low)) for method, place in places.items()}


def _plain_ticks(axes: Any, values: Sequence[float]) -> None:
    """Ticks 1, 2, 5 of every decade, without exponents."""
    low, high = min(values), max(values)
    ticks = [digit * 10.0**power for power in range(-7, 3) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _matplotlib(path: Path) -> Any:
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    # The salt fixes the ids inside the file.
    plt.rcParams |= {"svg.hashsalt": "molae", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    return plt


def _save(figure: Any, path: Path, mark: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Description": mark} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, facecolor="white", dpi=150)
