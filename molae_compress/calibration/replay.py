"""What layers gave, kept so that it can be given again: the state of a model's forward between two of its layers.

A layer may return more than hidden states, and may write into dictionaries and caches that it was given. Of all that only
what the rest of the forward can still use is kept; which tensors those are is found by following them through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache

from molae_compress.errors import ModelError

Tree = Any  # tensors, `Gone`, None, numbers and text in tuples, lists and dictionaries, in any depth
Slot = tuple[int, int]  # layer, and which of the tensors that it gave, counted in the order of `leaves`
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Gone:
    """In place of a tensor that nothing can use any more; given again, it is zeros."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Given:
    """What one layer gave for one batch.

    Attributes:
        returned: its return value.
        written: entries it made in dictionaries and caches it was given, by the argument's name (or place) and key.
    """

    returned: Tree
    written: dict[str, dict[Any, Tree]]

    def mapped(self, change: Callable[[Tensor | Gone], Any]) -> Given:
        """The same with every tensor changed."""
        return Given(mapped(self.returned, change), mapped(self.written, change))

    def leaves(self) -> list[Tensor | Gone]:
        """All tensors, in a fixed order."""
        return [*leaves(self.returned), *leaves(self.written)]


Passed = tuple[Given | None, ...]  # what every layer so far gave for one batch; None for one that was not called


def mapped(tree: Tree, change: Callable[[Tensor | Gone], Any]) -> Tree:
    """A tree with every tensor changed; raises `ModelError` if it holds what could not be given again."""
    if isinstance(tree, (Tensor, Gone)):
        return change(tree)
    if isinstance(tree, _PLAIN):
        return tree
    if type(tree) in (tuple, list):
        return type(tree)(mapped(part, change) for part in tree)
    if type(tree) is dict:
        return {key: mapped(part, change) for key, part in tree.items()}
    raise ModelError(
        f"A layer returns an object of {type(tree).__name__}.",
        why="It cannot be kept until the next layer is looked at.",
        remedy="Compress data-free (no `calibration` section), or report the architecture.",
    )


def leaves(tree: Tree) -> Iterator[Tensor | Gone]:
    """All tensors of a tree, whatever else it holds, in the order of `mapped`."""
    if isinstance(tree, (Tensor, Gone)):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from leaves(part)
    elif isinstance(tree, Mapping):
        for part in tree.values():
            yield from leaves(part)


def resting(passed: Passed, needed: set[Slot]) -> Passed:
    """Copies on the CPU, without tensors that are not `needed`, and without memory that views keep of larger ones."""
    kept: list[Given | None] = []
    for layer, given in enumerate(passed):
        slots = ((layer, i) for i in count())
        kept.append(given and given.mapped(partial(_settled, slots, needed)))
    return tuple(kept)


def of_window(passed: Passed, window: int, windows: int) -> Passed:
    """What layers gave for one window of a batch of several: tensors with as many rows as windows have one for each."""

    def row(leaf: Tensor | Gone) -> Tensor | Gone:
        if not leaf.shape or leaf.shape[0] != windows:
            return leaf
        return leaf[window, None] if isinstance(leaf, Tensor) else Gone((1, *leaf.shape[1:]), leaf.dtype)

    return tuple(given.mapped(row) if given is not None else None for given in passed)


def nbytes(passed: Passed) -> int:
    """Memory of the tensors that are kept."""
    held = (leaf for given in passed if given is not None for leaf in given.leaves())
    return sum(leaf.nbytes for leaf in held if isinstance(leaf, Tensor))


