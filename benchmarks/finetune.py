"""What fine-tuning gives back of what compression took, what it costs, and the memory that it needs.

    python benchmarks/finetune.py                               # the example model
    python benchmarks/finetune.py --data TEXTS --model MODEL    # text and a model of your own, as for quality.py
    python benchmarks/finetune.py --rows router latent --no-memory --results trial
    python benchmarks/finetune.py --page                        # writes the page from the results there are

The model is compressed to half of the parameters of its experts, and each way of training goes on from there, towards the
original's predictions unless its row says otherwise. Perplexity and KL divergence are measured on text that neither
compression nor training has seen. The share recovered is that of the gap in perplexity between the compressed model and
the original, and that of the KL divergence. Seconds are those of the clock, the original's predictions included and the
evaluation not: run it on a machine that does nothing else.

Peak memory is that of a process of its own, which trains latent tensors of a larger model of random weights, less what it
takes before it loads the model. Accounted for are the model's parameters, the trained ones and their gradients, two moments
of each and what the forward pass keeps for the backward pass. Goal: at most 1.3 times that.

Results are in `results/finetune-STUDY.json`; `docs/finetuning.md` shows those there are.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import molae_compress as molae
from memory import EXAMPLE, resident, write_checkpoint
from molae_compress.report import installed_versions
from molae_compress.tuning import ways
from study.cells import EVAL, STUDIES
from study.marked import ROOT, write_table
from study.texts import read

RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs" / "finetuning.md"
GOAL = 1.3
MODELS = {"pocket-moe": "The example model", "development": "A second model, on other text"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "router": ("routers", {"router": True}),
    "adapters": ("adapters of rank 16 on bases and cores", {"adapters": 16}),
    "latent": ("all latent tensors", {"latent": "all"}),
    "text": ("all latent tensors, on the text itself", {"latent": "all", "kl_weight": 0.0, "language_weight": 1.0}),
}


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The compressed model, and a row for every way of training it."""
    train = [as_file(name, folder, args.data) for name in args.train]
    texts = {name: as_file(name, folder, args.data) for name in args.evaluate}
    calibration = {"data": train, "samples": args.calibration_samples, "sequence_length": args.sequence_length}
    model, half = str(args.model), folder / "half"
    report = molae.run({"molae": 1, "model": model, "calibration": calibration, "budget": {"keep": args.keep}}, half)
    before = figures(half, texts, args)
    rows = []
    for name in args.rows:
        sizes = {"samples": args.samples, "sequence_length": args.sequence_length, "batch_size": args.batch_size}
        settings = {"data": train, **sizes, "epochs": args.epochs, **ROWS[name][1]}
        started = time.perf_counter()
        entry = molae.finetune(half, {"molae": 1, "finetune": settings}, folder / name).finetuned[-1]
        row = {"way": name, "seconds": round(time.perf_counter() - started, 1)}
        row |= {key: entry[key] for key in ("tokens", "steps", "trained_parameters", "loss_before", "loss_after")}
        assert math.isfinite(row["loss_after"])
        row["texts"] = figures(folder / name, texts, args)
        for text, after in row["texts"].items():
            gap = before[text]["perplexity"] - before[text]["original_perplexity"]
            after["recovered"] = (before[text]["perplexity"] - after["perplexity"]) / gap
            after["kl_recovered"] = 1 - after["kl"] / before[text]["kl"]
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return {"parameters": report.plan["dense_parameters"], "before": before, "rows": rows}


def as_file(name: str, folder: Path, data: Path | None) -> str:
    """A source that the package reads: texts that only benchmarks know as a file."""
    if name.endswith(".txt"):
        return str(Path(data or "", name))
    if name.startswith("python-docs:"):
        return name
    path = folder / f"{name.replace(':', '-')}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in read(name)), encoding="utf-8")
    return str(path)


