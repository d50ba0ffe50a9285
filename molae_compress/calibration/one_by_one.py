"""Experts that a model takes out of a list and calls one by one, inside a block whose routing cannot be seen.

Which tokens went to which expert with which weight is asked of the block itself: its forward runs again with experts that
give nothing, and with experts that give a unit vector each. The difference is the routing, if the block is what it is
taken for, a weighted sum of its experts' outputs for the rows of its input; both are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from molae_compress.calibration.replay import leaves
from molae_compress.errors import ModelError
from molae_compress.tensors import DenseExperts

_SIZE = 4096.0  # of unit vectors: rounding of everything else in the block must not drown a routing weight
_TOLERANCE = 0.02  # passes models in bfloat16


class ObservedList(nn.Module):
    """Stands in for a list or dictionary of experts while calibration tokens pass.

    Args:
        dense: what the experts compute.
        names: of the experts in their order.
        has_keys: it stands for a dictionary.
        record: told inputs, experts (E where a slot has none) and routing weights of every call of the block.
    """

    def __init__(
        self,
        dense: DenseExperts,
        names: tuple[str, ...],
        has_keys: bool,
        record: Callable[[Tensor, Tensor, Tensor], None] | None,
    ) -> None:
        super().__init__()
        self.dense, self._names, self._has_keys, self._record = dense, names, has_keys, record
        self._probe_EH: Tensor | None = None  # what the experts give instead
        self._sum_EH: Tensor | None = None  # of what they read, while their block runs

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, key: int | str) -> Callable[[Tensor], Tensor]:
        return partial(self._one, self._names.index(key) if isinstance(key, str) else range(len(self))[key])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._names) if self._has_keys else self.values()

    def keys(self) -> list[str]:
        """Names of the experts, of a dictionary."""
        return list(self._names)

    def values(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The experts, callable."""
        return (partial(self._one, expert) for expert in range(len(self)))

    def items(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """Names and experts, of a dictionary."""
        return zip(self.keys(), self.values(), strict=True)

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Records every call of `block`, the module that the list lies in, while open."""
        with ExitStack() as stack:
            if self._record is not None:
                stack.callback(block.register_forward_pre_hook(self._enter).remove)
                stack.callback(block.register_forward_hook(self._leave, with_kwargs=True).remove)
            yield

    def _one(self, expert: int, x: Tensor) -> Tensor:
        x_NH, dense = x.reshape(-1, self.dense.spec.hidden), self.dense
        if self._probe_EH is not None:
            return self._probe_EH[expert].to(x.dtype).expand_as(x).clone()
        if self._record is not None:
            if self._sum_EH is None:
                raise self._refusal("they are called from outside the module that they lie in")
            self._sum_EH[expert] += x_NH.double().sum(0)
        y_NH = dense.intermediate(expert, x_NH) @ dense.w_out_EHI[expert].to(x.dtype).T
        if dense.bias_out_EH is not None:
            y_NH = y_NH + dense.bias_out_EH[expert].to(x.dtype)
        return y_NH.reshape(x.shape)

    def _enter(self, block: nn.Module, _: Any) -> None:
        if self._probe_EH is None:
            spec = self.dense.spec
            device = self.dense.w_out_EHI.device
            self._sum_EH = torch.zeros(spec.num_experts, spec.hidden, dtype=torch.float64, device=device)

    def _leave(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        if self._probe_EH is not None or self._record is None:
            return
        H = self.dense.spec.hidden
        inputs = (leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.shape[-1:] == (H,))
        x = next(inputs, None)
        if x is None or self._sum_EH is None:
            raise self._refusal("their block is given no hidden states")
        x_TH = x.reshape(-1, H)
        gate_TE = self._gates(lambda: block(*args, **kwargs), x_TH)
        seen_EH = (gate_TE != 0).double().T @ x_TH.double()
        if not _close(seen_EH, self._sum_EH):
            raise self._refusal("they read something else than rows of their block's input")
        self._sum_EH = None
        most, top_k = int((gate_TE != 0).sum(1).max()), self.dense.spec.top_k
        if most > top_k:
            raise self._refusal(f"a token is sent to {most} of them, where the model says {top_k}")
        gate_TK, index_TK = gate_TE.abs().topk(top_k, dim=1)
        absent_TK = gate_TK == 0
        self._record(x_TH, index_TK.masked_fill(absent_TK, gate_TE.shape[1]), gate_TE.gather(1, index_TK))

    def _gates(self, block: Callable[[], Any], x_TH: Tensor) -> Tensor:
        """[T,E] float32: routing weights, 0 where a token does not use an expert."""
        E, H = self.dense.spec.num_experts, self.dense.spec.hidden
        zeros_EH = torch.zeros(E, H, device=x_TH.device)

        def outputs(probe_EH: Tensor) -> Tensor:
            self._probe_EH = probe_EH
            try:
                out = next((leaf for leaf in leaves(block()) if isinstance(leaf, Tensor)), None)
            finally:
                self._probe_EH = None
            if out is None or out.numel() != x_TH.numel():
                raise self._refusal("their block does not return hidden states")
            return out.reshape(-1, H).float()

        rest_TH = outputs(zeros_EH)
        gate_TE = torch.zeros(len(x_TH), E, device=x_TH.device)
        for first in range(0, E, H):
            some = torch.arange(first, min(E, first + H), device=x_TH.device)
            probe_EH = zeros_EH.index_put((some, some - first), torch.tensor(_SIZE, device=x_TH.device))
            gate_TE[:, some] = (outputs(probe_EH) - rest_TH)[:, : len(some)] / _SIZE
        # Experts of various sizes and one direction, which is none of those above.
        mixed_EH = _SIZE * torch.linspace(0.5, 1.0, E, device=x_TH.device)[:, None] * torch.linspace(-1.0, 1.0, H).to(x_TH)
        if not _close(outputs(mixed_EH) - rest_TH, gate_TE @ mixed_EH):
            raise self._refusal("their block does not add up their outputs")
        return gate_TE

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(
            f"The experts '{self.dense.spec.name}' cannot be observed: {reason}.",
            why="The model calls them one by one, so that its routing has to be found out.",
            remedy="Compress data-free (no `calibration` section).",
        )


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-6))
