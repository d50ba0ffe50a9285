"""Writes the page of supported models from the models themselves: each is built small, looked at, and tried.

`python -m tests.supported_models docs/supported-models.md`
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from molae_compress import compress_
from molae_compress.adapters import find_experts
from molae_compress.adapters.keys import KeyMap
from molae_compress.artifact import check_names
from molae_compress.budget import full_ranks, template
from molae_compress.errors import ModelError, MolaeError
from molae_compress.layouts import LAYER_NUMBER, Layout, dense_experts, layout_of, layouts
from molae_compress.recipe import Recipe
from molae_compress.tensors import ExpertsSpec, LatentShape
from tests.zoo import MODELS, TEXT_MODEL_OF, VOCABULARY, zoo_model

COMMAND = "python -m tests.supported_models docs/supported-models.md"
RANK = 8
# Pairs of the usual activations: without a gate, and as the name of a gated one.
_ACTIVATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "SwiGLU": ("SiLU", F.silu),
    "GeGLU": ("GELU", F.gelu),
    "GeGLU (tanh)": ("GELU (tanh)", lambda x: F.gelu(x, approximate="tanh")),
    "ReGLU": ("ReLU", F.relu),
    "squared ReGLU": ("squared ReLU", lambda x: F.relu(x).square()),
}
# What the default configuration of a class lacks to build a model.
_LACKING = {
    "Qwen3OmniMoeForConditionalGeneration": {
        "talker_config.spatial_merge_size": 2,
        "talker_config.text_config.shared_expert_intermediate_size": 768,
    }
}

_PAGE = """\
<!-- Generated from the models: {command} -->

# Supported models

Routed experts are found by structure, not by a list of names. This page is a record of what was tried: a small random
model of every Mixture-of-Experts class of transformers {version} that generates text goes through the tests. They
find exactly its routed experts, compress them at full rank without a change of the logits, compress them to less,
save, load and expand the result, and do the same from a checkpoint on disk. Quality at real size is another question,
which no table answers.

`molae-compress inspect MODEL` shows what was found in a model of your own.

{count} classes. *Rule* is how the experts are told from everything else (below). *Serving* is whether `basis.profile:
serving` is possible; `quality` is, for every class of the table. *Calibrated* is whether bases can be fitted to a
text; where they cannot, a model is compressed data-free. Activations are those of the default configuration.

{models}

## Rules

{rules}

## Compressed data-free only

{uncalibrated}

## Without the profile `serving`

{unserved}

## Refused

{refused}

## Tested by their text model

These hold the text model of another class beside other towers, and have no small form of their own. What was
compressed is the text model; in the whole, at its usual size and without weights, experts were only looked for. Those
of other towers would be compressed like all others, unless `ignore` names them.

{composites}

## Formats on disk

Checkpoints are read as safetensors files, one or several, with the experts under whatever names transformers loads
them from. Weights are in bfloat16, float16 or float32, or dequantised as they are read from block-wise fp8
(DeepSeek-V3) and MXFP4 (gpt-oss). All other quantisations are refused by name, and so are pickles: see [source
formats](source-formats.md). Tensors that the class does not know, such as those for multi-token prediction, are
copied.

## Models that are not in the table

