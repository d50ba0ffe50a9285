"""Distillation of one experts module: its latent tensors trained by gradient from the closed-form start.

What the closed form leaves out is what a gradient can still find: errors of the experts of one token correlate, the
activation bends, and both sides of an expert can give way to each other. The objective is that of `layer_error`; routing is
the model's own and stays as it is. Pure, as the rest of the solver: tensors in, tensors out.
Shape suffixes: N rows of one sample; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molae_compress.solver.basis import interpolated
from molae_compress.solver.packing import Packed
from molae_compress.solver.population import Calibrated
from molae_compress.tensors import AnyShape, Bank, DenseExperts

BATCH = 1024  # tokens of one step
_ASIDE = 16  # one token in this many takes no part in training and decides which state is kept
_MOST_ASIDE = 8192
# Step of a number at the height of the schedule, relative to the root mean square of its tensor, for a start whose error is
# as large as the output itself. What there is to find is smaller where the start is better, and the step with it.
_RATE = 0.06
_WARM_UP = 0.1  # of the steps
_MEASUREMENTS = 8
_BETAS = (0.9, 0.99)
_TINY = 1e-12  # of a gradient: below what rounding leaves of the smallest


@dataclass(frozen=True)
class Distilled:
    """The best state that training went through, the start included.

    Attributes:
        tensors: as `solve_layer` returns them.
        before, after: error of the start and of these on the tokens set aside, relative to the routed output.
    """

    tensors: dict[str, Tensor]
    before: float
    after: float


@torch.no_grad()
def distil(
    dense: DenseExperts, population: Calibrated, shape: AnyShape, tensors: Mapping[str, Tensor], steps: int
) -> Distilled:
    """Trains cores and bases on the routed output of the dense experts; biases and column indices stay as they are.

    Args:
        dense: weights, on the device of `population`.
        population: tokens with their routing; the last sixteenth of them only measures.
        shape: of the module.
        tensors: the start, as `solve_layer` returns it.
        steps: of training, on a batch of tokens each.

    Returns:
        the state of least error on the tokens set aside, rounded to the types of `tensors`; the start itself, bit for bit,
        where nothing was better. What no training token reaches is left as it is: experts without one, and bases that
        such an expert shares.
    """
    aside = min(_MOST_ASIDE, len(population.x_TH) // _ASIDE)
    training, measuring = (_part(population, rows) for rows in (slice(-aside), slice(-aside, None)))
    if not aside or not training.counts_E.any():
        return Distilled(dict(tensors), 0.0, 0.0)
    target_TH = _routed(dense, None, measuring)
    scale = float(_weighed(measuring, target_TH))
    leaves = {
        bank.prefix: _Leaves(bank, _wide(bank, tensors, target_TH.dtype), training.counts_E)
        for bank in shape.banks(dense.spec)
    }
    banks = {expert: bank for bank in leaves.values() for expert in bank.experts}
    moving = [Moving(bank.tensors[name], gradient) for bank in leaves.values() for name, gradient in bank.gradients.items()]
    leaves_of_all = [leaf for bank in leaves.values() for leaf in bank.leaves()]  # nothing of the model's own
    best = dict(tensors)

    def error(candidate: Mapping[str, Tensor]) -> float:
        latent_TH = _routed(dense, Packed.all_of(dense.spec, shape, candidate), measuring)
        return float(_weighed(measuring, latent_TH - target_TH)) / scale if scale else 0.0

    before = after = error(tensors)
    for step, batch in zip(range(1, steps + 1), _batches(len(training.x_TH)), strict=False):
        if not before:
            break
        some = _part(training, batch)
        exact_TH = _routed(dense, None, some)
        with torch.enable_grad():
            loss = _weighed(some, _routed(dense, banks, some) - exact_TH) / (scale * before)
        loss.backward(inputs=leaves_of_all)
        for tensor in moving:
            tensor.step_(step, _RATE * before**0.5 * schedule(step, steps))
        if step == steps or step % max(1, steps // _MEASUREMENTS) == 0:
            candidate = dict(tensors) | {
                f"{prefix}{name}": bank.tensors[name].to(tensors[f"{prefix}{name}"].dtype, copy=True)
                for prefix, bank in leaves.items()
                for name in bank.gradients
            }
            found = error(candidate)
            if found < after:
                best, after = candidate, found
    return Distilled(best, before, after)


def _wide(bank: Bank, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a bank under their names in it; copies of those that train, in the type they train in."""
    named = {name: tensors[f"{bank.prefix}{name}"] for name in bank.shape.tensors(bank.spec)}
    return {name: tensor.to(dtype, copy=True) if _trains(name) else tensor for name, tensor in named.items()}


def _part(population: Calibrated, rows: slice | Tensor) -> Calibrated:
    """Some of the tokens."""
    arrays = {name: getattr(population, name)[rows] for name in ("x_TH", "index_TK", "gate_TK", "token_T")}
    return replace(population, **arrays)


def _batches(tokens: int) -> Iterator[Tensor]:
    """Indices of the tokens of one step after the other: every token once in an order of chance, then again in another."""
    generator = torch.Generator().manual_seed(0)
    left_T = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left_T) < min(BATCH, tokens):
            left_T = torch.cat([left_T, torch.randperm(tokens, generator=generator)])
        yield left_T[:BATCH].sort().values  # ascending, as they lie on disk
        left_T = left_T[BATCH:]


