"""Single experts out of a list or dictionary that holds none any more, for models that take them out and call them.

Model code also looks at what it takes out: at the type of a weight, say, to cast what the expert reads. It is answered by
an example of the experts: a module of their own class whose weights have the right shape, type and device, take no memory,
and are not numbers. Who computes with them finds out.
Shape suffixes: see `molae_compress.tensors`; N rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from molae_compress.layouts.base import bare_copy


class SingleExpert:
    """One of the experts: callable as the original, and answering as an example of them whatever else is asked."""

    def __init__(self, experts: CalledSingly, number: int) -> None:
        self._experts, self._number = experts, number

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        return self._experts.one(self._number, x)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the call."""
        return self(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_experts" not in vars(self):
            raise AttributeError(name)
        return getattr(self._experts.example(), name)


class CalledSingly:
    """What a stand-in for a list or dictionary of experts is beside a module.

    Attributes:
        names: of the experts in their order.
        has_keys: it stands for a dictionary.
    """

    names: tuple[str, ...]
    has_keys: bool

    @abstractmethod
    def one(self, expert: int, x: Tensor) -> Tensor:
        """What one expert makes of `x [...,H]`."""

    @abstractmethod
    def example(self) -> nn.Module:
        """What a single expert looks like; see `without_numbers`."""

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, key: slice) -> list[SingleExpert]: ...
    @overload
    def __getitem__(self, key: int | str) -> SingleExpert: ...
    def __getitem__(self, key: int | str | slice) -> SingleExpert | list[SingleExpert]:
        if isinstance(key, slice):
            return [SingleExpert(self, expert) for expert in range(len(self))[key]]
        if isinstance(key, str):
            if key not in self.names:
                raise KeyError(key)
            return SingleExpert(self, self.names.index(key))
        return SingleExpert(self, range(len(self))[key])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.names) if self.has_keys else self.values()

    def __contains__(self, item: object) -> bool:
        return item in self.names if self.has_keys else isinstance(item, SingleExpert) and item._experts is self

    def keys(self) -> list[str]:
        """Names of the experts, of a dictionary."""
        return list(self.names)

    def values(self) -> Iterator[SingleExpert]:
        """The experts."""
        return (SingleExpert(self, expert) for expert in range(len(self)))

    def items(self) -> Iterator[tuple[str, SingleExpert]]:
        """Names and experts, of a dictionary."""
        return zip(self.keys(), self.values(), strict=True)


def single_names(weights: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the experts of a list, from those of its weights."""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in weights))


def weight_shapes(experts: nn.Module, weights: tuple[str, ...], expert: str) -> dict[str, torch.Size]:
    """Shapes of the weights of one expert of a list, by path inside the expert."""
    own = (name.removeprefix(f"{expert}.") for name in weights if name.startswith(f"{expert}."))
    return {name: experts.get_parameter(f"{expert}.{name}").shape for name in own}


def without_numbers(
    module: nn.Module, shapes: Mapping[str, torch.Size], like: Tensor, *, value: float = float("nan")
) -> nn.Module:
    """A copy of a module whose weights are all one value, and take no memory.

    Args:
        module: an expert, or a list of them; its weights may be gone already.
        shapes: of the weights, by path inside the module.
        like: of their type, on their device.
        value: what they are.
    """
    copy = bare_copy(module, shapes)
    for name, shape in shapes.items():
        parent, _, leaf = name.rpartition(".")
        weight = torch.full((), value, dtype=like.dtype, device=like.device).expand(shape)
        copy.get_submodule(parent).register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    return copy
