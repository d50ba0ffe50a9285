"""Text for the quality benchmark beside the package's own sources: what the libraries it needs carry, and a folder of files.

`licences` is legal prose: the licence texts that torch and numpy are shipped with. `graph-theory:calibration` and
`graph-theory:heldout` are the prose of the docstrings of networkx, which torch needs; every fifth module is held out.
Both are read from the installed files without importing them, and change with the versions of these libraries: results
record the hash.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from molae_compress.calibration.text import read_texts

LICENCES, GRAPHS = "licences", ("graph-theory:calibration", "graph-theory:heldout")
SHORTEST = 200  # characters of a paragraph that counts as prose
_NO_PROSE = re.compile(r">>>|::|[=\[\]_{}|\\]{2}")


def read(source: str, folder: Path | None = None) -> list[str]:
    """The documents of one source.

    Args:
        source: one of the two above, a file of `folder`, or whatever a recipe allows.
        folder: where sources that end in `.txt` lie.
    """
    if source == LICENCES:
        return _distinct(text for name in ("torch", "numpy") for text in _licences(name))
    if source in GRAPHS:
        files = _files("networkx", r"(?!.*\btests?/).*\.py$")
        return _distinct(_docstrings(path) for i, path in enumerate(files) if (i % 5 == 0) == (source == GRAPHS[1]))
    if source.endswith(".txt"):
        assert folder is not None, f"'{source}' is a file of the folder of --data"
        source = str(folder / source)
    return read_texts([source], "text")[0]


def _files(distribution: str, pattern: str) -> list[Path]:
    found = metadata.distribution(distribution)
    names = sorted(file.as_posix() for file in found.files or () if re.match(pattern, file.as_posix()))
    return [Path(str(found.locate_file(name))) for name in names]


def _licences(distribution: str) -> list[str]:
    files = _files(distribution, r"[^/]+\.dist-info/.*(?i:licen|notice|copying)")
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def _docstrings(path: Path) -> str:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
    return "\n\n".join(found)


def _distinct(texts: Iterable[str]) -> list[str]:
    """Each text with its paragraphs of prose on a line each, those left out that stood in an earlier place."""
    seen: set[str] = set()
    documents = []
    for text in texts:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            if len(line) >= SHORTEST and not _NO_PROSE.search(line) and line.lower() not in seen:
                seen.add(line.lower())
                kept.append(line)
        documents.append("\n".join(kept))
    return [document for document in documents if document]
