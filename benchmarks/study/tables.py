"""Tables of the page, as Markdown, from results. A table without rows is empty text."""

from __future__ import annotations

from collections.abc import Sequence

from .methods import ABLATION_KEEPS, ABLATIONS, FEW, METHODS, OURS, PEERS, ROBUST, SHARING, TRAINED, TRAINED_KEEP, changed
from .results import Results, Row, shown, significant, table

NONE = "–"


def titled(method: str) -> str:
    """The title of a row, ours in bold."""
    title = METHODS[method].title
    return f"**{title}**" if method in OURS else title


def main(results: Results, keep: float, methods: Sequence[str] = tuple(OURS | PEERS)) -> str:
    """All methods at a budget, the best first; those that cannot keep to it last."""
    measured = {row["method"] for row in results.content["rows"] if row["keep"] == keep}
    found = {method: results.of(method, keep) for method in methods if method in measured}
    order = sorted(found, key=lambda method: (not found[method], results.mean(found[method], "kl") or 0))
    head = ("method", "KL × 1000", "perplexity", "top-1 %", "err_h × 1000", "kept", "fit (s)")
    return table(head, [[titled(method), *_figures(results, found[method])] for method in order]) if found else ""


def _figures(results: Results, rows: list[Row]) -> list[str]:
    if not rows:
        return ["impossible", *5 * [NONE]]
    return [
        shown(results.values(rows, "kl"), 1000),
        shown(results.values(rows, "perplexity"), digits=4),
        shown(results.values(rows, "top1"), 100),
        shown(results.values(rows, "err_h"), 1000),
        f"{results.mean(rows, 'share'):.4f}",
        shown(results.values(rows, "fit_seconds"), digits=2),
    ]


def sharing(results: Results) -> str:
    """KL of input bases that are shared by more and more experts, beside the default."""
    rows = [
        [titled(method), *(shown(results.values(results.of(method, keep), "kl"), 1000, none=NONE) for keep in results.keeps)]
        for method in ("quality", *SHARING)
    ]
    if all(cell == NONE for row in rows[1:] for cell in row[1:]):
        return ""
    return table(("KL × 1000 at", *(f"{keep:.0%}" for keep in results.keeps)), rows)


def parts(results: Results) -> str:
    """The default with one thing changed at a time: KL, and its ratio to the default's on the same seed."""
    keeps = [keep for keep in results.keeps if keep in ABLATION_KEEPS]
    others = [name for name in results.texts if name not in results.home]
    reference = {keep: results.of("quality", keep)[:1] for keep in keeps}
    body = []
    for change, words in ABLATIONS.items():
        found = {keep: _same_seed(results.of(changed(change), keep), reference[keep]) for keep in keeps}
        if any(found.values()):
            cells = [" ".join(f"`{part.replace('=', ': ')}`" for part in change.split()), words]
            for keep in keeps:
                cells += [shown(results.values(found[keep], "kl"), 1000, none=NONE)]
                cells += [_ratio(results, found[keep], reference[keep], results.home)]
                cells += [_ratio(results, found[keep], reference[keep], others)] if others else []
            body.append(cells)
    if not body:
        return ""
    other = ["factor, other text"] if others else []
    head = ["change", "what it does", *(part for keep in keeps for part in (f"KL × 1000 at {keep:.0%}", "factor", *other))]
    first = ["none", "the default"]
    for keep in keeps:
        first += [shown(results.values(reference[keep], "kl"), 1000, none=NONE), "1", *["1" for _ in other]]
    return table(head, [first, *body], words=2)


def _same_seed(rows: list[Row], reference: list[Row]) -> list[Row]:
    seeds = {row["seed"] for row in reference}
    return [row for row in rows if row["seed"] in seeds or not row["samples"]]


def _ratio(results: Results, rows: list[Row], reference: list[Row], texts: Sequence[str]) -> str:
    kl, base = results.mean(rows, "kl", texts), results.mean(reference, "kl", texts)
    return NONE if kl is None or not base else f"{kl / base:.2f}"


