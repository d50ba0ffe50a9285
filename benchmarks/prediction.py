"""Predicted against measured: err_h and KL of `plan --measured`, and what compression to the same budgets then gives.

    python benchmarks/prediction.py                              # pocket-moe, minutes on two cores
    python benchmarks/prediction.py --model M --calibration text.txt --evaluate a.txt b.txt
    python benchmarks/prediction.py --set heal.block_steps=200

err_h is measured on the held-out calibration windows of the run. KL is measured on other text: that of the same kind first.
Probes lie at budgets of 0.9, 0.7 and 0.5; between them is interpolation, beyond them extrapolation.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import molae_compress as molae

EXAMPLE = Path(__file__).parents[1] / "examples" / "pocket-moe"
KEEPS = (0.8, 0.7, 0.6, 0.5, 0.4)


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """CPU seconds of the prediction and of runs that start from it, and a row for every budget."""
    calibration = {"data": args.calibration, "samples": args.samples, "sequence_length": args.sequence_length}
    recipe = molae.Recipe.load({"molae": 1, "model": str(args.model), "calibration": calibration}, args.overrides)
    work, spent = folder / "work", {"text": 0.0, "observe": 0.0, "probe": 0.0}
    last = time.process_time()

    def watch(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.process_time()
        if done:
            spent[stage] += now - last
        last = now

    molae.plan(recipe, measured=True, work_dir=work, progress=watch)
    found: dict[str, Any] = {"seconds": spent, "rows": []}
    for keep in args.keep:
        asked = molae.Recipe.load(recipe, [f"budget.keep={keep}"])
        started = time.process_time()
        report = molae.run(asked, folder / f"keep-{keep}", work_dir=work)
        spent[f"run {keep} from there"] = time.process_time() - started
        kl = {data: kl_on(folder / f"keep-{keep}", data, args) for data in args.evaluate}
        found["rows"].append(
            {
                "keep": keep,
                "err_h": [report.prediction["err_h"], report.err_h],
                "layers": [[layer.err_h_predicted, layer.err_h] for layer in report.layers],
                "kl": {data: [report.prediction["kl"], value] for data, value in kl.items()},
            }
        )
    return found


def kl_on(result: Path, data: str, args: argparse.Namespace) -> float | None:
    """KL divergence of a compressed model from the original on one text."""
    sizes = {"samples": args.evaluation_samples, "sequence_length": args.sequence_length}
    return molae.evaluate(result, data=[data], against=str(args.model), **sizes).kl


def factor(pair: list[float]) -> float:
    """How far a prediction is off, whichever way."""
    return math.exp(abs(math.log(pair[0] / pair[1])))


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLE)
    parser.add_argument("--calibration", nargs="+", default=["python-docs:calibration"])
    parser.add_argument("--evaluate", nargs="+", default=["python-docs:heldout"])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--evaluation-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(args, Path(folder))
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{'keep':>5} {'':28} {'predicted':>10} {'measured':>10} {'ratio':>6}")
    for row in found["rows"]:
        for name, pair in (("err_h", row["err_h"]), *((f"KL {Path(data).name}", pair) for data, pair in row["kl"].items())):
            print(f"{row['keep']:>5} {name:28} {pair[0]:>10.3g} {pair[1]:>10.3g} {pair[0] / pair[1]:>6.2f}")
    for name, pairs in (
        ("err_h", [row["err_h"] for row in found["rows"]]),
        ("err_h of one layer", [pair for row in found["rows"] for pair in row["layers"]]),
        ("KL", [pair for row in found["rows"] for pair in row["kl"].values()]),
    ):
        print(f"largest factor of {name}: {max(map(factor, pairs)):.2f}")
    print(", ".join(f"{name}: {seconds:.1f} s of CPU" for name, seconds in found["seconds"].items()))


if __name__ == "__main__":
    main()
