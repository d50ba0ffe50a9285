"""Whole models as ONNX: how fast they decode, compressed and dense, and what an export takes.

    python benchmarks/onnx_models.py                        # both parts, results/onnx.json and the tables of docs/onnx.md
    python benchmarks/onnx_models.py --parts decode --rounds 3 --results trial.json
    python benchmarks/onnx_models.py --parts export --layers 4

**decode**: a Qwen3-MoE checkpoint of random weights, in which experts are most of what is read for a token, is compressed
by the default recipe and in the form of one basis a side, both to half of the experts' parameters. Those and the original
are exported and run by onnxruntime-genai, as a user would. Models take turns; a ratio is the median over the rounds of
(time of the original) / (time of the compressed model) in the same round, above 1 where the compressed one is faster: other
load on the machine hits both. Random weights say nothing about quality, and speed does not depend on it. Goal: above 1.

**export**: processor time, memory and size of the graph for checkpoints that differ in nothing but their number of layers,
each exported in a process of its own, whose largest resident size the system itself has kept. Goal: beyond what Python and
the libraries take, the weights that are written and 15 MB a layer for the tracer.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import recipe_for, resident, write_checkpoint
from onnx_results import RESULTS, store, table

KEEP = 0.5
SIZES = {"hidden": 1024, "intermediate": 512, "experts": 32, "top_k": 4, "layers": 4}
SMALL = {"hidden": 512, "intermediate": 512, "experts": 16, "top_k": 4}
EXPORTS = (
    ("dense", "molae"),
    ("quality", "molae"),
    ("serving", "molae"),
    ("dense", "ort-moe"),
    ("serving", "ort-moe"),
    ("dense", "standard"),
    ("quality", "standard"),
)
PROMPT, TOKENS = 32, 32


def compressed(dense: Path, folder: Path, profile: str) -> Path:
    """The model compressed to half, by the default recipe but for the profile, with few tokens."""
    import molae_compress as molae

    recipe = recipe_for(dense)
    molae.run({**recipe, "basis": {"profile": profile}, "budget": {"keep": KEEP}, "evaluate": None}, folder, device="cpu")
    return folder


class Client:
    """An exported model in onnxruntime-genai."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.genai, self.model = genai, genai.Model(config)

    def times(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        """Seconds for the prompt, and for one token after it."""
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(
            max_length=len(prompt) + tokens + 1, min_length=len(prompt) + tokens + 1, do_sample=False
        )
        generator = self.genai.Generator(self.model, parameters)
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return first - started, (time.perf_counter() - first) / tokens


def decode(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Milliseconds a token of every export, and ratios to the original in the same form and in its fastest."""
    from molae_compress.export import export_onnx

    sizes = {name: getattr(args, name) for name in ("experts", "hidden", "intermediate", "top_k")}
    folders = {"dense": place / "dense"}
    write_checkpoint(folders["dense"], SIZES["layers"], **sizes)
    for profile in ("quality", "serving"):
        folders[profile] = compressed(folders["dense"], place / profile, profile)
        print(f"compressed: {profile}", file=sys.stderr, flush=True)
    for model, how in EXPORTS:
        export_onnx(folders[model], place / f"{model}-{how}", experts=how)
        print(f"exported: {model} as {how}", file=sys.stderr, flush=True)
    about = {**sizes, "layers": SIZES["layers"], "keep": KEEP, "threads": args.threads, "rounds": args.rounds}
    return {**about, "prompt": PROMPT, "tokens": TOKENS, **compared(place, args.threads, args.rounds)}


def compared(place: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Runs the exports that lie in a folder, one after the other and round by round."""
    clients = {key: Client(place / "-".join(key), threads) for key in EXPORTS}
    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in EXPORTS}
    chosen = random.Random(0)
    for number in range(rounds + 1):
        prompt = [chosen.randrange(3, 1000) for _ in range(PROMPT)]
        for key, client in clients.items():
            found = client.times(prompt, TOKENS)
            if number:  # the first round warms up
                seconds[key].append(found)
    token = {key: [each for _, each in found] for key, found in seconds.items()}
    fastest = min((key for key in EXPORTS if key[0] == "dense"), key=lambda key: statistics.median(token[key]))

    def ratio(other: tuple[str, str], key: tuple[str, str]) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(token[other], token[key], strict=True))

    rows = [
        {
            "model": model,
            "experts": how,
            "weights": (place / f"{model}-{how}" / "model.onnx.data").stat().st_size,
            "prompt_ms": 1e3 * statistics.median(each for each, _ in seconds[model, how]),
            "token_ms": 1e3 * statistics.median(token[model, how]),
            "to_same_form": ratio(("dense", how), (model, how)),
            "to_fastest": ratio(fastest, (model, how)),
        }
        for model, how in EXPORTS
    ]
    return {"fastest": fastest[1], "rows": rows}


def export(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """What an export of each number of layers takes."""
    found = []
    for layers in args.layers:
        folder = place / f"model-{layers}"
        write_checkpoint(folder, layers, **SMALL)
        command = [sys.executable, __file__, "--child", str(folder), str(place / f"onnx-{layers}")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append({"layers": layers, **SMALL, **json.loads(done.stdout.splitlines()[-1])})
        shutil.rmtree(folder)
    return {"rows": found}


def export_once(folder: Path, out: Path) -> None:
    """Runs in a process of its own; prints what it took as JSON."""
    import onnxruntime
    import onnxscript  # noqa: F401 - libraries are no part of what an export takes

    from molae_compress.export import export_onnx

    assert onnxruntime
    baseline, marks, started = resident(), {}, time.process_time()

    def progress(stage: str, done: int, total: int) -> None:
        if done == total:
            marks[stage] = time.process_time() - started

    made = export_onnx(folder, out, progress=progress)
    stages = dict(zip(marks, (end - start for start, end in zip([0.0, *marks.values()], marks.values())), strict=True))  # noqa: B905
    graph = (out / "model.onnx").stat().st_size
    shutil.rmtree(out)
    peak = resident("VmHWM") - baseline
    print(json.dumps({"weights": made.nbytes - graph, "graph": graph, "nodes": made.nodes, "peak": peak, "seconds": stages}))


PARTS = {"decode": decode, "export": export}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    for name in ("hidden", "intermediate", "experts", "top_k"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=SIZES[name], help="of the part decode")
    parser.add_argument("--threads", type=int, default=1, help="of the part decode")
    parser.add_argument("--rounds", type=int, default=7, help="of the part decode")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48], help="of the part export")
    parser.add_argument("--results", type=Path, default=RESULTS, help="parts that are not measured keep what is in it")
    parser.add_argument("--folder", type=Path, help="where to put models (several GB); temporary if absent")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        export_once(*args.child)
        return
    for part in args.parts:
        with tempfile.TemporaryDirectory(dir=args.folder) as place:
            found = PARTS[part](args, Path(place))
        store(part, found, args.results)
        print(table(part, {part: found}), flush=True)


if __name__ == "__main__":
    main()
