"""What a model is made of, before anything is compressed: its routed experts, and what would be left alone.

Reads the config and the headers of the weights files, no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from molae_compress.adapters import unproven_experts
from molae_compress.layouts import LAYER_NUMBER, layout_of, weight_names
from molae_compress.source import DiskSource
from molae_compress.tensors import ExpertsSpec

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# Why a part is left alone, by where it lies.
SHARED = "shared experts: every token uses them"
UNPROVEN = "looks like routed experts and was left alone: that a router sends tokens to it cannot be told"
IN_BLOCK = "beside routed experts, such as their router"
IN_LAYERS = "in the layers, no routed experts"
ELSEWHERE = "outside the layers"


@dataclass(frozen=True)
class FoundExperts:
    """One routed-experts module, the class it is of, and the rule by which it was told from everything else."""

    spec: ExpertsSpec
    class_name: str
    rule: str


@dataclass(frozen=True)
class Part:
    """Modules that hold no routed experts, counted together where their names differ in numbers only.

    Attributes:
        name: module path with `*` for numbers.
        modules: how many there are.
        parameters: numbers in all of them together, tied ones counted once.
        reason: why they are left alone, which is where they lie. A part that hangs beside the experts in the decoder layer
            itself, with no block around both, counts as any other of the layer.
    """

    name: str
    modules: int
    parameters: int
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What was found in a model.

    Attributes:
        model: folder or hub id.
        model_class: class of the model, for example `Qwen3MoeForCausalLM`.
        model_type: as in its config.
        experts: every routed-experts module, in the order of layers.
        left_alone: everything else.
        unknown_tensors: names in the checkpoint that the class does not know; a run copies them.
        parameters: numbers in the whole model, persistent buffers included, tied ones counted once.
        expert_parameters: numbers in the weights of routed experts, tied ones counted once; some classes hold rows in them
            that no expert uses.
        quantization: method by which the files hold weights in fewer bits (`fp8`, `mxfp4`); None if they are plain. Such
            weights are dequantised to bfloat16, one tensor at a time, as they are read.
        stored_bytes: tensor bytes as the files hold them.
        bytes: tensor bytes of the checkpoint as it is read.
        expert_bytes: those of the routed experts.
    """

    model: str
    model_class: str
    model_type: str
    experts: tuple[FoundExperts, ...]
    left_alone: tuple[Part, ...]
    unknown_tensors: tuple[str, ...]
    parameters: int
    expert_parameters: int
    quantization: str | None
    stored_bytes: int
    bytes: int
    expert_bytes: int

    @property
    def rule(self) -> str:
        """How routed experts were told from everything else: every rule that found some."""
        return "; ".join(dict.fromkeys(found.rule for found in self.experts))

    def by_pattern(self) -> dict[str, list[FoundExperts]]:
        """Experts modules by name with `*` for numbers; those of other sizes or classes get a row of their own."""
        found: dict[tuple[object, ...], list[FoundExperts]] = {}
        for experts in self.experts:
            fields = {key: value for key, value in asdict(experts.spec).items() if key not in ("name", "layer")}
            found.setdefault((_pattern(experts.spec.name), experts.class_name, *fields.values()), []).append(experts)
        patterns = [str(key[0]) for key in found]
        return {
            pattern if patterns.count(pattern) == 1 else f"{pattern} ({members[0].spec.layer} …)": members
            for pattern, members in zip(patterns, found.values(), strict=True)
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        experts = [{**asdict(found.spec), "class": found.class_name, "rule": found.rule} for found in self.experts]
        return {
            **asdict(self),
            "rule": self.rule,
            "experts": experts,
            "left_alone": [asdict(part) for part in self.left_alone],
            "unknown_tensors": list(self.unknown_tensors),
        }


def inspect(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Inspection:
    """Looks at a model on disk or on the hub.

    Raises:
        CheckpointError: its files are missing, damaged, quantised, or not those of its class.
        ModelError: it has no routed experts, or some that are not understood; the message says what was looked at.
    """
    source = DiskSource.open(model, revision=revision, device=torch.device("cpu"), trust_remote_code=trust_remote_code)
    experts = tuple(_found(source, spec) for spec in source.specs)
    left_alone = _left_alone(source)
    expert_parameters = sum(weight.numel() for weight in _expert_weights(source).values())
    method, stored_bytes = source.quantized() or (None, source.checkpoint.total_bytes)
    return Inspection(
        model=model,
        model_class=type(source.model).__name__,
        model_type=source.model.config.model_type,
        experts=experts,
        left_alone=left_alone,
        unknown_tensors=tuple(sorted(source.keys.unknown)),
        parameters=expert_parameters + sum(part.parameters for part in left_alone),
        expert_parameters=expert_parameters,
        quantization=method,
        stored_bytes=stored_bytes,
        bytes=source.checkpoint.total_bytes,
        expert_bytes=sum(source.checkpoint.entries[key].nbytes for key in source.all_expert_keys()),
    )


def _found(source: DiskSource, spec: ExpertsSpec) -> FoundExperts:
    module = source.model.get_submodule(spec.name)
    layout = layout_of(spec.name, module)
    assert layout is not None
    return FoundExperts(spec, type(module).__name__, layout.rule)


def _expert_weights(source: DiskSource) -> dict[int, Tensor]:
    """Weights of all routed experts by id, so that tied ones are there once."""
    names = (name for spec in source.specs for name in weight_names(source.model, spec.name))
    return {id(weight): weight for weight in map(source.model.get_parameter, names)}


def _left_alone(source: DiskSource) -> tuple[Part, ...]:
    """The outermost modules that hold no routed experts, in the order of the model."""
    experts = {weight for spec in source.specs for weight in weight_names(source.model, spec.name)}
    unproven = unproven_experts(source.model)
    above = {prefix for name in (*experts, *(path.rpartition(".")[0] for path in unproven)) for prefix in _prefixes(name)}
    parts: dict[tuple[str, str], tuple[set[str], int]] = {}
    seen = set(_expert_weights(source))
    for name, tensor in source.model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        part = next(prefix for prefix in _prefixes(name) if prefix not in above)
        key = _pattern(part), UNPROVEN if part in unproven else _reason(part, source.specs)
        modules, parameters = parts.get(key, (set(), 0))
        parts[key] = modules | {part}, parameters + tensor.numel()
    return tuple(Part(name, len(modules), numbers, reason) for (name, reason), (modules, numbers) in parts.items())


def _reason(part: str, specs: Iterable[ExpertsSpec]) -> str:
    """Where a part lies: in a block of a layer with routed experts, elsewhere in a stack of such layers, or outside."""
    stacks: set[str] = set()
    for spec in specs:
        numbers = list(LAYER_NUMBER.finditer(spec.name))  # a layer may lie in a list of its own: `block.1.layer.2.mlp`
        stacks.add(spec.name[: numbers[0].start(1)])
        layer = spec.name[: numbers[-1].end() + 1]
        block = f"{layer}{spec.name.removeprefix(layer).partition('.')[0]}."
        if part.startswith(block):
            return SHARED if "shared" in part.removeprefix(block).partition(".")[0] else IN_BLOCK
    return IN_LAYERS if part.startswith(tuple(stacks)) else ELSEWHERE


def _prefixes(name: str) -> Iterable[str]:
    """`a`, `a.b`, `a.b.c` for `a.b.c`."""
    pieces = name.split(".")
    return (".".join(pieces[:count]) for count in range(1, len(pieces) + 1))


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)
