"""Writes the page of benchmarks and its pictures from the results of `quality.py`, so that no figure on it is typed.

    python benchmarks/page.py
    python benchmarks/page.py --results FOLDER --docs FOLDER     # of a trial, elsewhere

Needs matplotlib (extra `dev`); measures nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from study import plots, tables
from study.cells import RESULTS, ROOT
from study.methods import OURS, PEERS, TRAINED, TRAINED_KEEP
from study.results import Results, significant, table

DOCS = ROOT / "docs"
BYTES = 2  # of a number as the checkpoints here store it
METHODS = tuple(OURS | PEERS)
HEIGHT = 5.4

HEAD = """# Benchmarks

What compression costs in quality, at equal numbers of expert parameters: this package, the paper's procedure, and other
published methods written anew from their papers' formulas. `benchmarks/page.py` writes this page from the results that the
repository holds; no figure on it is typed by hand. To measure it all again:

```bash
make bench-quality FRESH=1
```

- KL: mean divergence of the compressed model's next-token distribution from the original's, in nats per token.
- top-1: share of tokens at which both find the same token most likely.
- err_h: squared change of the residual stream by the experts of a layer, relative to it, summed over layers
  ([how it works](how-it-works.md#what-is-minimised)).
- kept: share of the routed experts' parameters that is stored; every basis, core, index and bias counts.
- fit: processor seconds of the whole fit, calibration included, on one thread.
- ±: standard deviation over the seeds. Rows without it were measured once, most of them because they depend on no seed.

Where a method reads text, all read the same windows. This package adds an eighth that the model writes itself
([how it works](how-it-works.md#text-that-the-model-writes)), which costs no data; the row "on text that the model wrote"
reads nothing else. How the other methods are set up, and what is counted, is in `benchmarks/README.md`.
"""
ELSEWHERE = """Model and text of this section are not part of the repository; the figures are from results that are. With a
folder that holds `calibration/mixed.txt`, `calibration/novels.txt`, `calibration/astronomy.txt` and `eval/*.txt`, and a
model, they are measured again by

```bash
make bench-quality FRESH=1 DATA=texts MODEL=model
```
"""
NOVELS = """The novels of this section are not part of the repository; the figures are from results that are. With a folder
that holds `calibration/novels.txt` and `eval/novel.txt` they are measured again by

```bash
make bench-quality FRESH=1 DATA=texts
```
"""
SHARING = """The same parameters spent on input bases of single experts (per-expert factors with every other part of the
method) and on bases that 2, 4 or all experts of a layer share, which buys rank. Output bases are each expert's own."""
PARTS = """The default with one thing changed at a time, on the first seed. A factor above 1 is what the default gains by
that part; other text is {other}."""
ROBUST = """KL × 1000 on each text, at {keeps} of the parameters, on the first seed. Calibrated on: {mixtures}."""
STEPS = """At {keep:.0%} of the parameters, all in one run on one machine. MoBE and SLBF take gradient steps: as many as in
the tables above, and as many as their papers state at least."""
WIDTHS = """Models of one sparse layer of {experts} experts, {top_k} a token, random, at {keep:.0%} of the parameters. Ours
is all of the default, {tokens:,} calibration tokens included; the gradient methods' steps were timed and count as often as
their papers state at least, without the search for shapes. How many times as long they take:"""
INFERENCE = """What the routed experts take for one token, from the plan of each result. Bytes are those of the weights that
a token computed alone reads, each weight once; the original has {size} bytes a number."""


def section(title: str, text: str, rows: str, command: str = "") -> str:
    """A section, or nothing if its table has no rows."""
    return f"### {title}\n\n{text}\n\n{rows}\n{command}" if rows else ""


def picture(name: str, words: str) -> str:
    return f"![{words}](assets/{name})\n\n"


def command(results: Results, name: str) -> str:
    """What measures a table alone."""
    study = results.study
    needs = (" --data texts" if study.needs_data else "") + (" --model model" if not study.model else "")
    return f"```bash\npython benchmarks/quality.py --studies {study.name} --tables {name}{needs}\n```\n\n"


def methods(results: Results) -> str:
    """The main tables and their pictures."""
    out = f"### All methods: {results.model}\n\n"
    out += picture(f"methods-{results.study.name}.svg", "KL against the share of parameters kept")
    out += f"Perplexity of the original: {_original(results)}.\n\n"
    for keep in results.keeps:
        out += f"**{keep:.0%} of the parameters:**\n\n{tables.main(results, keep)}\n"
    out += command(results, "main")
    if plots.by_layer(results):
        out += f"### Where the errors arise: {results.model}\n\n"
        out += picture(f"layers-{results.study.name}.svg", "err_h of every layer")
    return out + section(f"What sharing is worth: {results.model}", SHARING, tables.sharing(results) + "\n")


def study(results: Results, title: str, lead: str) -> str:
    """All sections of a study, those left out that were not measured."""
    model, main = results.model, "main" in results.study.tables
    other = _listed([name for name in results.texts if name not in results.home]) or "none here"
    mixtures = "; ".join(f"{name} = {_listed(sources)}" for name, sources in results.study.calibrations.items())
    keeps = " / ".join(f"{keep:.0%}" for keep in results.keeps)
    parts = [
        f"## {title}\n\n{lead.strip()}\n\n{tables.settings(results)}\n\n",
        methods(results) if main else "",
        section(
            f"Single parts: {model}",
            PARTS.format(other=other),
            tables.parts(results) if "parts" in results.study.tables else "",
            command(results, "parts"),
        ),
        section(
            f"Other text, mixed text, little text: {model}",
            ROBUST.format(keeps=keeps, mixtures=mixtures),
            tables.robust(results),
            command(results, "robust"),
        ),
        section(
            f"Fit time: {model}",
            STEPS.format(keep=TRAINED_KEEP),
            tables.trained(results),
            command(results, "trained"),
        ),
        section(
            f"Operations and bytes per token: {model}",
            INFERENCE.format(size=BYTES),
            tables.inference(results, BYTES) + "\n" if main and tables.inference(results, BYTES) else "",
        ),
    ]
    return "".join(parts)


def _original(results: Results) -> str:
    texts = next(row["texts"] for row in results.content["rows"] if "texts" in row)
    return ", ".join(f"{significant(texts[name]['original_perplexity'], 4)} on `{name}`" for name in results.texts)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def widths(folder: Path) -> str:
    """Fit time at larger widths, as `fit_time.py` left it."""
    path = folder / "fit-time.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    body = [
        [f"{row['hidden']}, {row['intermediate']}", significant(row["fit_seconds"])]
        + [f"{significant(row[method]['ratio'], 2)}" for method in TRAINED]
        for row in found["rows"]
    ]
    titles = [f"{tables.titled(method)}, {steps:,} steps" for method, steps in TRAINED.items()]
    lead = WIDTHS.format(**found, **{key: found["rows"][0][key] for key in ("experts", "top_k")})
    head = f"## Fit time at larger widths\n\n{lead}\n\n"
    return (
        head + table(("hidden, expert width", "ours (s)", *titles), body) + "\n```bash\npython benchmarks/fit_time.py\n```\n"
    )


def page(folder: Path = RESULTS) -> str:
    """The whole page as Markdown."""
    found = {name: Results.load(name, folder) for name in ("pocket-moe", "pocket-moe-novels", "development")}
    out = HEAD + "\n"
    if example := found["pocket-moe"]:
        out += study(
            example, "The example model", "Everything here is measured on what the repository and its dependencies hold."
        )
    if novels := found["pocket-moe-novels"]:
        out += study(novels, "The example model on a novel", NOVELS)
    if other := found["development"]:
        out += study(other, "Another model", ELSEWHERE)
    out += widths(folder)
    return out.rstrip() + "\n"


def pictures(folder: Path = RESULTS) -> dict[str, tuple[Results, str]]:
    """Name of each picture: its results, and the fingerprint of what it shows."""
    out = {}
    for name in ("pocket-moe", "development"):
        if results := Results.load(name, folder):
            out[f"methods-{name}.svg"] = (results, plots.fingerprint(plots.quality_data(results, METHODS)))
            if layers := plots.by_layer(results):
                out[f"layers-{name}.svg"] = (results, plots.fingerprint(layers))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of benchmarks.md and of assets/")
    args = parser.parse_args()
    for name, (results, _) in pictures(args.results).items():
        path = args.docs / "assets" / name
        if name.startswith("methods"):
            plots.draw_quality(results, path, METHODS, HEIGHT)
        else:
            plots.draw_layers(results, path)
    target = args.docs / "benchmarks.md"
    target.write_text(page(args.results), encoding="utf-8")
    print(f"Wrote {target} and its pictures")


if __name__ == "__main__":
    main()
