"""Fit time at larger widths: the default recipe against MoBE and SLBF with the gradient steps that their papers state.

    python benchmarks/fit_time.py                               # a quarter of an hour of one core; page.py shows the results
    python benchmarks/fit_time.py --hidden 256 --results trial

The example model is so small that reading the calibration text takes half of a fit. Here are models of one sparse layer,
shaped like those of Qwen3-30B-A3B (experts 3/8 as wide as the model, 8 of them a token), with fewer and narrower experts.
Weights and tokens are random: the time does not follow from their values. Ours is the whole of `compress_`, calibration
included, with as many tokens as everywhere else. The gradient methods run for a few steps and for some more; a step takes
the difference, and the steps of their papers as many times that. Their search for shapes is left out, which favours them.
All seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import molae_compress as molae
from baselines import BASELINES, Setting
from study.cells import RESULTS, Protocol
from study.methods import TRAINED, TRAINED_KEEP

WIDTHS = (256, 512)
EXPERTS, TOP_K, VOCABULARY = 64, 8, 1024
FEW, MORE = 2, 6  # gradient steps timed


def model_of(hidden: int) -> PreTrainedModel:
    """One layer of attention and experts, random."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        moe_intermediate_size=3 * hidden // 8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        norm_topk_prob=True,
    )
    model: PreTrainedModel = Qwen3MoeForCausalLM(config).eval()
    return model


def ours(hidden: int, samples: int, sequence_length: int) -> float:
    model = model_of(hidden)
    windows_NL = torch.randint(VOCABULARY, (samples, sequence_length), generator=torch.Generator().manual_seed(0))
    calibration = {"samples": samples, "sequence_length": sequence_length}
    budget = {"keep": TRAINED_KEEP, "max_flops": None}
    recipe = molae.Recipe.load({"molae": 1, "calibration": calibration, "output": {"dtype": "bfloat16"}, "budget": budget})
    started = time.process_time()
    molae.compress_(model, recipe, data=windows_NL)
    return time.process_time() - started


def per_step(hidden: int, method: str) -> float:
    """Seconds of one gradient step of a method, on all matrices of the layer."""

    def seconds(steps: int) -> float:
        model, unused_NL = model_of(hidden), torch.zeros(0, 1, dtype=torch.int64)
        started = time.process_time()
        BASELINES[method][1](model, unused_NL, Setting(TRAINED_KEEP, steps=steps))
        return time.process_time() - started

    seconds(FEW)  # what comes but once
    few = seconds(FEW)
    return (seconds(MORE) - few) / (MORE - FEW)


def measured(hidden: int, samples: int, sequence_length: int) -> dict[str, Any]:
    """A row of the results."""
    fit = ours(hidden, samples, sequence_length)
    print(f"hidden {hidden}: ours {fit:.0f} s", flush=True)
    row = {
        "hidden": hidden,
        "intermediate": 3 * hidden // 8,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "fit_seconds": round(fit, 1),
    }
    for method, steps in TRAINED.items():
        step = per_step(hidden, method)
        ratio = steps * step / fit
        row[method] = {"steps": steps, "step_seconds": round(step, 4), "ratio": round(ratio, 1)}
        print(f"    {method}: {step:.3f} s a step, {steps} steps take {ratio:.1f} times as long", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    protocol = Protocol()
    parser.add_argument("--hidden", nargs="+", type=int, default=WIDTHS, help="widths, multiples of 64")
    parser.add_argument("--samples", type=int, default=protocol.samples, help="calibration windows of the fit")
    parser.add_argument("--sequence-length", type=int, default=protocol.sequence_length)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of fit-time.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(hidden, args.samples, args.sequence_length) for hidden in args.hidden]
    head = {"keep": TRAINED_KEEP, "tokens": args.samples * args.sequence_length, "torch": torch.__version__, "rows": rows}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "fit-time.json").write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
