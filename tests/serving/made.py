"""Artifacts for the tests of serving, made in the environment of the package: `python -m tests.serving.made FOLDER`.

vLLM wants an older transformers than the one with which models are compressed, so the two live in environments of their own,
as they would for a user. Beside each artifact lie the greedy tokens that transformers continues some prompts with.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import molae_compress as molae
from molae_compress.adapters import find_experts
from molae_compress.modeling import attach_
from tests.runs import recipe_for
from tests.test_modeling import SHAPES, random_latent
from tests.tiny import save_checkpoint, tiny_model, tiny_tokenizer

# vLLM's attention on a CPU wants heads of 32 numbers; where a family takes them from the hidden size, only one fits.
_ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
# Its latent attention is compiled for the sizes of DeepSeek-V3.
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "head_dim": 64}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 32},
    "qwen2_moe": _ONE_HEAD,
    "mixtral": {"head_dim": 32},
    "olmoe": _ONE_HEAD,
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},  # as checkpoints have it
    # Its kernel takes widths of experts that are multiples of 32 only, in each process, and clamps where gpt-oss does.
    "gpt_oss": {"head_dim": 32, "intermediate_size": 64, "sliding_window": 8, "rope_parameters": _YARN, "swiglu_limit": 7.0},
}
FORMS = {"default": (), "layer": ("basis.profile=serving", "budget.align=8")}
PROMPTS = [[5, 17, 99, 3], list(range(40, 60)), [200], [9, 9, 31, 250, 77, 12, 8]]
TEXTS = ["The list type supports", "To define a class, use the", "An exception is raised when"]
STEPS = 16


def continued(model: PreTrainedModel, prompt: list[int], steps: int = STEPS) -> list[int]:
    """The greedy continuation of a prompt, past any end of text."""
    ids_1L = torch.tensor([prompt])
    out = model.generate(
        ids_1L, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, attention_mask=ids_1L * 0 + 1, eos_token_id=None
    )
    return [int(token) for token in out[0, len(prompt) :]]


def expect(folder: Path, prompts: list[list[int]]) -> None:
    """Writes what transformers continues the prompts with, one after the other, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder / "artifact", dtype=torch.float32).eval()
    answers = [continued(model, prompt) for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) > 1, f"{folder.name} says the same whatever it is asked"
    (folder / "expected.json").write_text(json.dumps({"prompts": prompts, "answers": answers}))


def make_family(folder: Path, family: str, form: str) -> None:
    """An artifact made by a recipe, as users make theirs."""
    dense = save_checkpoint(folder / "dense", family, **FAMILIES[family])
    molae.run(recipe_for(dense, *FORMS[form]), out=folder / "artifact")
    expect(folder, PROMPTS)


def make_mixed(folder: Path) -> None:
    """A model saved from memory of which one layer stayed dense, one has banks, and one is in layer form."""
    model = tiny_model("mixtral", **FAMILIES["mixtral"], num_hidden_layers=4)
    shapes = (SHAPES["banks"], SHAPES["layer"], SHAPES["dense down"])
    modules = zip(find_experts(model)[1:], shapes, strict=True)
    attach_(model, {spec.name: (shape, random_latent(spec, shape, spec.layer)) for spec, shape in modules})
    model.save_pretrained(folder / "artifact")
    tiny_tokenizer().save_pretrained(folder / "artifact")
    expect(folder, PROMPTS)


def make_pocket(folder: Path, profile: str = "quality") -> None:
    """The example model."""
    overrides = ["calibration.samples=32", "evaluate=null", f"basis.profile={profile}"]
    recipe = molae.Recipe.load("recipes/quickstart.yaml", overrides)
    molae.run(recipe, out=folder / "artifact")
    tokenizer = AutoTokenizer.from_pretrained(folder / "artifact")
    expect(folder, [tokenizer(text)["input_ids"] for text in TEXTS])


def main(folder: Path, only: str = "") -> None:
    """All of them, or those whose names begin with `only`, anew."""
    makers: dict[str, Callable[[Path], None]] = {
        f"{family}-{form}": partial(make_family, family=family, form=form) for family in FAMILIES for form in FORMS
    }
    makers |= {"pocket-default": make_pocket, "pocket-layer": partial(make_pocket, profile="serving"), "mixed": make_mixed}
    for name, make in makers.items():
        if name.startswith(only):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir(parents=True)
            make(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
