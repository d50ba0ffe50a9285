"""Speed of whole models, compressed against dense: transformers in the best experts backend of each, and vLLM.

    python benchmarks/inference.py                                     # transformers: a quarter of an hour on two cores
    python benchmarks/inference.py --vllm .venv-serving/bin/python     # vLLM too; the default where it is
    python benchmarks/inference.py --dtypes float32 bfloat16           # both types, in twice the time
    python benchmarks/inference.py --layers 1 --no-vllm --results trial.json
    python benchmarks/inference.py --page                              # writes the page from the results there are

Models of random weights in which experts dominate (by default two layers of 64 experts, hidden size 2048, expert width 768,
eight of them a token: a layer of Qwen3-30B-A3B with half of its experts): dense, in layer form (`basis.profile: serving`)
and in grouped form (the default), both of half of the experts' parameters. Random weights say nothing about quality, and
speed does not depend on it.

Prefill is a prompt of 512 tokens; decode is one token for each of 1, 4 or 16 sequences of 32 tokens and more. Models take
turns, and a ratio is the median over rounds of (time of dense) / (time of the model) in one round: above 1 where the
compressed one is faster. Transformers backends are tried once, and each model has its fastest of each case. A bound is the
time that the weights read, or the operations, take at the rates that this machine reaches in a long sum and in a large
product of the type: the larger of the two. Experts hit by a batch are counted as if chosen by chance. Loading is timed with
the files in the cache of the system.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from molae_compress.kernels.library import library_path
from study.marked import ROOT, write_table

RESULTS = ROOT / "benchmarks" / "results" / "inference.json"
PAGE = ROOT / "docs" / "serving.md"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "layer": ("layer form", {"profile": "serving", "keep": 0.5}),
    "grouped": ("grouped form", {"keep": 0.5}),
}
BACKENDS = ("eager", "batched_mm", "grouped_mm", "molae")
PROMPT, CONTEXT, STEPS = 512, 32, 8
CASES = (("prefill", 1), ("decode", 1), ("decode", 4), ("decode", 16))
SLOTS = 128  # `batched_mm` copies the weights of so many experts at most
VOCABULARY = 512
TYPES = ("float32", "bfloat16")
# A cache of one GiB, the engine in the process itself, and no words on the way.
ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def write_models(place: Path, args: argparse.Namespace, dtype: str) -> dict[str, dict[str, Any]]:
    """Writes the three model folders; what each reads and computes by `bound`."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    import molae_compress as molae

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 512),
        head_dim=64,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    about = {}
    for name, (_, form) in MODELS.items():
        torch.manual_seed(0)
        if form:
            model = molae.from_config(config, molae={**form, "max_flops": None}, dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.save_pretrained(place / name)
        about[name] = {
            "experts": sum(p.numel() for key, p in model.named_parameters() if ".experts." in key),
            "rest": sum(p.numel() for key, p in model.named_parameters() if ".experts." not in key and "embed" not in key),
            "shared": sum(
                p.numel() for key, p in model.named_parameters() if key.endswith((".encode.weight", ".decode.weight"))
            )
            if name == "layer"
            else 0,
        }
    return about


def rates(dtype: str) -> tuple[float, float]:
    """Bytes per second of a long sum of float32, operations per second of a large product."""
    long_N, square = torch.ones(1 << 28), torch.randn(2048, 2048).to(getattr(torch, dtype))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(4):
        started = time.perf_counter()
        long_N.sum()
        read = time.perf_counter()
        square @ square
        times[0].append(read - started)
        times[1].append(time.perf_counter() - read)
    return long_N.numel() * 4 / min(times[0]), 2 * 2048**3 / min(times[1])


def bound(about: dict[str, Any], case: tuple[str, int], args: argparse.Namespace, size: int, found: Any) -> float:
    """Least seconds of a case with numbers of so many bytes, at the rates found; see the head of the file."""
    tokens = PROMPT if case[0] == "prefill" else case[1]
    hit = 1 - (1 - args.top_k / args.experts) ** tokens
    own, once = about["experts"] - about["shared"], about["rest"] + about["shared"]
    read = (once + own * hit) * size
    flops = 2 * tokens * (once + own * args.top_k / args.experts)
    return max(read / found[0], flops / found[1])


class Client:
    """A model in transformers."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        import molae_compress  # noqa: F401 - so that transformers knows latent experts

        started = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.load_seconds = time.perf_counter() - started
        self.tried: dict[tuple[str, int], dict[str, float]] = {}

    @torch.inference_mode()
    def seconds(self, case: tuple[str, int], backend: str) -> float:
        """Of a prompt, or of one step of a batch."""
        phase, batch = case
        # the context of decode steps is no part of what is measured, and too long for some backends
        self.model.set_experts_implementation(backend if phase == "prefill" else "grouped_mm")
        chosen = torch.Generator().manual_seed(batch)
        length = PROMPT if phase == "prefill" else CONTEXT
        ids_BL = torch.randint(VOCABULARY, (batch, length), generator=chosen)
        started = time.perf_counter()
        out = self.model(input_ids=ids_BL, use_cache=True, logits_to_keep=1)
        if phase == "prefill":
            return time.perf_counter() - started
        steps = []
        self.model.set_experts_implementation(backend)
        for _ in range(STEPS):
            ids_BL = torch.randint(VOCABULARY, (batch, 1), generator=chosen)
            started = time.perf_counter()
            out = self.model(input_ids=ids_BL, past_key_values=out.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - started)
        return statistics.median(steps)

    def choose(self, case: tuple[str, int], top_k: int) -> None:
        """Times every backend of a case."""
        tokens = PROMPT if case[0] == "prefill" else case[1]
        tried = [name for name in BACKENDS if name != "batched_mm" or tokens * top_k <= SLOTS]
        for name in tried:  # warms up
            self.seconds(case, name)
        self.tried[case] = {name: self.seconds(case, name) for name in tried}

    def fastest(self, case: tuple[str, int]) -> str:
        return min(self.tried[case], key=self.tried[case].__getitem__)


def in_transformers(place: Path, args: argparse.Namespace, dtype: str) -> dict[str, dict[str, Any]]:
    clients = {name: Client(place / name, dtype) for name in MODELS}
    for client in clients.values():
        for case in CASES:
            client.choose(case, args.top_k)
    times = rounds(args, lambda name, case: clients[name].seconds(case, clients[name].fastest(case)))
    found = summary(times)
    for name, client in clients.items():
        found[name]["load_seconds"] = client.load_seconds
        for case, tried in client.tried.items():
            found[name][title(case)]["backend"] = client.fastest(case)
            found[name][title(case)]["tried_ms"] = {backend: 1e3 * seconds for backend, seconds in tried.items()}
    return found


def rounds(
    args: argparse.Namespace, seconds: Callable[[str, tuple[str, int]], float]
) -> dict[tuple[str, tuple[str, int]], list[float]]:
    """Times of every model and case, the models by turns."""
    times: dict[tuple[str, tuple[str, int]], list[float]] = {(name, case): [] for name in MODELS for case in CASES}
    for _ in range(args.rounds):
        for name, case in times:
            times[name, case].append(seconds(name, case))
    return times


def summary(times: dict[tuple[str, tuple[str, int]], list[float]]) -> dict[str, dict[str, Any]]:
    """Milliseconds and ratios to dense of every model and case."""
    found: dict[str, dict[str, Any]] = {name: {} for name in MODELS}
    for (name, case), own in times.items():
        ratio = statistics.median(dense / mine for dense, mine in zip(times["dense", case], own, strict=True))
        tokens = PROMPT if case[0] == "prefill" else case[1]
        middle = statistics.median(own)
        found[name][title(case)] = {"ms": 1e3 * middle, "tokens_per_second": tokens / middle, "ratio": ratio}
    return found


def title(case: tuple[str, int]) -> str:
    phase, batch = case
    return f"{phase} {PROMPT}" if phase == "prefill" else f"{phase} {batch}"


def in_vllm(place: Path, args: argparse.Namespace, dtype: str) -> dict[str, dict[str, Any]]:
    """Every model in a process of its own for each round, by turns."""
    by_round = []
    for _ in range(args.rounds):
        answers = {}
        for name in MODELS:
            command = [str(args.vllm), __file__, "--child", str(place / name), "--dtypes", dtype]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ENGINE)
            answers[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"vLLM, {dtype}, {name}: {answers[name]}", file=sys.stderr, flush=True)
        by_round.append(answers)
    found = summary({(name, case): [each[name][title(case)] for each in by_round] for name in MODELS for case in CASES})
    for name in MODELS:
        found[name]["load_seconds"] = statistics.median(each[name]["load_seconds"] for each in by_round)
    return found


def vllm_child(folder: Path, dtype: str) -> None:
    """One model in vLLM: seconds of every case, and of loading, as one line of JSON."""
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    model = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=1024,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    found = {"load_seconds": time.perf_counter() - started}

    def seconds(batch: int, length: int, tokens: int) -> float:
        chosen = torch.Generator().manual_seed(batch)
        ids_BL = torch.randint(3, VOCABULARY, (batch, length), generator=chosen).tolist()
        parameters = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        model.generate([{"prompt_token_ids": ids} for ids in ids_BL], parameters, use_tqdm=False)
        return time.perf_counter() - begun

    for case in CASES:
        if case[0] == "prefill":
            seconds(1, PROMPT, 1)
            found[title(case)] = min(seconds(1, PROMPT, 1) for _ in range(2))
        else:
            short, long = seconds(case[1], CONTEXT, 2), seconds(case[1], CONTEXT, 2 + STEPS)
            found[title(case)] = (long - short) / STEPS
    print(json.dumps(found), flush=True)


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each engine, type, case and model, and below a table of loading."""
    lines = [
        "| engine | type | case | model | tokens a second | of the bound | times as fast as dense |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    loading = ["| engine | type | model | seconds to load | of those of dense |", "|---|---|---|--:|--:|"]
    engines = dict.fromkeys(engine for found in results["types"].values() for engine in found["engines"])
    for engine, dtype in product(engines, results["types"]):
        found = results["types"][dtype]
        rows = found["engines"].get(engine, {})
        for case in map(title, CASES):
            for name in rows:
                row = rows[name][case]
                backend = f" (`{row['backend']}`)" if "backend" in row else ""
                share = found["bounds_ms"][name][case] / row["ms"]
                ratio = "" if name == "dense" else f"{row['ratio']:.2f}"
                lines.append(
                    f"| {engine} | {dtype} | {case} | {MODELS[name][0]}{backend} | {row['tokens_per_second']:.1f} | "
                    f"{share:.0%} | {ratio} |"
                )
        for name in rows:
            seconds, dense = rows[name]["load_seconds"], rows["dense"]["load_seconds"]
            ratio = "" if name == "dense" else f"{seconds / dense:.2f}"
            loading.append(f"| {engine} | {dtype} | {MODELS[name][0]} | {seconds:.2f} | {ratio} |")
    return "\n".join([*lines, "", *loading]) + "\n"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 2, "experts": 64, "top_k": 8, "hidden": 2048, "intermediate": 768, "rounds": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=["float32"], help="one after the other")
    serving = ROOT / ".venv-serving" / "bin" / "python"
    parser.add_argument(
        "--vllm",
        type=Path,
        default=serving if serving.exists() else None,
        help="Python of an environment with vLLM, by default that of `make test-serving`; without it, transformers alone",
    )
    parser.add_argument("--no-vllm", dest="vllm", action="store_const", const=None, help="transformers alone")
    parser.add_argument("--folder", type=Path, help="where to put models (several GB); temporary if absent")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the page from the results there are")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """All engines with one type."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        place = Path(folder)
        about, speed = write_models(place, args, dtype), rates(dtype)
        engines = {"transformers": in_transformers(place, args, dtype)}
        if args.vllm:
            engines["vLLM"] = in_vllm(place, args, dtype)
    size = getattr(torch, dtype).itemsize
    bounds = {name: {title(case): 1e3 * bound(about[name], case, args, size, speed) for case in CASES} for name in MODELS}
    return {"bytes_per_second": speed[0], "flops_per_second": speed[1], "bounds_ms": bounds, "engines": engines}


def main() -> None:
    args = parsed()
    if args.child:
        vllm_child(args.child, args.dtypes[0])
        return
    if args.page:
        write_table(PAGE, "inference", Path(__file__).name, table(json.loads(args.results.read_text(encoding="utf-8"))))
        return
    library_path()  # without it `molae` would be `grouped_mm`
    asked = {key: value for key, value in vars(args).items() if type(value) in (int, list)}
    types = {dtype: measured(args, dtype) for dtype in args.dtypes}
    results = {"asked": asked, "threads": torch.get_num_threads(), "types": types}
    args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    if args.results.resolve() == RESULTS:
        write_table(PAGE, "inference", Path(__file__).name, table(results))


if __name__ == "__main__":
    main()
