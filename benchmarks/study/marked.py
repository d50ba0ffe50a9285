"""Tables that benchmarks write into the pages of the documentation, each between two marks."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def replaced(text: str, name: str, script: str, table: str) -> str:
    """A page with a table in the place of the one between its marks.

    Raises:
        ValueError: the page has not both marks.
    """
    begin, end = f"<!-- {name}: written by benchmarks/{script} -->\n", f"<!-- end of {name} -->\n"
    head, opened, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"The page has lost the marks of the table {name}.")
    return f"{head}{begin}\n{table}\n{end}{tail}"


def write_table(page: Path, name: str, script: str, table: str) -> None:
    """Replaces a table of a page."""
    page.write_text(replaced(page.read_text(encoding="utf-8"), name, script, table), encoding="utf-8")
