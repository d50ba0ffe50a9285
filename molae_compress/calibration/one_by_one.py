"""Experts that a model takes out of a list and calls one by one, inside a block whose routing cannot be seen.

Which tokens went to which expert with which weight is asked of the block itself: its forward runs again with experts that
give nothing, and with experts that give a unit vector each. The difference is the routing, if the block is what it is
taken for, a weighted sum of its experts' outputs for the rows of its input; both are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from molae_compress.calibration.replay import leaves
from molae_compress.errors import ModelError
from molae_compress.layouts.singly import CalledSingly, single_names, weight_shapes, without_numbers
from molae_compress.tensors import DenseExperts

_SIZE = 4096.0  # of unit vectors: rounding of everything else in the block must not drown a routing weight
_TOLERANCE = 0.02  # passes models in bfloat16


class ObservedList(CalledSingly, nn.Module):
    """Stands in for a list or dictionary of experts while calibration tokens pass.

    Args:
        dense: what the experts compute.
        experts: the list or dictionary itself, whose weights may be on meta.
        weights: names of the experts' weights in it.
        record: told inputs, experts (E where a slot has none) and routing weights of every call of the block.
    """

    def __init__(
        self,
        dense: DenseExperts,
        experts: nn.Module,
        weights: tuple[str, ...],
        record: Callable[[Tensor, Tensor, Tensor], None] | None,
    ) -> None:
        super().__init__()
        self.dense, self._record = dense, record
        self.names, self.has_keys = single_names(weights), isinstance(experts, nn.ModuleDict)
        first, shapes = experts.get_submodule(self.names[0]), weight_shapes(experts, weights, self.names[0])
        like = torch.empty(0, dtype=experts.get_parameter(weights[0]).dtype, device=dense.w_out_EHI.device)
        self._example = (without_numbers(first, shapes, like),)  # in a tuple: nothing of it is this module's
        self._probe_EH: Tensor | None = None  # what the experts give instead
        self._sum_EH: Tensor | None = None  # of what they read, while their block runs
        self._is_probed = False  # their block runs for the routing of these experts or others in it

    def example(self) -> nn.Module:
        """What a single expert looks like."""
        return self._example[0]

    @contextmanager
    def watching(self, block: nn.Module) -> Iterator[None]:
        """Records every call of `block`, the module that the list lies in, while open."""
        with ExitStack() as stack:
            if self._record is not None:
                stack.callback(block.register_forward_pre_hook(self._enter).remove)
                stack.callback(block.register_forward_hook(self._leave, with_kwargs=True).remove)
            yield

    def one(self, expert: int, x: Tensor) -> Tensor:
        """What one expert makes of `x [...,H]`, or the probe in its place."""
        x_NH, dense = x.reshape(-1, self.dense.spec.hidden), self.dense
        if self._probe_EH is not None:
            return self._probe_EH[expert].to(x.dtype).expand_as(x).clone()
        if self._record is not None and not self._is_probed:
            if self._sum_EH is None:
                raise self._refusal("they are called from outside the module that they lie in")
            self._sum_EH[expert] += x_NH.double().sum(0)
        y_NH = dense.output(expert, dense.intermediate(expert, x_NH))
        y_NH = y_NH if dense.after is None else dense.after(y_NH)
        return y_NH.reshape(x.shape)

    def _enter(self, block: nn.Module, _: Any) -> None:
        if not self._is_probed:
            spec = self.dense.spec
            device = self.dense.w_out_EHI.device
            self._sum_EH = torch.zeros(spec.num_experts, spec.hidden, dtype=torch.float64, device=device)

    def _leave(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        if self._is_probed or self._record is None:
            return
        H = self.dense.spec.hidden
        inputs = (leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.shape[-1:] == (H,))
        x = next(inputs, None)
        if x is None or self._sum_EH is None:
            raise self._refusal("their block is given no hidden states")
        x_TH = x.reshape(-1, H)
        with _probed(block):
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


@contextmanager
def _probed(block: nn.Module) -> Iterator[None]:
    """While open, runs of the block count for none of the lists in it."""
    lists = [module for module in block.modules() if isinstance(module, ObservedList)]
    for one in lists:
        one._is_probed = True
    try:
        yield
    finally:
        for one in lists:
            one._is_probed = False


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp_min(1e-6))
