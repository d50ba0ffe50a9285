"""What a model is made of, before anything is compressed: its routed experts, and what would be left alone.

Reads the config and the headers of the weights files, no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from molae_compress.layouts import layout_of, weight_names
from molae_compress.source import DiskSource
from molae_compress.tensors import ExpertsSpec

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class FoundExperts:
    """One routed-experts module, and the class it is of."""

    spec: ExpertsSpec
    class_name: str


@dataclass(frozen=True)
class Part:
    """Modules that hold no routed experts, counted together where their names differ in numbers only.

    Attributes:
        name: module path with `*` for numbers.
        modules: how many there are.
        parameters: numbers in all of them together, tied ones counted once.
    """

    name: str
    modules: int
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """What was found in a model.

    Attributes:
        model: folder or hub id.
        model_class: class of the model, for example `Qwen3MoeForCausalLM`.
        model_type: as in its config.
        rule: how routed experts were told from everything else.
        experts: every routed-experts module, in the order of layers.
        left_alone: everything else.
        unknown_tensors: names in the checkpoint that the class does not know; a run copies them.
        parameters: numbers in the whole model, persistent buffers included, tied ones counted once.
        expert_parameters: numbers in the routed experts.
        bytes: tensor bytes of the checkpoint.
        expert_bytes: tensor bytes of the routed experts in it.
    """

    model: str
    model_class: str
    model_type: str
    rule: str
    experts: tuple[FoundExperts, ...]
    left_alone: tuple[Part, ...]
    unknown_tensors: tuple[str, ...]
    parameters: int
    expert_parameters: int
    bytes: int
    expert_bytes: int

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
        experts = [{**asdict(found.spec), "class": found.class_name} for found in self.experts]
        return {
            **asdict(self),
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
    experts = tuple(FoundExperts(spec, type(source.model.get_submodule(spec.name)).__name__) for spec in source.specs)
    left_alone = _left_alone(source)
    expert_parameters = sum(spec.dense_numel for spec in source.specs)
    expert_keys = {key for spec in source.specs for key in source.expert_keys(spec)}
    return Inspection(
        model=model,
        model_class=type(source.model).__name__,
        model_type=source.model.config.model_type,
        rule="; ".join(dict.fromkeys(_rule(source, spec) for spec in source.specs)),
        experts=experts,
        left_alone=left_alone,
        unknown_tensors=tuple(sorted(source.keys.unknown)),
        parameters=expert_parameters + sum(part.parameters for part in left_alone),
        expert_parameters=expert_parameters,
        bytes=source.checkpoint.total_bytes,
        expert_bytes=sum(source.checkpoint.entries[key].nbytes for key in expert_keys),
    )


def _rule(source: DiskSource, spec: ExpertsSpec) -> str:
    layout = layout_of(spec.name, source.model.get_submodule(spec.name))
    assert layout is not None
    return layout.rule


def _left_alone(source: DiskSource) -> tuple[Part, ...]:
    """The outermost modules that hold no routed experts, in the order of the model."""
    experts = {weight for spec in source.specs for weight in weight_names(source.model, spec.name)}
    above = {prefix for name in experts for prefix in _prefixes(name)}
    parts: dict[str, tuple[set[str], int]] = {}
    seen: set[int] = set()
    for name, tensor in source.model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or name in experts:
            continue
        seen.add(id(tensor))
        part = next(prefix for prefix in _prefixes(name) if prefix not in above)
        modules, parameters = parts.get(_pattern(part), (set(), 0))
        parts[_pattern(part)] = modules | {part}, parameters + tensor.numel()
    return tuple(Part(name, len(modules), parameters) for name, (modules, parameters) in parts.items())


def _prefixes(name: str) -> Iterable[str]:
    """`a`, `a.b`, `a.b.c` for `a.b.c`."""
    pieces = name.split(".")
    return (".".join(pieces[:count]) for count in range(1, len(pieces) + 1))


def _pattern(name: str) -> str:
    return _NUMBER.sub("*", name)
