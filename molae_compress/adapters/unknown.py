"""What a checkpoint holds that its model class does not know: heads for multi-token prediction, or layers left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from molae_compress.errors import CheckpointError
from molae_compress.layouts import LAYER_NUMBER


def refuse_further_layers(folder: Path, known: Iterable[str], unknown: Iterable[str]) -> None:
    """Refuses layers among unknown keys that hold exactly what some known layer of the same list holds.

    A layer for multi-token prediction is none of them: it holds more, or lies in a list of its own.

    Args:
        folder: of the checkpoint.
        known: its keys that the class knows.
        unknown: the others.
    """
    whole = {(_stack(layer), frozenset(own)) for layer, own in _layers(known).items()}
    further = [f"'{layer}'" for layer, own in _layers(unknown).items() if (_stack(layer), frozenset(own)) in whole]
    if further:
        raise CheckpointError(
            f"The checkpoint '{folder}' holds {len(further)} layers more than its config.json says: "
            f"{', '.join(further[:3])}{' …' if len(further) > 3 else ''}.",
            why="The result would be a model without these layers, and their experts would stay dense.",
            remedy="Fetch config.json and weights of the same model again, or take these layers out of the weights.",
        )


def routed_experts_among(unknown: Iterable[str], expert_keys: Collection[str]) -> list[str]:
    """Unknown keys that are named in their layer as weights of known routed experts are in theirs.

    Args:
        unknown: keys that the class does not know.
        expert_keys: those of all routed experts.
    """
    names = tuple({f".{name}" for own in _layers(expert_keys).values() for name in own})
    return [key for key in unknown if names and key.endswith(names)]


def _layers(keys: Iterable[str]) -> dict[str, set[str]]:
    """Path of each layer -> the keys in it, relative to it; by number."""
    layers: dict[str, set[str]] = {}
    for key in keys:
        if (number := LAYER_NUMBER.search(key)) is not None:
            layers.setdefault(key[: number.end()], set()).add(key[number.end() + 1 :])
    return dict(sorted(layers.items(), key=lambda entry: (_stack(entry[0]), int(entry[0].rpartition(".")[2]))))


def _stack(layer: str) -> str:
    return layer.rpartition(".")[0]
