"""Peak memory of `apply` on checkpoints that differ in nothing but their number of layers.

    python benchmarks/memory.py                      # 4 and 24 layers of 203 MB each, about an hour of one core
    python benchmarks/memory.py --layers 2 6 --stages
    python benchmarks/memory.py --json               # for a program

Qwen3-MoE checkpoints of random bf16 weights are written tensor by tensor, so that they are never in memory; experts have
falling spectra, so that layers are compressed about alike. Each is then compressed by the default recipe in a process
of its own, whose largest resident size the system itself has kept (VmHWM).
Goals: the peaks differ by less than 10 %, and beyond what the process takes after planning and the plan's stated
activations a run needs less than 3 times the bytes of one dense decoder layer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIFFERENCE_GOAL, RATIO_GOAL = 0.10, 3.0
EXAMPLE = Path(__file__).parents[1] / "examples" / "pocket-moe"  # for its tokenizer
WINDOWS, LENGTH = 8, 128
MB = 1e6


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at most so far (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def write_checkpoint(folder: Path, layers: int, experts: int, hidden: int, intermediate: int, top_k: int = 8) -> None:
    """A Qwen3-MoE model folder, streamed."""
    import torch
    from transformers import AutoConfig

    from molae_compress.adapters.saving import in_hub_format
    from molae_compress.adapters.skeleton import skeleton
    from molae_compress.checkpoint import TensorSource, write_shards

    example = json.loads((EXAMPLE / "config.json").read_text())
    config = AutoConfig.for_model(
        "qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        vocab_size=example["vocab_size"],
        eos_token_id=example["eos_token_id"],
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=1024,
    )
    model = skeleton(config)
    sources = []
    for number, (name, tensor) in enumerate(in_hub_format(model, model.state_dict()).items()):

        def chunks(shape: torch.Size = tensor.shape, seed: int = number, name: str = name) -> Iterator[bytes]:
            generator = torch.Generator().manual_seed(seed)
            values = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            values = values + 1 if "norm" in name else values
            if ".experts." in name:
                falling_H = torch.arange(1, hidden + 1) ** -0.5
                values = values * (falling_H[:, None] if "down" in name else falling_H)
            yield values.bfloat16().view(torch.uint8).numpy().tobytes()

        sources.append(TensorSource(name, "BF16", tuple(tensor.shape), chunks))
    folder.mkdir()
    write_shards(folder, sources, max_shard_size=10**9)
    config.save_pretrained(folder)
    for path in EXAMPLE.glob("tokenizer*"):
        shutil.copy(path, folder)


def recipe_for(model: Path) -> dict[str, Any]:
    """The default recipe, with few tokens."""
    text = {"data": "python-docs:calibration", "samples": WINDOWS, "sequence_length": LENGTH}
    return {"molae": 1, "model": str(model), "calibration": text}


def compress(model: Path, out: Path, stages: bool) -> None:
    """Runs in a process of its own; prints what it took as JSON."""
    import molae_compress as molae

    imported = resident()
    planned = molae.plan(recipe_for(model))
    baseline = resident()

    def progress(stage: str, done: int, total: int) -> None:
        if stages:
            print(
                f"  {stage} {done}/{total}: now {resident() / MB:.0f} MB, peak so far {resident('VmHWM') / MB:.0f} MB",
                file=sys.stderr,
            )

    molae.run(recipe_for(model), out, device="cpu", progress=progress)
    found = {
        "imported": imported,
        "baseline": baseline,
        "peak": resident("VmHWM"),
        "activations": planned.activation_bytes,
        "planned": planned.memory_bytes,
    }
    print(json.dumps(found))


def measure(layers: int, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Writes a checkpoint of so many layers, compresses it, and removes both."""
    from molae_compress.checkpoint import Checkpoint

    model, out = place / f"model-{layers}", place / f"result-{layers}"
    write_checkpoint(model, layers, args.experts, args.hidden, args.intermediate)
    entries = Checkpoint.open(model).entries
    layer_bytes = sum(entry.nbytes for name, entry in entries.items() if name.startswith("model.layers.0."))
    command = [sys.executable, __file__, "--child", str(model), str(out), *(["--stages"] if args.stages else [])]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    shutil.rmtree(model)
    shutil.rmtree(out)
    working = found["peak"] - found["baseline"] - found["activations"]
    return {"layers": layers, "layer_bytes": layer_bytes, **found, "ratio": working / layer_bytes}


def show(runs: list[dict[str, Any]], difference: float) -> None:
    for run in runs:
        print(
            f"{run['layers']:3} layers of {run['layer_bytes'] / MB:.0f} MB: peak {run['peak'] / MB:.0f} MB "
            f"(after imports {run['imported'] / MB:.0f}, after planning {run['baseline'] / MB:.0f}, "
            f"activations {run['activations'] / MB:.0f}; the plan says {run['planned'] / MB:.0f} beyond the process), "
            f"(peak - planning - activations) / layer = {run['ratio']:.2f} (goal < {RATIO_GOAL:g})"
        )
    print(f"peaks differ by {difference:.1%} (goal < {DIFFERENCE_GOAL:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--stages", action="store_true", help="also print the memory after every layer")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (several GB); temporary if absent")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        compress(*args.child, args.stages)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        runs = [measure(layers, args, Path(place)) for layers in args.layers]
    peaks = [run["peak"] for run in runs]
    difference = (max(peaks) - min(peaks)) / min(peaks)
    if args.json:
        print(json.dumps({"runs": runs, "difference": difference, "goals": [DIFFERENCE_GOAL, RATIO_GOAL]}))
    else:
        show(runs, difference)


if __name__ == "__main__":
    main()
