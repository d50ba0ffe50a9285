"""What compression costs in quality: this package, the paper's procedure and other published methods, at equal parameters.

    python benchmarks/quality.py                       # the example model, within 75 minutes on two cores
    python benchmarks/quality.py --keep 0.5 --methods paper,quality --tables main
    python benchmarks/quality.py --data TEXTS --model MODEL   # the studies on text and a model of your own as well

One protocol. Every method starts from the same model in float32 and may store the same share of its routed-expert
parameters (every number counts: bases, cores, column indices, biases), rounded to the type of the checkpoint as an
artifact would be. A run that was cut off goes on where it stopped: cells that are in the results are not measured again.
Results of another version of the code, the libraries or the text are refused, unless `--fresh` measures everything anew;
`--package` keeps the rows of baselines, and of methods that `--methods` leaves out, with the version of the code that they
were measured with.
Which methods there are is in `study/methods.py`, which cells in `study/cells.py`; `plot.py` and `page.py` show the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from study.cells import (
    RESULTS,
    STUDIES,
    Cell,
    Protocol,
    Study,
    cells,
    differences,
    file_of,
    identity,
    known_rows,
    load,
    save,
    still_good,
)
from study.measure import Bench, model_folder, text_fingerprints
from study.methods import METHODS

TABLES = ("main", "parts", "robust", "trained")
HEAD = f"{'keep':>5}  {'method':58} {'from':14} {'seed':>4} {'KL x 1000, by text':>26} {'err_h':>8} {'kept':>7} {'fit s':>7}"
_opened: list[Bench] = []  # of a measuring process


def _open(study: str, protocol: Protocol, model: Path | None, data: Path | None) -> None:
    torch.set_num_threads(1)
    _opened[:] = [Bench(STUDIES[study], protocol, model, data)]


def _measure(cell: Cell) -> dict[str, Any]:
    return _opened[0].row(cell)


@contextmanager
def rows(
    study: Study, protocol: Protocol, wanted: list[Cell], processes: int, model: Path | None, data: Path | None
) -> Iterator[Iterator[dict[str, Any]]]:
    """The rows of cells as they come, measured in processes of one thread each."""
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_open, initargs=(study.name, protocol, model, data)
    )
    with pool:
        futures = [pool.submit(_measure, cell) for cell in wanted]
        try:
            yield (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def measure(study: Study, protocol: Protocol, args: argparse.Namespace) -> None:
    """Measures what is missing of a study, or everything, and keeps every row as soon as it is there."""
    path = file_of(study, args.results)
    head = identity(study, protocol, model_folder(study, args.model), text_fingerprints(study, args.data))
    head["processes"] = args.processes
    old = None if args.fresh else load(path)
    changed = [] if old is None else [name for name in differences(old, head) if name != "processes"]
    if changed and not (args.package and changed == ["code_sha256"]):
        sys.exit(
            f"{path.name} was measured with other {', '.join(changed)}. Measure everything anew with --fresh (make "
            "bench-quality FRESH=1), or measure elsewhere with --results. Where only code of the package has changed that "
            "no baseline uses, --package measures its rows anew and keeps those of the baselines."
        )
    known = known_rows(old) if old is not None else {}
    if changed:
        known = still_good(known, old["code_sha256"], args.methods)
    wanted = [cell for cell in cells(study, protocol) if cell not in known and cell.method in args.methods]
    print(f"{study.name}: {len(known)} cells are known, {len(wanted)} to be measured\n{HEAD}", flush=True)
    if wanted:
        with rows(study, protocol, wanted, args.processes, args.model, args.data) as found:
            for row in found:
                known[Cell.from_row(row)] = row
                save(path, head, known.values())
                print(line(row), flush=True)
    print(f"{path.name} is complete")


def line(row: dict[str, Any]) -> str:
    """One row for people, under `HEAD`."""
    title = METHODS[row["method"]].title + (f", {row['steps']} steps" if row["steps"] else "")
    head = f"{row['keep']:>5}  {title:58.58} {row['calibration'] or '-':14} {row['seed']:>4}"
    if "impossible" in row:
        return f"{head} impossible: {row['impossible']}"
    kl = " ".join(f"{1000 * text['kl']:8.2f}" for text in row["texts"].values())
    return f"{head} {kl:>26} {sum(row['layers']):>8.4f} {row['share']:>7.4f} {row['fit_seconds']:>7.1f}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Protocol()
    parser.add_argument("--data", type=Path, help="folder of texts (calibration/*.txt, eval/*.txt) for further studies")
    parser.add_argument("--model", type=Path, help="folder of the model of the study `development`, with --data")
    parser.add_argument("--studies", help=f"some of {','.join(STUDIES)}; by default all whose text and model are there")
    parser.add_argument("--tables", default=",".join(TABLES), help=f"some of {','.join(TABLES)}")
    parser.add_argument("--methods", default=None, help="some of the methods, apart by commas; by default all")
    parser.add_argument("--keep", nargs="+", dest="keeps", type=float, default=default.keeps)
    parser.add_argument("--seeds", nargs="+", type=int, default=default.seeds)
    parser.add_argument("--steps", type=int, default=default.steps, help="gradient steps of the baselines that take any")
    parser.add_argument("--samples", type=int, default=default.samples, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=default.sequence_length)
    parser.add_argument("--evaluation-samples", type=int, default=default.evaluation_samples, help="windows of each text")
    parser.add_argument("--trained-share", type=float, default=1.0, help="of the papers' gradient steps, for a trial")
    parser.add_argument("--processes", type=int, default=2, help="cells measured at a time, with a thread each")
    parser.add_argument("--fresh", action="store_true", help="measure all cells, those in the results too")
    parser.add_argument("--package", action="store_true", help="keep the rows of baselines measured with other code")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    args = parser.parse_args()
    args.methods = args.methods.split(",") if args.methods else list(METHODS)
    there = [name for name, study in STUDIES.items() if (args.data or not study.needs_data) and (args.model or study.model)]
    args.studies = args.studies.split(",") if args.studies else there
    args.tables = args.tables.split(",")
    choices = (("methods", args.methods, METHODS), ("studies", args.studies, there), ("tables", args.tables, TABLES))
    for option, given, allowed in choices:
        if unknown := set(given) - set(allowed):
            parser.error(f"--{option}: there is no {', '.join(sorted(unknown))}, or what it needs is not given")
    return args


def main() -> None:
    args = parsed()
    protocol = Protocol(**{field.name: getattr(args, field.name) for field in fields(Protocol)})
    for name in args.studies:
        study = STUDIES[name]
        measure(replace(study, tables=tuple(table for table in study.tables if table in args.tables)), protocol, args)


if __name__ == "__main__":
    main()
