"""Draws the picture and fills in the table of the README from the results of `quality.py`, so that neither is typed.

    python benchmarks/plot.py

Needs matplotlib (extra `dev`). The same results give the same SVG, byte by byte, with the same matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from study.cells import ROOT
from study.plots import draw_quality, fingerprint, quality_data
from study.results import Results, shown, significant

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
    "self-generated": "**this package**, on text that the model wrote",
    "quality": "**this package**, `quality` (default)",
}
DRAWN = ("paper", "slbf", "channels", "serving", "quality")
HEIGHT = 3.8


def table(results: Results) -> str:
    """The rows of the README as Markdown, in the order of `SHOWN`: KL at every budget, perplexity at the smallest."""
    keeps = results.keeps
    original = results.values(results.of("quality", keeps[-1])[:1], "original_perplexity")[0]
    out = [
        f"| KL × 1000 at | {' | '.join(f'{keep:.0%}' for keep in keeps)} | perplexity at {keeps[-1]:.0%} ({original:.2f}) |",
        "|---|" + "--:|" * (len(keeps) + 1),
    ]
    for method, title in SHOWN.items():
        found = [results.of(method, keep) for keep in keeps]
        cells = [shown(results.values(rows, "kl"), 1000, none="impossible") for rows in found]
        perplexity = results.mean(found[-1], "perplexity")
        cells.append("" if perplexity is None else significant(perplexity, 4))
        out.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def fill_in(readme: str, written: str) -> str:
    """The README with the table between its two marks replaced."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    assert tail, f"README.md has lost the marks {BEGIN.strip()} and {END.strip()}"
    return f"{head}{BEGIN}\n{written}\n{END}{tail}"


def mark(results: Results) -> str:
    """What the picture holds of its results."""
    return fingerprint(quality_data(results, DRAWN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=PICTURE, help="SVG or PNG to write")
    args = parser.parse_args()
    results = Results.load("pocket-moe")
    assert results is not None, "measure first: `python benchmarks/quality.py`"
    draw_quality(results, args.picture, DRAWN, HEIGHT)
    README.write_text(fill_in(README.read_text(encoding="utf-8"), table(results)), encoding="utf-8")
    print(f"Wrote {args.picture} and the table in {README}")


if __name__ == "__main__":
    main()
