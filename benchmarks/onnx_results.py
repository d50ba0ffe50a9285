"""Writes the tables of the documentation from what `onnx_speed.py` and `onnx_models.py` measured, so that none is typed.

python benchmarks/onnx_results.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from study.marked import ROOT, replaced

RESULTS = ROOT / "benchmarks" / "results" / "onnx.json"
PACKAGES = ("onnxruntime-gpu", "onnxruntime", "onnxruntime-genai-cuda", "onnxruntime-genai", "torch", "transformers")
MODELS = {"dense": "the original", "quality": "compressed", "serving": "compressed, one basis a side"}
OTHERS = {"ort-moe": "`com.microsoft::MoE`", "torch": "`grouped_mm`", "dense": "dense experts"}


def decode_table(found: dict[str, Any]) -> str:
    """Markdown."""
    out = [
        f"| model | `--experts` | weights | ms a token | times as fast as the original, same form | … in its fastest form, "
        f"`{found['fastest']}` |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        ratios = ("", "") if row["model"] == "dense" else (f"{row['to_same_form']:.2f}", f"{row['to_fastest']:.2f}")
        out.append(
            f"| {MODELS[row['model']]} | `{row['experts']}` | {row['weights'] / 1e6:.0f} MB | {row['token_ms']:.1f} | "
            f"{ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(out) + "\n"


def export_table(found: dict[str, Any]) -> str:
    """Markdown."""
    out = [
        "| layers | weights | most memory, beyond Python and libraries | graph | nodes | processor time | of it tracing |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        seconds, sizes = row["seconds"], [f"{row[name] / 1e6:.0f} MB" for name in ("weights", "peak")]
        out.append(
            f"| {row['layers']} | {sizes[0]} | {sizes[1]} | {row['graph'] / 1e3:.0f} kB | "
            f"{row['nodes']:,} | {sum(seconds.values()):.0f} s | {seconds['trace']:.0f} s |"
        )
    return "\n".join(out) + "\n"


def operators_table(found: dict[str, Any]) -> str:
    """Markdown: one row for each case, and what is compared with it in columns."""
    rows = found["rows"]
    cases = list(dict.fromkeys((row["form"], row["dtype"], row["tokens"], row["threads"]) for row in rows))
    out = [f"| form | type | tokens | threads | ms | {' | '.join(OTHERS.values())} |", "|---|---|" + "--:|" * 6]
    for case in cases:
        own = [row for row in rows if (row["form"], row["dtype"], row["tokens"], row["threads"]) == case]
        ratios = {row["other"]: f"{row['ratio']:.2f}" for row in own}
        cells = [*case, f"{own[0]['molae_ms']:.2f}", *(ratios.get(other, "") for other in OTHERS)]
        out.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(out) + "\n"


Table = tuple[str, str, Callable[[Any], str]]
TABLES: dict[str, Table] = {
    "decode": ("onnx.md", "onnx_models.py", decode_table),
    "export": ("onnx.md", "onnx_models.py", export_table),
    "operators": ("onnx-operators.md", "onnx_speed.py", operators_table),
}


def table(part: str, results: dict[str, Any]) -> str:
    return TABLES[part][2](results[part])


def pages(results: dict[str, Any]) -> dict[Path, str]:
    """The pages, with each table between its two marks replaced."""
    found: dict[Path, str] = {}
    for part, (name, script, _) in TABLES.items():
        path = ROOT / "docs" / name
        text = found.get(path) or path.read_text(encoding="utf-8")
        found[path] = replaced(text, part, script, table(part, results)) if part in results else text
    return found


def load(path: Path = RESULTS) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def store(part: str, content: Any, path: Path) -> None:
    """Keeps the other parts; the results of the repository are also shown in its pages."""
    results = {**load(path), part: {"versions": installed(), **content}}
    path.write_text(
        json.dumps({name: results[name] for name in TABLES if name in results}, indent=1) + "\n", encoding="utf-8"
    )
    if path.resolve() == RESULTS.resolve():
        main()


def installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    for path, text in pages(load()).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
