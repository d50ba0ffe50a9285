"""What compression costs in quality: this package, the paper's procedure and other published methods, at equal parameters.

    python benchmarks/quality.py                                   # the example model, a quarter of an hour on two cores
    python benchmarks/quality.py --keep 0.5 --methods paper,quality
    python benchmarks/quality.py --model FOLDER --calibration a.txt --evaluate b.txt c.txt

One run, one protocol. Every method starts from the same model in float32 and may store the same share of its routed-expert
parameters (every number counts: bases, cores, column indices, biases), rounded to the type of the checkpoint as an
artifact would be. KL, perplexity and agreement are those of whole models on text that took no part in the fit; err_h is
measured layer by layer on the same text, at the original's own hidden states. The paper's form is tried with several group
sizes and the one of the lowest KL on the evaluation text itself is taken, so that the baseline is as strong as its form
allows. Other methods are those of `baselines`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import molae_compress as molae
from baselines import BASELINES, Setting
from molae_compress.adapters import find_experts, layers_with_experts
from molae_compress.calibration.text import data_fingerprint, read_texts, token_windows

RESULTS = Path(__file__).parent / "results"
PAPER_GROUPS = (1, 2, 4, 8)
METHODS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "paper": (
        "paper's procedure (data-free, gate and up only)",
        [
            {"method": "paper", "basis": {"experts_per_input_group": size}, "budget": {"align": 1}, "calibration": None}
            for size in PAPER_GROUPS
        ],
    ),
    "quality": ("ours, `quality` (the default)", [{}]),
    "one bank": ("ours, one rank per layer and side", [{"budget": {"banks": 1}}]),
    "pairs": ("ours, input bases shared by two experts", [{"basis": {"experts_per_input_group": 2}}]),
    "serving": ("ours, `serving` (layer form)", [{"basis": {"profile": "serving"}}]),
    "data-free": ("ours, data-free", [{"calibration": None}]),
    "uniform": ("ours, uniform ranks", [{"budget": {"allocate": "uniform", "align": 1}}]),
}
TITLES = {name: title for name, (title, _) in (METHODS | BASELINES).items()}
HEAD = f"{'keep':>5}  {'method':58} {'KL x 1000':>10} {'perplexity':>11} {'top-1':>7} {'err_h':>8} {'kept':>7} {'fit s':>6}"


class Study:
    """One model, its calibration windows and its evaluation windows; every cell of the table starts from it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtype = str(AutoConfig.from_pretrained(args.model).dtype or torch.bfloat16).removeprefix("torch.")
        self.original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        length = args.sequence_length
        calibration, evaluation = read_texts(args.calibration, "text"), read_texts(args.evaluate, "text")
        self.fitted_NL = token_windows(calibration, tokenizer, samples=args.samples, sequence_length=length, seed=0)
        self.held_out = {
            source: token_windows([texts], tokenizer, samples=args.evaluation_samples, sequence_length=length, seed=None)
            for source, texts in zip(args.evaluate, evaluation, strict=True)
        }
        self.names = [spec.name for spec in find_experts(self.original)]
        self.dense_parameters = sum(spec.dense_numel for spec in find_experts(self.original))
        self.text = {"calibration": data_fingerprint(calibration), "evaluation": data_fingerprint(evaluation)}

    def recipe(self, keep: float, changes: dict[str, Any]) -> molae.Recipe:
        """The default recipe at a budget, with a method's changes."""
        calibration = {"samples": self.args.samples, "sequence_length": self.args.sequence_length}
        recipe = {"molae": 1, "calibration": calibration, "output": {"dtype": self.dtype}} | changes
        return molae.Recipe.load({**recipe, "budget": {"keep": keep, **changes.get("budget", {})}})

    def cell(self, method: str, keep: float) -> dict[str, Any]:
        """The best variant of a method at a budget, or why there is none."""
        found: list[dict[str, Any]] = []
        reason = ""
        for changes in METHODS[method][1] if method in METHODS else [None]:
            try:
                found.append(self._baseline(method, keep) if changes is None else self._ours(self.recipe(keep, changes)))
            except molae.MolaeError as error:
                reason = str(error)
        best = min(found, key=lambda row: row["kl"]) if found else {"impossible": reason}
        return {"method": method, "keep": keep, **best}

    def _ours(self, recipe: molae.Recipe) -> dict[str, Any]:
        model = copy.deepcopy(self.original)
        report = molae.compress_(model, recipe, data=self.fitted_NL if recipe.calibration is not None else None)
        group = next((layer.shape.get("input_group") for layer in report.layers if layer.shape is not None), None)
        return {"input_group": group, **self._measured(model, report.plan["parameters"], report.timings["total"])}

    def _baseline(self, method: str, keep: float) -> dict[str, Any]:
        model = copy.deepcopy(self.original)
        setting = Setting(keep, getattr(torch, self.dtype), steps=self.args.steps)
        started = time.perf_counter()
        stored = BASELINES[method][1](model, self.fitted_NL, setting)
        return self._measured(model, stored, time.perf_counter() - started)

    def _measured(self, model: PreTrainedModel, parameters: int, seconds: float) -> dict[str, Any]:
        return {
            **compare(self.original, model, self.held_out, self.names, self.args.batch_size),
            "parameters": parameters,
            "share": parameters / self.dense_parameters,
            "fit_seconds": round(seconds, 1),
        }


