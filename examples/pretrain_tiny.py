"""Trains a small Mixture-of-Experts model from random weights, and its twins with latent experts, side by side on the CPU.

    python examples/pretrain_tiny.py                      # one seed, some minutes for each of the four models
    python examples/pretrain_tiny.py --seeds 2 --output docs/assets/pretrain-tiny.json --page docs/from-scratch.md

All models are of one family (qwen3_moe), start from the same random numbers wherever they have the same parameters, and
see the same tokens in the same order; plain `Trainer` trains them. The text is what every Python carries: its help topics
and the docstrings of its library. What is reported is the loss on help topics that no model has seen, against the
parameters outside the embedding and against the operations of one token, which torch counts. Runs that are in the output
file already are not repeated.
"""

from __future__ import annotations

import argparse
import ast
import json
import platform
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.models.qwen3_moe import Qwen3MoeConfig

import molae_compress as molae
from molae_compress.calibration.text import read_texts, token_windows

MARKS = ("<!-- results: examples/pretrain_tiny.py -->", "<!-- end of results -->")
TOKENIZER = Path(__file__).parent / "pocket-moe"
WINDOW, BATCH = 128, 16
SIZES: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "norm_topk_prob": True,
    "output_router_logits": True,  # adds the load-balancing loss while training
    "router_aux_loss_coef": 0.01,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
FORMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "layer form": {"profile": "serving", "rank": 64},
    "grouped form": {"keep": 0.547},
    "paper's form": {"method": "paper", "keep": 0.547},
}


def docstrings() -> list[str]:
    """Those of the standard library, one document a module."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue  # templates and files in other encodings
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found.append("\n\n".join(text for text in texts if text))
    return [text for text in found if text]


def windows(texts: list[str]) -> Tensor:
    """[N,L] token ids, all that the texts give."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return token_windows([texts], tokenizer, samples=10**6, sequence_length=WINDOW, seed=None)


def make(form: dict[str, Any] | None, seed: int) -> PreTrainedModel:
    """The dense model, or its twin in a latent form."""
    if form is None:
        set_seed(seed)
        return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES))
    return molae.from_config("qwen3_moe", molae=form, seed=seed, **SIZES)


def non_embedding(model: PreTrainedModel) -> int:
    """Parameters outside the embedding, which is the head too."""
    return sum(parameter.numel() for parameter in model.parameters()) - model.get_input_embeddings().weight.numel()


def operations(model: PreTrainedModel) -> dict[str, int]:
    """Floating-point operations of one token between embedding and head, as torch counts them, forward and backward."""
    counts = {}
    x = torch.randn(1, WINDOW, SIZES["hidden_size"], requires_grad=True)
    implementation = model.config._experts_implementation
    model.set_experts_implementation("eager")  # plain products, each of which is counted
    with FlopCounterMode(display=False) as forward:
        out = model.model(inputs_embeds=x).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    model.zero_grad(set_to_none=True)
    model.set_experts_implementation(implementation)
    counts["forward"] = forward.get_total_flops() // WINDOW
    counts["backward"] = backward.get_total_flops() // WINDOW
    return counts


def validation_loss(model: PreTrainedModel, windows_NL: Tensor) -> float:
    """Mean loss in nats per token, without the load-balancing loss."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for ids in windows_NL.split(32):
            logits = model(input_ids=ids, output_router_logits=False).logits[:, :-1]
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / (windows_NL[:, 1:].numel())


def train(model: PreTrainedModel, windows_NL: Tensor, *, steps: int, rate: float, seed: int) -> float:
    """Trains in place with plain `Trainer`; returns seconds."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.1,
            adam_beta2=0.95,
            seed=seed,
            use_cpu=True,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in windows_NL]
        started = time.monotonic()
        Trainer(model, arguments, train_dataset=rows).train()
        return time.monotonic() - started


def measure(name: str, seed: int, *, steps: int, rate: float, seen: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Makes, counts, trains and validates one model: a row of the results."""
    model = make(FORMS[name], seed)
    row = {"form": name, "seed": seed, "steps": steps, "rate": rate, "tokens": steps * BATCH * WINDOW}
    row |= {"parameters": non_embedding(model), **operations(model)}
    row["loss_untrained"] = round(validation_loss(model, held_out), 4)
    row["seconds"] = round(train(model, seen, steps=steps, rate=rate, seed=seed), 1)
    row["loss"] = round(validation_loss(model, held_out), 4)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown, one line a form, everything relative to the dense model."""
    lines = [
        "| experts | parameters outside the embedding | operations per token, forward and backward | validation loss | "
        "beside the dense twin |",
        "|---|--:|--:|--:|--:|",
    ]
    dense = {row["seed"]: row for row in rows if row["form"] == "dense"}
    for name in FORMS:
        own = [row for row in rows if row["form"] == name and row["seed"] in dense]
        if not own:
            continue
        twin = dense[own[0]["seed"]]
        work, work_dense = (row["forward"] + row["backward"] for row in (own[0], twin))
        gaps = [row["loss"] - dense[row["seed"]]["loss"] for row in own]
        beside = "" if name == "dense" else " ".join(f"{gap:+.3f}" for gap in gaps)
        losses = " ".join(f"{row['loss']:.3f}" for row in own)
        share = own[0]["parameters"] / twin["parameters"]
        lines.append(
            f"| {name} | {own[0]['parameters']:,} ({share:.1%}) | {work:,} ({work / work_dense:.1%}) | {losses} | {beside} |"
        )
    first = rows[0]
    seeds = len(dense)
    note = (
        f"{first['tokens']:,} tokens each ({first['steps']} steps), learning rate {first['rate']:g}, "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds side by side'}; losses in nats per token."
    )
    return "\n".join([*lines, "", note])


def write_page(page: Path, text: str) -> None:
    """Puts the table between its two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=480, help="of training, 2,048 tokens each")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--forms", default=",".join(FORMS), help="which models, separated by commas")
    parser.add_argument("--output", type=Path, help="JSON file of results, gone on with")
    parser.add_argument("--page", type=Path, help="Markdown page that shows them")
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if asked.output is not None and asked.output.exists():
        rows = json.loads(asked.output.read_text(encoding="utf-8"))["rows"]
    known = {(row["form"], row["seed"], row["steps"], row["rate"]) for row in rows}
    todo = [(name, seed) for seed in range(asked.seeds) for name in asked.forms.split(",")]
    todo = [(name, seed) for name, seed in todo if (name, seed, asked.steps, asked.rate) not in known]
    if todo:
        held_out = windows(read_texts(["python-docs:heldout"], "text")[0])
        seen = windows([*read_texts(["python-docs:calibration"], "text")[0], *docstrings()])
        print(f"{seen.numel():,} tokens to train on, {held_out.numel():,} to validate on")
    for name, seed in todo:
        rows.append(measure(name, seed, steps=asked.steps, rate=asked.rate, seen=seen, held_out=held_out))
        print(json.dumps(rows[-1]), flush=True)
        if asked.output is not None:
            asked.output.parent.mkdir(parents=True, exist_ok=True)
            versions = {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            content = {"sizes": SIZES, "forms": FORMS, "versions": versions, "rows": rows}
            asked.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    rows = [row for row in rows if (row["steps"], row["rate"]) == (asked.steps, asked.rate)]
    print(f"\n{table(rows)}")
    if asked.page is not None:
        write_page(asked.page, table(rows))


if __name__ == "__main__":
    main()