def robust(results: Results) -> str:
    """KL on every text, of calibrations on text of several kinds and amounts; the budgets side by side in a cell."""
    samples = results.protocol["samples"]
    home = next(iter(results.study.calibrations))
    ways = [(name, samples) for name in results.study.calibrations] + [(home, max(2, samples // FEW))]
    body = []
    for method in ROBUST:
        for way in ways if METHODS[method].reads_text else ways[:1]:
            found = [_first(results.of(method, keep, way)) for keep in results.keeps]
            if any(found):
                read = f"{way[0]}, {way[1]} windows" if METHODS[method].reads_text else "no text"
                cells = [
                    " / ".join(shown(results.values(r, "kl", [t]), 1000, none=NONE) for r in found) for t in results.texts
                ]
                body.append([titled(method), read, *cells])
    return table(("method", "calibrated on", *(f"`{name}`" for name in results.texts)), body, 2) if body else ""


def _first(rows: list[Row]) -> list[Row]:
    """The row of the first seed: rows that were measured on one seed are compared with such."""
    return sorted(rows, key=lambda row: row["seed"])[:1]


def trained(results: Results) -> str:
    """Fit time of the methods that take gradient steps, with as many as their papers take, against the default's."""
    ours = results.of("quality", TRAINED_KEEP)
    base = results.mean(ours, "fit_seconds")
    share = results.protocol["trained_share"]
    lines: list[tuple[str, str, list[Row]]] = [
        (titled("quality"), NONE, ours),
        (titled("data-free"), NONE, results.of("data-free", TRAINED_KEEP)),
    ]
    for method, steps in TRAINED.items():
        for taken in (results.protocol["steps"], round(share * steps)):
            lines.append((titled(method), f"{taken:,}", results.of(method, TRAINED_KEEP, steps=taken)))
    body = [
        [
            title,
            steps,
            shown(results.values(rows, "fit_seconds"), digits=2),
            f"{significant((results.mean(rows, 'fit_seconds') or 0) / base, 2)}",
            shown(results.values(rows, "kl"), 1000),
        ]
        for title, steps, rows in lines
        if rows and base
    ]
    measured = any(results.of(m, TRAINED_KEEP, steps=round(share * steps)) for m, steps in TRAINED.items())
    return table(("method", "steps", "fit (s)", "times the default's", "KL × 1000"), body) if measured else ""


def inference(results: Results, bytes_per_number: int) -> str:
    """Operations and bytes that the routed experts take for one token."""
    body = []
    dense = 0
    for method in (*OURS, *SHARING, "paper"):
        cells = []
        for keep in results.keeps:
            rows = [row for row in results.of(method, keep) if "flops" in row]
            flops, read = results.mean(rows, "flops"), results.mean(rows, "active_bytes")
            if flops is None or read is None:
                cells += 3 * [NONE]
                continue
            dense = rows[0]["dense_flops"]
            cells += [f"{flops / 1000:,.0f}", f"{read / 1000:,.0f}", f"{flops / dense:.0%}"]
        if any(cell != NONE for cell in cells):
            body.append([titled(method), *cells])
    if not body:
        return ""
    original = [f"{dense / 1000:,.0f}", f"{dense / 2 * bytes_per_number / 1000:,.0f}", "100%"]
    head = [part for keep in results.keeps for part in (f"10³ operations at {keep:.0%}", "KB", "of the original's")]
    return table(("experts as", *head), [["the original", *original * len(results.keeps)], *body])


def settings(results: Results) -> str:
    """What the figures hold for."""
    content, p = results.content, results.protocol
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    windows, length = p["samples"], p["sequence_length"]
    evaluation = f"{p['evaluation_samples'] * length:,} tokens"
    older = sorted({row["code_sha256"][:16] for row in content["rows"] if "code_sha256" in row})
    others = f", of some rows `{'`, `'.join(older)}`" if older else ""
    return "\n".join(
        [
            f"- Model: `{results.model}`, SHA-256 of its weights `{content['model_sha256'][:16]}…`.",
            f"- Calibration: {windows} windows of {length} tokens ({windows * length:,}), seeds "
            f"{', '.join(map(str, results.seeds))} of their choice (and of what baselines draw).",
            f"- Evaluation: {evaluation} of each text, the first of it; none took part in the fit.",
            f"- Versions: {versions}; code `{(content['code_sha256'] or 'not recorded')[:16]}`{others}. "
            f"Cells measured at a time: {content['processes']}, one thread each.",
            "- Text, SHA-256: "
            + "; ".join(f"`{name}` `{digest[:16]}…`" for name, digest in content["text_sha256"].items())
            + ".",
        ]
    )