def schedule(step: int, steps: int) -> float:
    """Share of the full rate: a straight warm-up, then a cosine down to nothing."""
    warm = max(1, round(_WARM_UP * steps))
    return step / warm if step <= warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _weighed(population: Calibrated, y_TH: Tensor) -> Tensor:
    """Mean over tokens of |y|^2 in their weights."""
    return (y_TH.square().sum(1) * population.token_T.to(y_TH)).mean()


def _routed(dense: DenseExperts, banks: Mapping[int, Packed] | None, population: Calibrated) -> Tensor:
    """[T,H]: summed routed outputs of the latent experts in `banks`, or of the dense ones."""
    work = torch.float64 if dense.w_in_EJH.dtype == torch.float64 else torch.float32
    y_TH = torch.zeros(population.x_TH.shape, dtype=work, device=dense.w_in_EJH.device)
    for expert in population.counts_E.nonzero()[:, 0].tolist():
        bias_J = None if dense.bias_in_EJ is None else dense.bias_in_EJ[expert]
        for tokens_N, rows_NH, gate_N in population.routed(expert):
            x_NH = rows_NH.to(work)
            if banks is None:
                out_NH = dense.output(expert, dense.intermediate(expert, x_NH))
            else:
                out_NH = banks[expert].output(expert, dense.activate(banks[expert].intermediate(expert, x_NH, bias_J)))
                out_NH = out_NH if dense.bias_out_EH is None else out_NH + dense.bias_out_EH[expert].to(work)
            out_NH = out_NH if dense.after is None else dense.after(out_NH)
            y_TH.index_add_(0, tokens_N, out_NH * gate_N[:, None].to(work))
    return y_TH


class _Leaves(Packed):
    """A bank whose cores and bases are leaves of the graph, each a view of the stored tensor that they make up together.

    So the gradient of one expert is as small as the expert, and a step is taken on few large tensors.
    """

    def __init__(self, bank: Bank, tensors: Mapping[str, Tensor], counts_E: Tensor) -> None:
        super().__init__(bank, tensors)
        self.gradients = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items() if _trains(name)}
        mirror, shape = Packed(bank, self.gradients), bank.shape
        stems = [core for _, core in shape.branches()] + ["down"]
        self._cores = {
            (stem, expert): _leaf(super(_Leaves, self).core(stem, expert), mirror.core(stem, expert))
            for stem in stems
            for expert in bank.experts
        }
        sides = [(stem, shape.input_group, shape.rank_in) for stem, _ in shape.branches()]
        if shape.rank_out is not None:
            sides.append(("decode", shape.output_group, shape.rank_out))
        self._bases: dict[tuple[str, int], Tensor] = {}
        for stem, size, rank in sides:
            weight, gradient = self.tensors[f"{stem}.weight"], self.gradients[f"{stem}.weight"]
            for group, experts in self.groups(size):
                # of one group only; the decoder of the layer form is stored the other way round
                rows = slice(None) if size == len(self.experts) else slice(group * rank, (group + 1) * rank)
                # an expert that nobody speaks for must not have its basis moved by its neighbours
                seen = bool((counts_E[list(experts)] > 0).all())
                self._bases[stem, group] = _leaf(weight[rows], gradient[rows]) if seen else weight[rows]

    def leaves(self) -> list[Tensor]:
        """Everything that trains."""
        return [leaf for leaf in (*self._cores.values(), *self._bases.values()) if leaf.requires_grad]

    def core(self, stem: str, expert: int) -> Tensor:
        """See `Packed`."""
        return self._cores[stem, expert]

    def basis(self, stem: str, group: int, rank: int) -> Tensor:
        """See `Packed`."""
        stored = self._bases[stem, group]
        if self.shape.form == "layer" and stem == "decode":
            return stored.T
        if self.shape.storage == "interpolative":
            return interpolated(self.tensors[f"{stem}.pivots"][group * rank : (group + 1) * rank], stored)
        return stored


class Moving:
    """A tensor in training: Adam, its steps in proportion to the size that the tensor had at the start.

    Args:
        values: changed in place.
        gradient: of the same shape, read and set to zero by every step.
    """

    def __init__(self, values: Tensor, gradient: Tensor) -> None:
        self.values, self.gradient = values, gradient
        self._size = float(values.square().mean().sqrt())
        self._first, self._second = torch.zeros_like(values), torch.zeros_like(values)

    @torch.no_grad()
    def step_(self, step: int, rate: float) -> None:
        """Step number `step`, from 1; a number without any gradient so far stays what it is, bit for bit."""
        one, two = _BETAS
        self._first.lerp_(self.gradient, 1 - one)
        self._second.mul_(two).addcmul_(self.gradient, self.gradient, value=1 - two)
        spread = self._second.sqrt().div_((1 - two**step) ** 0.5).add_(_TINY)
        self.values.addcdiv_(self._first, spread, value=-rate * self._size / (1 - one**step))
        self.gradient.zero_()


def _leaf(values: Tensor, gradient: Tensor) -> Tensor:
    """A leaf of the graph that shares its numbers with `values` and its gradient with `gradient`."""
    leaf = values.detach().requires_grad_()
    leaf.grad = gradient
    return leaf


def _trains(name: str) -> bool:
    """Cores and bases do; column indices and biases do not."""
    return not name.endswith((".pivots", "bias"))