def figures(model: Path, texts: dict[str, str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of a model against the original, on every text that is evaluated on."""
    sizes = {"samples": args.evaluation_samples, "sequence_length": args.sequence_length}
    against = str(args.model)
    return {name: molae.evaluate(model, data=[text], against=against, **sizes).to_dict() for name, text in texts.items()}


def memory(layers: int) -> dict[str, Any]:
    """Peak memory of training latent tensors, in a process of its own, against what it accounts for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "dense", layers, 32, 512, 256)
        molae.run({"molae": 1, "model": str(folder / "dense"), "budget": {"keep": 0.5}}, folder / "half")
        command = [sys.executable, __file__, "--child", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(folder: Path) -> None:
    """Trains for a few steps, and writes what that took."""
    import transformers.trainer
    from transformers import TrainerCallback

    import molae_compress.tuning.training

    assert transformers.trainer  # imported before the count begins
    assert molae_compress.tuning.training
    started = resident()
    account: dict[str, float] = {}

    class Account(TrainerCallback):
        def on_train_end(self, arguments: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            account["peak"] = resident("VmHWM") - started  # first: what follows takes memory too
            parameters = list(model.parameters())
            trained = sum(p.numel() for p in parameters if p.requires_grad)
            account["parameters"] = sum(p.nbytes for p in parameters if not p.requires_grad)
            account["trained"], account["gradients"], account["moments"] = 4 * trained, 4 * trained, 8 * trained
            account["activations"] = activations(model, {p.untyped_storage().data_ptr() for p in parameters})

    settings = {
        "latent": "all",
        "data": "python-docs:calibration",
        "samples": 64,
        "sequence_length": 256,
        "batch_size": 4,
        "kl_weight": 0.0,
        "language_weight": 1.0,
        "trainer": {"max_steps": 4},
    }
    molae.finetune(folder / "half", {"molae": 1, "finetune": settings}, folder / "out", callbacks=[Account()])
    print(json.dumps(account | {"accounted": sum(value for key, value in account.items() if key != "peak")}))


def activations(model: Any, held: set[int]) -> float:
    """Bytes that a forward pass of a batch keeps for the backward pass, besides parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(0, 1000, (4, 256))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=ids, use_cache=False).logits
        return sum(kept.values()) + logits.nbytes


def section(studies: list[dict[str, Any]]) -> str:
    """The results as the page on fine-tuning shows them."""
    command = "`python benchmarks/finetune.py`"
    if not studies:
        return f"{command} measures it, and has not been run yet.\n"
    lines = [
        f"Of {command}: each model is compressed to half of the parameters of its experts, and trained from there. In "
        "brackets: how much of the gap to the original's perplexity, and of the KL divergence, the training gives back.",
    ]
    for found in studies:
        lines += ["", *table(found)]
    for found in studies:
        if held := found.get("memory"):
            ratio = held["peak"] / held["accounted"]
            lines += [
                "",
                f"Training the latent tensors of a random model took {ratio:.2f} times the memory that its parameters, the "
                "trained ones, their gradients and moments, and the activations kept for the backward pass account for "
                f"({held['peak'] / 1e6:,.0f} of {held['accounted'] / 1e6:,.0f} MB).",
            ]
    return "\n".join(lines) + "\n"


def table(found: dict[str, Any]) -> list[str]:
    """Lines of Markdown: one study."""
    asked, before = found["asked"], found["before"]
    train = ", ".join(f"`{name}`" for name in asked["train"])
    head = "".join(f" `{name}`: perplexity | KL × 1000 |" for name in before)
    original = "".join(f" {text['original_perplexity']:.2f} | |" for text in before.values())
    compressed = "".join(f" {text['perplexity']:.2f} | {1000 * text['kl']:.3g} |" for text in before.values())
    lines = [
        f"{MODELS[found['study']]} ({found['parameters']:,} parameters in routed experts), calibrated and trained on "
        f"{train}, {asked['batch_size']} windows of {asked['sequence_length']} tokens a step, each read {asked['epochs']} "
        f"times and counted as often, on {found['threads']} threads:",
        "",
        f"| trained | tokens | seconds | trained parameters |{head}",
        f"|---|--:|--:|--:|{'--:|--:|' * len(before)}",
        f"| (the original) | | | |{original}",
        f"| nothing | | | |{compressed}",
    ]
    for row in found["rows"]:
        cells = [ROWS[row["way"]][0], f"{row['tokens']:,}", f"{row['seconds']:.0f}", f"{row['trained_parameters']:,}"]
        for after in row["texts"].values():
            cells += [
                f"{after['perplexity']:.2f} ({share(after['recovered'])})",
                f"{1000 * after['kl']:.3g} ({share(after['kl_recovered'])})",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def share(value: float) -> str:
    """A share in percent, without a sign before nothing."""
    return f"{round(100 * value) + 0:d}%"


def studies_in(folder: Path) -> list[dict[str, Any]]:
    """What has been measured."""
    paths = [folder / f"finetune-{name}.json" for name in MODELS]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def write_page(folder: Path) -> None:
    """Shows what has been measured on the page on fine-tuning."""
    write_table(PAGE, "finetune", Path(__file__).name, section(studies_in(folder)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of texts (calibration/mixed.txt, eval/*.txt), with --model")
    parser.add_argument("--model", type=Path, help="folder of the model of the study `development`, with --data")
    parser.add_argument("--train", nargs="+", help="sources to calibrate and train on, or files of --data")
    parser.add_argument("--evaluate", nargs="+", help="the same, to evaluate on")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=480, help="windows to train on; one in sixteen only measures")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rates", type=float, default=1.0, help="times the learning rates of `auto`")
    parser.add_argument("--calibration-samples", type=int, default=256)
    parser.add_argument("--evaluation-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory, which --data leaves out too")
    parser.add_argument("--layers", type=int, default=4, help="of the model whose memory is measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the page from the results there are")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.data is None) != (args.model is None):
        parser.error("--data and --model go together")
    args.study = "pocket-moe" if args.model is None else "development"
    args.train = args.train or list(next(iter(STUDIES[args.study].calibrations.values())))
    args.evaluate = args.evaluate or (["python-docs:heldout", "graph-theory:heldout"] if args.model is None else list(EVAL))
    args.no_memory = args.no_memory or args.model is not None
    args.model = args.model or EXAMPLE
    return args


def main() -> None:
    """Measures, writes the results, shows them on the page, and prints them."""
    args = parsed()
    if args.child is not None:
        child(args.child)
        return
    if args.page:
        write_page(args.results)
        return
    for name in ("ADAPTER_RATE", "LATENT_RATE", "ROUTER_RATE"):
        setattr(ways, name, args.rates * getattr(ways, name))
    with tempfile.TemporaryDirectory() as folder:
        found = measured(args, Path(folder))
    if not args.no_memory:
        found["memory"] = memory(args.layers)
    told = "keep samples epochs batch_size rates calibration_samples evaluation_samples sequence_length train evaluate"
    asked = {key: getattr(args, key) for key in told.split()}
    head = {"study": args.study, "asked": asked, "threads": torch.get_num_threads(), "versions": installed_versions()}
    args.results.mkdir(exist_ok=True)
    path = args.results / f"finetune-{args.study}.json"
    path.write_text(json.dumps(head | found, indent=1) + "\n", encoding="utf-8")
    print(section([head | found]))
    if "memory" in found:
        ratio = found["memory"]["peak"] / found["memory"]["accounted"]
        print(f"memory: {ratio:.2f}; goal: at most {GOAL}")
    if args.results == RESULTS:
        write_page(RESULTS)


if __name__ == "__main__":
    main()
