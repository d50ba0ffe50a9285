"""What fine-tuning gives back of what compression took, what it costs, and the memory that it needs.

    python benchmarks/finetune.py                                   # pocket-moe
    python benchmarks/finetune.py --model M --train a.txt --evaluate b.txt c.txt
    python benchmarks/finetune.py --rows router latent --no-memory

The model is compressed to half of the parameters of its experts, and each way of training goes on from there, towards the
original's predictions unless its row says otherwise. Perplexity is measured on text that neither compression nor training
has seen; the share recovered is that of the gap between the compressed model's and the original's. Seconds are those of
the processor, on `OMP_NUM_THREADS` threads.

Peak memory is that of a process of its own, which trains latent tensors of a larger model of random weights, less what it
takes before it loads the model. Accounted for are the model's parameters, the trained ones and their gradients, two moments
of each and what the forward pass keeps for the backward pass. Goal: at most 1.3 times that.
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
from study.texts import read

RESULTS = Path(__file__).parent / "results"
GOAL = 1.3
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "router": ("routers", {"router": True}),
    "adapters": ("adapters of rank 16 on bases and cores", {"adapters": 16}),
    "latent": ("all latent tensors", {"latent": "all"}),
    "router+latent": ("routers and all latent tensors", {"router": True, "latent": "all"}),
    "latent, text": ("all latent tensors, on the text itself", {"latent": "all", "kl_weight": 0.0, "language_weight": 1.0}),
}


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The compressed model, and a row for every way of training it."""
    texts = {name: as_file(name, folder, args.column) for name in (*args.train, *args.evaluate)}
    train = [texts[name] for name in args.train]
    calibration = {"data": train, "samples": args.calibration_samples, "sequence_length": args.sequence_length}
    started = time.process_time()
    model, half = str(args.model), folder / "half"
    molae.run({"molae": 1, "model": model, "calibration": calibration, "budget": {"keep": args.keep}}, half)
    found: dict[str, Any] = {"compression_seconds": time.process_time() - started}
    found["before"] = figures(half, texts, args)
    found["rows"] = []
    for name in args.rows:
        settings = {"data": train, "samples": args.samples, "sequence_length": args.sequence_length, **ROWS[name][1]}
        started = time.process_time()
        report = molae.finetune(half, {"molae": 1, "finetune": settings}, folder / name)
        entry = report.finetuned[-1]
        row = {"way": name, "seconds": time.process_time() - started, "texts": figures(folder / name, texts, args)}
        row |= {key: entry[key] for key in ("tokens", "steps", "trained_parameters", "loss_before", "loss_after")}
        for text, after in row["texts"].items():
            before = found["before"][text]
            gap = before["perplexity"] - before["original_perplexity"]
            after["recovered"] = (before["perplexity"] - after["perplexity"]) / gap
        found["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return found


def as_file(name: str, folder: Path, column: str) -> str:
    """A source that the package reads: texts of the quality benchmark as a file."""
    if not name.startswith("graph-theory:"):
        return name
    path = folder / f"{name.replace(':', '-')}.jsonl"
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in read(name, None)), encoding="utf-8")
    return str(path)


def figures(model: Path, texts: dict[str, str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of a model against the original, on every text that is evaluated on."""
    sizes = {"samples": args.evaluation_samples, "sequence_length": args.sequence_length}
    against = str(args.model)
    return {name: molae.evaluate(model, data=[texts[name]], against=against, **sizes).to_dict() for name in args.evaluate}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of training latent tensors, in a process of its own, against what it accounts for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "dense", args.layers, 32, 512, 256)
        recipe = {"molae": 1, "model": str(folder / "dense"), "budget": {"keep": 0.5, "rank": None}}
        molae.run(recipe, folder / "half")
        command = [sys.executable, __file__, "--child", str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(folder: Path) -> None:
    """Trains for a few steps, and writes what that took."""
    import transformers.trainer
    from transformers import TrainerCallback

    import molae_compress.tuning.training

    assert transformers.trainer
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


def show(found: dict[str, Any]) -> None:
    """The tables, as text."""
    for text, before in found.get("before", {}).items():
        print(f"\n{text}: perplexity {before['original_perplexity']:.3f}, compressed {before['perplexity']:.3f}")
        print(f"{'way':16} {'tokens':>9} {'seconds':>8} {'trained':>9} {'perplexity':>10} {'recovered':>9} {'KL':>14}")
        for row in found["rows"]:
            after = row["texts"][text]
            kl = f"{before['kl']:.4f}->{after['kl']:.4f}"
            numbers = f"{row['tokens']:9,} {row['seconds']:8.0f} {row['trained_parameters']:9,}"
            print(f"{row['way']:16} {numbers} {after['perplexity']:10.3f} {after['recovered']:9.1%} {kl:>14}")
    if "memory" in found:
        held = found["memory"]
        ratio = held["peak"] / held["accounted"]
        parts = ", ".join(f"{key} {value / 1e6:.0f}" for key, value in held.items() if key not in ("peak", "accounted"))
        print(f"\nmemory in MB: peak {held['peak'] / 1e6:.0f}, accounted for {held['accounted'] / 1e6:.0f} ({parts})")
        print(f"{ratio:.2f} times what is accounted for; goal: at most {GOAL}")


def main() -> None:
    """Measures, writes the results, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=EXAMPLE)
    parser.add_argument("--train", nargs="+", default=["python-docs:calibration"])
    parser.add_argument("--evaluate", nargs="+", default=["python-docs:heldout", "graph-theory:heldout"])
    parser.add_argument("--column", default="text")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=1024, help="windows to train on; one in sixteen only measures")
    parser.add_argument("--calibration-samples", type=int, default=256)
    parser.add_argument("--evaluation-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--layers", type=int, default=4, help="of the model whose memory is measured")
    parser.add_argument("--folder", type=Path, help="where to keep the models; temporary if absent")
    parser.add_argument("--results", type=Path, help="file to write; results/finetune-MODEL.json if absent")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measured(args, args.folder or Path(folder))
    if not args.no_memory:
        found["memory"] = memory(args)
    path = args.results or RESULTS / f"finetune-{args.model.name}.json"
    asked = {key: value for key, value in vars(args).items() if key not in ("folder", "results", "child", "model")}
    content = {"model": args.model.name, "asked": asked, "threads": torch.get_num_threads(), **found}
    assert all(math.isfinite(row["loss_after"]) for row in found["rows"])
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