- With remote code (`--trust-remote-code`): alike MLPs in a list need nothing else, see [a list of
  experts](adapters.md#a-list-of-experts).
- Experts of any other class are refused by name until a package registers [a layout](adapters.md#writing-a-layout)
  for them.
"""


@dataclass
class Record:
    """What was found out about one class; messages are those of refusals."""

    name: str
    model_type: str
    classes: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    activation: str = ""
    notes: list[str] = field(default_factory=list)
    refused: str = ""
    uncalibrated: str = ""
    unserved: str = ""

    @classmethod
    def of(cls, name: str) -> Record:
        """Builds the small model of the class, looks at it, and tries what a table can say yes or no to."""
        model = zoo_model(name)
        record = cls(name, model.config.model_type)
        try:
            specs = find_experts(model)
        except ModelError as error:
            record.refused = _said(error)
            return record
        modules = [model.get_submodule(spec.name) for spec in specs]
        found = [_layout(spec, module) for spec, module in zip(specs, modules, strict=True)]
        record.classes = sorted({type(module).__name__ for module in modules})
        record.rules = sorted({type(layout).__name__ for layout in found})
        record.activation = "; ".join(dict.fromkeys(_activation(model, spec) for spec in specs))
        record.notes = list(dict.fromkeys(_notes(model, specs, found)))
        record.unserved = _refusal(lambda: _serving(model, specs))
        record.uncalibrated = _refusal(lambda: _calibrated(model))
        return record

    def row(self) -> str:
        """A line of the table."""
        classes = ", ".join(f"`{name}`" for name in self.classes)
        yes = ["no" if said else "yes" for said in (self.unserved, self.uncalibrated)]
        cells = [f"`{self.name}`", f"`{self.model_type}`", classes, ", ".join(self.rules), self.activation, *yes]
        return _line([*cells, "; ".join(self.notes)])


def page() -> str:
    """The page as Markdown."""
    records = [Record.of(name) for name in MODELS]
    fine = [record for record in records if not record.refused]
    head = ["Class", "`model_type`", "Experts", "Rule", "Activation", "Serving", "Calibrated", "Notes"]
    used = {rule for record in fine for rule in record.rules}
    rules = [
        _line([name, layout.rule if name in used else f"{layout.rule}; no class of this table, but models with remote code"])
        for layout in layouts()
        for name in [type(layout).__name__]
    ]
    return _PAGE.format(
        command=COMMAND,
        version=transformers.__version__,
        count=len(fine),
        models="\n".join([_line(head), _line(["---"] * len(head)), *(record.row() for record in fine)]),
        rules="\n".join([_line(["Rule", "Experts are told by"]), _line(["---"] * 2), *rules]),
        uncalibrated=_listed({record.name: record.uncalibrated for record in fine}),
        unserved=_listed({record.name: record.unserved for record in fine}),
        refused=_listed({record.name: record.refused for record in records}),
        composites="\n".join(
            [
                _line(["Class", "Text model", "Experts found in the whole"]),
                _line(["---"] * 3),
                *(_line([f"`{name}`", f"`{TEXT_MODEL_OF[name]}`", _places(name)]) for name in sorted(TEXT_MODEL_OF)),
            ]
        ),
    )


def _places(name: str) -> str:
    """Where the experts of a composite of its usual size lie; it is built without weights."""
    model_class = getattr(transformers, name)
    config = model_class.config_class()
    for path, value in _LACKING.get(name, {}).items():
        owner, _, field_name = path.rpartition(".")
        setattr(attrgetter(owner)(config), field_name, value)
    with torch.device("meta"):
        model = model_class(config)
    found = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", spec.name) for spec in find_experts(model))
    return ", ".join(f"`{pattern}` x{count}" for pattern, count in found.items())


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _listed(said: dict[str, str]) -> str:
    return "\n".join(f"- `{name}`: {text}" for name, text in said.items() if text) or "None of them."


def _said(error: MolaeError) -> str:
    return " ".join(part for part in (error.what, error.why) if part)


def _refusal(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except MolaeError as error:
        return _said(error)
    return ""


def _layout(spec: ExpertsSpec, module: nn.Module) -> Layout:
    layout = layout_of(spec.name, module)
    assert layout is not None
    return layout


def _serving(model: PreTrainedModel, specs: list[ExpertsSpec]) -> None:
    """Everything that decides whether the layer form is possible, but for solving it."""
    recipe = Recipe.load({"molae": 1, "budget": {"rank": "full"}, "basis": {"profile": "serving"}})
    shapes: dict[str, LatentShape | None] = {}
    for spec in specs:
        shape = template(recipe, spec)
        rank_in, rank_out = full_ranks(spec, shape)
        shapes[spec.name] = replace(shape, rank_in=rank_in, rank_out=rank_out)
    check_names(KeyMap(model, ()), specs, shapes)


def _calibrated(model: PreTrainedModel) -> None:
    """Fits a few tokens; what is left of the model does not matter."""
    recipe = {"molae": 1, "budget": {"rank": RANK}, "calibration": {"samples": 1, "sequence_length": 8}}
    compress_(model, recipe, data=torch.arange(8)[None] * 7 % (VOCABULARY - 10) + 5)


def _activation(model: PreTrainedModel, spec: ExpertsSpec) -> str:
    """The name of what the experts compute between their projections, found by computing it."""
    activate, (gate_rows, up_rows) = dense_experts(model, spec).activate, spec.gate_rows()
    generator = torch.Generator().manual_seed(0)
    h_NJ = torch.randn(16, spec.rows, generator=generator)

    def computes(function: Callable[[Tensor], Tensor], scale: float) -> bool:
        scaled = h_NJ * scale
        expected = function(scaled[:, gate_rows]) * scaled[:, up_rows] if spec.has_gate else function(scaled)
        return torch.allclose(activate(scaled), expected, rtol=1e-4, atol=1e-6)

    for gated, (plain, function) in _ACTIVATIONS.items():
        if computes(function, 0.5):
            clamped = "" if computes(function, 50.0) else ", clamped"
            return (gated if spec.has_gate else plain) + clamped
    return "of its own, gated" if spec.has_gate else "of its own"


def _notes(model: PreTrainedModel, specs: list[ExpertsSpec], found: list[Layout]) -> Iterator[str]:
    """What is out of the ordinary, in words."""
    embedding: Any = model.get_input_embeddings()
    if not model.can_generate():
        yield "has no `generate`"
    if model.config.is_encoder_decoder:
        yield "encoder and decoder"
    if max(Counter(_layer_path(spec) for spec in specs).values()) > 1:
        yield "several experts modules in a layer"
    for spec, layout in zip(specs, found, strict=True):
        module = model.get_submodule(spec.name)
        if spec.hidden != embedding.weight.shape[1]:
            yield "experts work in a latent space of the model's own"
        if spec.has_bias:
            yield "biases"
        if spec.interleaved:
            yield "gate and up rows alternate"
        if spec.has_output_norm:
            yield "the output of each expert is normalised"
        if spec.is_transposed:
            yield "stored transposed"
        if vars(module).get("zero_expert_num"):
            yield "identity experts"
        beside = {name for name, _ in module.named_parameters()} - set(layout.weight_names(module))
        if any("router" in name for name in beside):
            yield "router and experts in one module"
        block = model.get_submodule(spec.name.rpartition(".")[0])
        if any("shared" in name for name, _ in block.named_children()):
            yield "shared experts, left alone"


def _layer_path(spec: ExpertsSpec) -> str:
    number = LAYER_NUMBER.search(spec.name)
    assert number is not None
    return spec.name[: number.end()]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