def compare(
    original: PreTrainedModel, model: PreTrainedModel, held_out: Mapping[str, Tensor], names: list[str], batch_size: int
) -> dict[str, Any]:
    """Whole models against each other on the windows [N,L] of all sources, and err_h of the experts modules `names`."""
    sums, tokens = {source: torch.zeros(4, dtype=torch.float64) for source in held_out}, dict.fromkeys(held_out, 0)
    with torch.no_grad(), _error_of_experts(original, model, names) as errors:
        for source, windows_NL in held_out.items():
            tokens[source] = windows_NL.numel() - len(windows_NL)
            for ids_BL in windows_NL.split(batch_size):
                exact = original(input_ids=ids_BL).logits[:, :-1].log_softmax(-1)
                found = model(input_ids=ids_BL).logits[:, :-1].log_softmax(-1)
                next_BL1 = ids_BL[:, 1:, None]
                kl = (exact.exp() * (exact - found)).sum(-1)
                nll, exact_nll = -found.gather(-1, next_BL1), -exact.gather(-1, next_BL1)
                same = found.argmax(-1) == exact.argmax(-1)
                sums[source] += torch.stack([part.double().sum() for part in (kl, nll, exact_nll, same)])
    kl, nll, exact_nll, same = (sum(sums.values(), torch.zeros(4)) / sum(tokens.values())).tolist()
    return {
        "kl": kl,
        "kl_by_source": {source: float(sums[source][0]) / tokens[source] for source in held_out},
        "perplexity": math.exp(nll),
        "original_perplexity": math.exp(exact_nll),
        "top1_agreement": same,
        "err_h": sum(errors) / sum(windows_NL.numel() for windows_NL in held_out.values()),
    }


@contextmanager
def _error_of_experts(original: PreTrainedModel, model: PreTrainedModel, names: list[str]) -> Iterator[list[float]]:
    """While open, every forward of the original appends |dy|^2 / |h|^2, summed over its tokens, for each module.

    The block around the experts, router included, gets the very arguments the original one got; h is the residual
    stream after the layer.
    """
    layers = layers_with_experts(original)
    errors: list[float] = []
    changes: dict[str, Tensor] = {}

    def block_done(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        changes[name] = (_tokens(model.get_submodule(name)(*args, **kwargs)) - _tokens(out)).double().square().sum(1)

    def layer_done(name: str, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        errors.append(float((changes.pop(name) / _tokens(out).double().square().sum(1)).sum()))

    hooks = []
    for name in names:
        block = name.rpartition(".")[0]
        layer = original.get_submodule(layers.paths[layers.of(name)])
        hooks.append(original.get_submodule(block).register_forward_hook(partial(block_done, block), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(layer_done, block)))
    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()


def _tokens(out: Any) -> Tensor:
    """[T,H]: the hidden states among what a module returns."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden.flatten(0, -2)


def line(row: dict[str, Any]) -> str:
    """One row of the table for people, under `HEAD`."""
    title = TITLES[row["method"]]
    if "impossible" in row:
        return f"{row['keep']:>5}  {title:58} impossible: {row['impossible']}"
    title += f", groups of {row['input_group']}" if row["method"] == "paper" else ""
    several = [f"{1000 * kl:.2f}" for kl in row["kl_by_source"].values()] if len(row["kl_by_source"]) > 1 else []
    return (
        f"{row['keep']:>5}  {title:58} {1000 * row['kl']:>10.2f} {row['perplexity']:>11.2f} "
        f"{row['top1_agreement']:>7.1%} {row['err_h']:>8.4f} {row['share']:>7.4f} {row['fit_seconds']:>6.1f}"
        f"{'  KL by source: ' if several else ''}{', '.join(several)}"
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/pocket-moe", help="folder or hub id")
    parser.add_argument("--calibration", nargs="+", default=["python-docs:calibration"], help="sources, as in a recipe")
    parser.add_argument("--evaluate", nargs="+", default=["python-docs:heldout"], help="sources, as in a recipe")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.75, 0.6, 0.5])
    parser.add_argument("--methods", default=",".join(TITLES), help=f"some of {','.join(TITLES)}")
    parser.add_argument("--steps", type=int, default=600, help="gradient steps of the baselines that take any")
    parser.add_argument("--samples", type=int, default=256, help="calibration windows")
    parser.add_argument("--evaluation-samples", type=int, default=64, help="evaluation windows of each source")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON file; by default results/quality-MODEL.json beside this script")
    args = parser.parse_args()
    unknown = set(args.methods.split(",")) - TITLES.keys()
    if unknown:
        parser.error(f"--methods: there is no {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = parsed()
    study = Study(args)
    print(HEAD)
    rows: list[dict[str, Any]] = []
    for keep in args.keep:
        for method in args.methods.split(","):
            rows.append(study.cell(method, keep))
            print(line(rows[-1]), flush=True)
    protocol = {key: getattr(args, key) for key in ("samples", "evaluation_samples", "sequence_length", "steps")}
    sources = {"calibration": args.calibration, "evaluate": args.evaluate}
    content = {
        "model": args.model,
        "protocol": {**sources, **protocol, "stored_as": study.dtype, "text_sha256": study.text},
        "versions": {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0]},
        "rows": rows,
    }
    output = args.output or RESULTS / f"quality-{Path(args.model).name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
