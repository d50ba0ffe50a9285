"""Results of a study as they are shown: rows over calibration seeds, their means and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cells import RESULTS, STUDIES, Cell, Study, file_of, load

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """A file of results with the study that it is of."""

    study: Study
    content: dict[str, Any]

    @classmethod
    def load(cls, name: str, folder: Path = RESULTS) -> Results | None:
        """Those of a study; None if it was never measured."""
        study = STUDIES[name]
        content = load(file_of(study, folder))
        return cls(study, content) if content is not None else None

    @property
    def keeps(self) -> list[float]:
        """From large to small."""
        return sorted({row["keep"] for row in self.content["rows"]}, reverse=True)

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.content["rows"]})

    @property
    def protocol(self) -> dict[str, Any]:
        found: dict[str, Any] = self.content["protocol"]
        return found

    @property
    def model(self) -> str:
        """The name of its folder."""
        return Path(self.content["model"]).name

    @property
    def texts(self) -> list[str]:
        """What was evaluated on."""
        first: Row = next(row for row in self.content["rows"] if "texts" in row)
        return list(first["texts"])

    @property
    def home(self) -> list[str]:
        """The texts of the kind that was calibrated on."""
        return [name for name in self.texts if name in self.study.home]

    def of(self, method: str, keep: float, way: tuple[str, int] | None = None, steps: int | None = None) -> list[Row]:
        """Rows of one cell but for its seed, those left out that were impossible.

        Args:
            method: its name.
            keep: share of the parameters.
            way: calibration and number of its windows; by default those of the main table.
            steps: by default those of the main table.
        """
        name, samples = way or (next(iter(self.study.calibrations)), self.protocol["samples"])
        steps = self.protocol["steps"] if steps is None else steps
        found = [row for row in self.content["rows"] if row["method"] == method and row["keep"] == keep and "texts" in row]
        return [row for row in found if Cell.from_row(row) == Cell.of(method, keep, row["seed"], name, samples, steps)]

    def values(self, rows: Iterable[Row], key: str, texts: Sequence[str] | None = None) -> list[float]:
        """A figure of each row: its own, or the mean over texts (by default `home`)."""
        return [
            row[key] if key in row else statistics.fmean(row["texts"][name][key] for name in texts or self.home)
            for row in rows
        ]

    def mean(self, rows: Sequence[Row], key: str, texts: Sequence[str] | None = None) -> float | None:
        """Over the seeds; None without rows."""
        return statistics.fmean(self.values(rows, key, texts)) if rows else None


def shown(values: Sequence[float], factor: float = 1.0, digits: int = 3, none: str = "") -> str:
    """Mean to some significant digits and, of several values, the standard deviation to as many decimals."""
    if not values:
        return none
    values = [factor * value for value in values]
    text = significant(statistics.fmean(values), digits)
    if len(values) == 1:
        return text
    decimals = len(text.partition(".")[2])
    return f"{text} ± {statistics.stdev(values):.{decimals}f}"


def significant(value: float, digits: int = 3) -> str:
    """A number with some significant digits, without an exponent."""
    if value == 0:
        return "0"
    # The exponent after rounding: 9.996 has as many digits before the point as 10.0.
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Markdown; all columns but the first `words` are aligned to the right."""
    lines = [f"| {' | '.join(head)} |", "|" + words * "---|" + (len(head) - words) * "--:|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
