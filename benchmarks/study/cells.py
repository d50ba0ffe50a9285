"""What is measured: the cells of all tables of a study, and the file that keeps their results.

A file holds results of one version of the code, the libraries, the model and the text (its `identity`), so that a run that
was cut off goes on and figures of different versions never stand side by side.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .methods import ABLATION_KEEPS, ABLATIONS, FEW, MAIN, METHODS, ROBUST, TRAINED, TRAINED_KEEP, changed

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
KEEPS, SEEDS = (0.75, 0.6, 0.5), (0, 1, 2)
DOCS = ("python-docs:calibration", "python-docs:heldout")
GRAPHS = ("graph-theory:calibration", "graph-theory:heldout")
_ASIDE = ("cli", "export", "kernels", "report")  # of the package, what no figure follows from
EVAL = ("eval/wikitext2-valid.txt", "eval/textbooks.txt", "eval/novel.txt")


@dataclass(frozen=True)
class Study:
    """A model with its texts.

    Attributes:
        name: of its results, `quality-NAME.json`.
        model: folder; empty if `--model` names it.
        calibrations: mixtures of sources by name; the first is the one of all tables that say nothing else.
        texts: evaluated on.
        home: those of the kind that the first mixture is of; their mean is the figure of most tables.
        tables: `main`, `parts`, `robust`, `trained`.
        needs_data: a folder of texts that is no part of the repository.
    """

    name: str
    model: str
    calibrations: Mapping[str, tuple[str, ...]]
    texts: tuple[str, ...]
    home: tuple[str, ...]
    tables: tuple[str, ...]
    needs_data: bool = False


STUDIES = {
    study.name: study
    for study in (
        Study(
            "pocket-moe",
            "examples/pocket-moe",
            {"help": DOCS[:1], "graph theory": GRAPHS[:1], "both": (DOCS[0], GRAPHS[0])},
            (DOCS[1], GRAPHS[1], "licences"),
            DOCS[1:],
            ("main", "parts", "robust", "trained"),
        ),
        Study(
            "pocket-moe-novels",
            "examples/pocket-moe",
            {"help": DOCS[:1], "both": (DOCS[0], "calibration/novels.txt")},
            (DOCS[1], "eval/novel.txt"),
            DOCS[1:],
            ("robust",),
            needs_data=True,
        ),
        Study(
            "development",
            "",
            {"mixed": ("calibration/mixed.txt",), "astronomy": ("calibration/astronomy.txt",)},
            EVAL,
            EVAL,
            ("main", "parts", "robust"),
            needs_data=True,
        ),
    )
}


@dataclass(frozen=True)
class Protocol:
    """How all cells are measured; `keeps` and `seeds` only say which there are, and `trained_share` shortens a trial."""

    keeps: tuple[float, ...] = KEEPS
    seeds: tuple[int, ...] = SEEDS
    samples: int = 256
    steps: int = 600
    sequence_length: int = 256
    evaluation_samples: int = 64
    trained_share: float = 1.0


@dataclass(frozen=True)
class Cell:
    """One fit and its evaluation. What a method does not read is empty or 0, so that it is measured once."""

    method: str
    recipes: tuple[str, ...]
    keep: float
    seed: int
    calibration: str
    samples: int
    steps: int

    @classmethod
    def of(cls, method: str, keep: float, seed: int, calibration: str, samples: int, steps: int) -> Cell:
        known = METHODS[method]
        return cls(
            method,
            known.recipes,
            keep,
            seed if known.reads_text or known.draws else 0,
            calibration if known.reads_text else "",
            samples if known.reads_text else 0,
            steps if known.steps else 0,
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Cell:
        return cls(**{**{name: row[name] for name in cls.__dataclass_fields__}, "recipes": tuple(row["recipes"])})


def cells(study: Study, protocol: Protocol) -> list[Cell]:
    """All cells of a study's tables, each once; the long ones first, so that none is left alone at the end."""
    home, p = next(iter(study.calibrations)), protocol
    found: list[Cell] = []
    if "trained" in study.tables and TRAINED_KEEP in p.keeps:
        for method, steps in TRAINED.items():
            found.append(Cell.of(method, TRAINED_KEEP, p.seeds[0], home, p.samples, round(p.trained_share * steps)))
    if "main" in study.tables:
        found += [Cell.of(m, keep, seed, home, p.samples, p.steps) for m in MAIN for keep in p.keeps for seed in p.seeds]
    if "parts" in study.tables:
        keeps = [keep for keep in ABLATION_KEEPS if keep in p.keeps]
        found += [Cell.of(changed(m), keep, p.seeds[0], home, p.samples, p.steps) for m in ABLATIONS for keep in keeps]
    if "robust" in study.tables:
        ways = [(name, p.samples) for name in study.calibrations] + [(home, max(2, p.samples // FEW))]
        found += [Cell.of(m, keep, p.seeds[0], *way, p.steps) for m in ROBUST for keep in p.keeps for way in ways]
    return list(dict.fromkeys(found))


def file_of(study: Study, folder: Path = RESULTS) -> Path:
    return folder / f"quality-{study.name}.json"


def load(path: Path) -> dict[str, Any] | None:
    """What a file of results holds; None if there is none."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def save(path: Path, content: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of results, one row a line, in the order of their cells."""
    order = {method: i for i, method in enumerate(METHODS)}
    sorted_rows = sorted(
        rows,
        key=lambda row: (-row["keep"], order[row["method"]], row["calibration"], row["samples"], row["steps"], row["seed"]),
    )
    head = json.dumps({**content, "rows": []}, indent=2).removesuffix("[]\n}")
    lines = ",\n".join("    " + json.dumps(row) for row in sorted_rows)
    text = f"{head}[\n{lines}\n  ]\n}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def known_rows(content: Mapping[str, Any]) -> dict[Cell, dict[str, Any]]:
    """Rows by cell, those of methods left out that are gone or now have another recipe."""
    rows = {Cell.from_row(row): row for row in content["rows"]}
    return {
        cell: row for cell, row in rows.items() if cell.method in METHODS and METHODS[cell.method].recipes == cell.recipes
    }


def still_good(rows: Mapping[Cell, dict[str, Any]], code: str, anew: Collection[str]) -> dict[Cell, dict[str, Any]]:
    """Rows of all but the package's methods `anew`, each with the version of the code that it was measured with."""
    kept = (cell for cell in rows if not cell.recipes or cell.method not in anew)
    return {cell: {"code_sha256": code, **rows[cell]} for cell in kept}


def identity(study: Study, protocol: Protocol, model: Path, text_sha256: Mapping[str, str]) -> dict[str, Any]:
    """What results must have in common to stand in one file."""
    weights = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in sorted(model.glob("*.safetensors"))))
    names = ("torch", "transformers", "numpy")
    measured = {key: value for key, value in asdict(protocol).items() if key not in ("keeps", "seeds")}
    return {
        "model": study.model or model.name,
        "model_sha256": weights.hexdigest(),
        "protocol": measured,
        "text_sha256": dict(text_sha256),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in names}},
        "code_sha256": code_fingerprint(),
    }


def code_fingerprint() -> str:
    """SHA-256 of the code that figures follow from, comments and docstrings left out."""
    package, benchmarks = ROOT / "molae_compress", ROOT / "benchmarks"
    measuring = [benchmarks / "study" / f"{name}.py" for name in ("measure", "texts")]
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in _ASIDE]
    digest = hashlib.sha256()
    for path in sorted([*files, *(benchmarks / "baselines").glob("*.py"), *measuring]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> Sequence[str]:
    """Names of the entries of an identity that are not the same."""
    found: list[str] = []
    for key in new:
        name = f"{place}{key}"
        if isinstance(new[key], Mapping) and isinstance(old.get(key), Mapping):
            found += differences(old[key], new[key], f"{name}.")
        elif old.get(key) != new[key]:
            found.append(name)
    return found