def packed(passed: Passed) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors by name, and what else there is, as JSON values; tensors whose numbers mean anything else are bytes."""
    tensors: dict[str, Tensor] = {}

    def described(tree: Tree) -> Any:
        if isinstance(tree, Tensor):
            name = f"{len(tensors):04d}"
            number = tree.is_floating_point() and len(tensors) == 0
            tensors[name] = tree.contiguous() if number else tree.contiguous().reshape(-1).view(torch.uint8)
            return {"tensor": name, "shape": list(tree.shape), "dtype": str(tree.dtype).removeprefix("torch.")}
        if isinstance(tree, Gone):
            return {"shape": list(tree.shape), "dtype": str(tree.dtype).removeprefix("torch.")}
        if isinstance(tree, _PLAIN):
            return {"plain": tree}
        if isinstance(tree, dict):
            return {"dict": [[key, described(part)] for key, part in tree.items()]}
        return {type(tree).__name__: [described(part) for part in tree]}

    # the newest first, so that the one stored as numbers is the residual stream
    info = [None if given is None else described((given.returned, given.written)) for given in reversed(passed)]
    return tensors, info


def unpacked(tensors: Mapping[str, Tensor], info: Sequence[Any]) -> Passed:
    """The way back from `packed`."""

    def built(value: Any) -> Tree:
        if "shape" in value:
            shape, dtype = tuple(value["shape"]), getattr(torch, value["dtype"])
            if "tensor" not in value:
                return Gone(shape, dtype)
            held = tensors[value["tensor"]]
            return held if held.dtype == dtype and held.shape == shape else held.view(dtype).reshape(shape)
        if "plain" in value:
            return value["plain"]
        if "dict" in value:
            return {key: built(part) for key, part in value["dict"]}
        kind = tuple if "tuple" in value else list
        return kind(built(part) for part in value[kind.__name__])

    return tuple(None if value is None else Given(*built(value)) for value in reversed(info))


class Follower(TorchDispatchMode):
    """While active, follows given tensors through all that is computed: what still exists of any of them is needed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, tuple[StorageWeakRef, frozenset[Slot]]] = {}

    def follow(self, tensor: Tensor, slots: frozenset[Slot]) -> Tensor:
        """Follows a tensor from here on; whatever shares its storage does too."""
        storage = StorageWeakRef(tensor.untyped_storage())
        # a storage has its place for itself as long as there are weak references to it
        self._seen[storage.cdata] = (storage, slots | self._slots(tensor))
        return tensor

    def needed(self) -> set[Slot]:
        """Those of the followed tensors of which something still exists."""
        return set().union(*(slots for storage, slots in self._seen.values() if not storage.expired()))

    def _slots(self, tensor: Tensor) -> frozenset[Slot]:
        return self._seen.get(tensor.untyped_storage()._cdata, (None, frozenset[Slot]()))[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        used = (leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if slots := frozenset[Slot]().union(*(self._slots(tensor) for tensor in used)):
            for tensor in leaves(out):
                if isinstance(tensor, Tensor):
                    self.follow(tensor, slots)
        return out


@contextmanager
def writing(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[dict[str, dict[Any, Tree]]]:
    """Finds out what is written into dictionaries and caches among the arguments while open."""
    written: dict[str, dict[Any, Tree]] = {}
    named = _named(args, kwargs)
    before = {name: dict(held) for name, held in named.items() if isinstance(held, MutableMapping)}
    caches = {name: held for name, held in named.items() if isinstance(held, Cache)}
    for name, cache in caches.items():
        cache.update = _recording(cache.update, written.setdefault(name, {}))  # type: ignore[method-assign]
    try:
        yield written
    finally:
        for cache in caches.values():
            del cache.update
    for name, held in before.items():
        written[name] = {key: value for key, value in named[name].items() if held.get(key) is not value}


def write_again(written: Mapping[str, Mapping[Any, Tree]], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Makes the entries that `writing` found once more."""
    named = _named(args, kwargs)
    for name, entries in written.items():
        for key, value in entries.items():
            if isinstance(named[name], Cache):
                named[name].update(*value, key)
            else:
                named[name][key] = value


def _recording(update: Callable[..., Any], written: dict[Any, Tree]) -> Callable[..., Any]:
    def recorded(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        written[layer] = (keys, values)
        return update(keys, values, layer, *args, **kwargs)

    return recorded


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**{str(place): value for place, value in enumerate(args)}, **kwargs}


def _settled(slots: Iterator[Slot], needed: set[Slot], leaf: Tensor | Gone) -> Tensor | Gone:
    if next(slots) not in needed or isinstance(leaf, Gone):
        return Gone(tuple(leaf.shape), leaf.dtype)
    leaf = leaf.detach().cpu()
    return leaf.clone() if leaf.untyped_storage().nbytes() > leaf.nbytes else leaf
