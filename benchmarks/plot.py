"""Draws the picture and fills in the table of the README from the results of `quality.py`, so that neither is typed.

    python benchmarks/plot.py

Needs matplotlib (extra `dev`). The same results give the same SVG, byte by byte, with the same matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality-pocket-moe.json"
PICTURE = ROOT / "docs" / "assets" / "quality.svg"
README = ROOT / "README.md"
BEGIN, END = "<!-- table written by benchmarks/plot.py -->\n", "<!-- end of table -->\n"
SHOWN = {
    "hc-smoe": "HC-SMoE, merging experts",
    "reap": "REAP, pruning experts",
    "paper": "MoLAE, the paper's procedure",
    "d2-moe": "D2-MoE",
    "svd-llm": "SVD-LLM v2, each matrix of its own",
    "mobe-even": "MoBE, even split",
    "pifa": "SVD-LLM v2, stored as PIFA",
    "slbf": "SLBF",
    "channels": "channel pruning, ridge leverage",
    "serving": "**this package**, `serving`",
    "quality": "**this package**, `quality` (default)",
}
DRAWN = {
    "paper": "#6e6e6e",
    "slbf": "#8a5a9e",
    "channels": "#5b8c5a",
    "serving": "#3583bd",
    "quality": "#1f4e9c",
}


def table(results: Mapping[str, Any]) -> str:
    """The rows of the README as Markdown, in the order of `SHOWN`: KL at every budget, perplexity at the smallest."""
    rows = {(row["method"], row["keep"]): row for row in results["rows"]}
    keeps = sorted({keep for _, keep in rows}, reverse=True)
    original = next(row["original_perplexity"] for row in rows.values() if "original_perplexity" in row)
    out = [
        f"| KL × 1000 at | {' | '.join(f'{keep:.0%}' for keep in keeps)} | perplexity at {keeps[-1]:.0%} ({original:.2f}) |",
        "|---|" + "--:|" * (len(keeps) + 1),
    ]
    for method, title in SHOWN.items():
        found = [rows[method, keep] for keep in keeps]
        cells = [f"{1000 * row['kl']:.1f}" if "kl" in row else "impossible" for row in found]
        cells.append(f"{found[-1]['perplexity']:.2f}" if "kl" in found[-1] else "")
        out.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def fill_in(readme: str, written: str) -> str:
    """The README with the table between its two marks replaced."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    assert tail, f"README.md has lost the marks {BEGIN.strip()} and {END.strip()}"
    return f"{head}{BEGIN}\n{written}\n{END}{tail}"


def fingerprint(results: Mapping[str, Any]) -> str:
    """What the picture holds of its results, so that a test finds it out of date."""
    shown = [[row["method"], row["share"], row["kl"]] for row in results["rows"] if row["method"] in DRAWN and "kl" in row]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def draw(results: Mapping[str, Any], path: Path) -> None:
    """KL against the share kept, one line a method."""
    import matplotlib

    matplotlib.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    # The salt fixes the ids inside the file.
    plt.rcParams |= {"svg.hashsalt": "molae", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(figsize=(7.2, 3.8), layout="constrained")
    for method, colour in DRAWN.items():
        rows = [row for row in results["rows"] if row["method"] == method and "kl" in row]
        rows.sort(key=lambda row: row["share"])
        x, y = [100 * row["share"] for row in rows], [row["kl"] for row in rows]
        axes.plot(x, y, "o-", color=colour, linewidth=2, markersize=5)
        title = SHOWN[method].replace("`", "").replace("*", "").split(",")[-1 if method in ("serving", "quality") else 0]
        axes.annotate(title, (x[-1], y[-1]), (8, 0), textcoords="offset points", va="center", color=colour)
    axes.set_yscale("log")
    axes.set_yticks(ticks := [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(right=axes.get_xlim()[1] + 17)
    axes.set_xticks(ticks := sorted({100 * row["keep"] for row in results["rows"]}), [f"{tick:g}%" for tick in ticks])
    axes.set_xlabel("parameters of the routed experts that are kept")
    axes.set_ylabel("KL to the original (nats per token)")
    axes.set_title(f"{Path(results['model']).name}: lower is better", loc="left", fontsize=10)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Description": fingerprint(results)} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, facecolor="white", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE, help="SVG or PNG to write")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8"))
    draw(results, args.picture)
    README.write_text(fill_in(README.read_text(encoding="utf-8"), table(results)), encoding="utf-8")
    print(f"Wrote {args.picture} and the table in {README}")


if __name__ == "__main__":
    main()
