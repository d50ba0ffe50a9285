"""What the solver knows about the inputs of a layer's experts: routed calibration samples, or nothing at all.

Both answer the same questions, so that the data-free fit is the limit of the calibrated one and not another algorithm.
Every expert sees its own tokens and, in the share n / (n + kappa D) leaves over, the tokens of its layer: an expert that
calibration never routed to is fitted on the layer's tokens instead of on nothing.
Shape suffixes: N rows of one sample, P pool tokens; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal, Protocol

import torch
from torch import Tensor

from molae_compress.solver.moments import Moments, cholesky, cross, ridged, trust

Weighting = Literal["squared", "linear", "none"]
_POOL_TOKENS = 1024  # tokens of the layer that stand in for an expert's missing ones
ROWS = 2048  # rows sent to the device at a time: bounds the memory of everything that is computed from them
_NOISE = 4.0  # of the moments of inputs, in units of what n tokens of D features have at least


class Population(Protocol):
    """What phase 1 and phase 2 ask about the inputs of experts."""

    def weight(self, expert: int) -> float:
        """Importance of the expert's output error in its layer's, per token."""

    def covariance(self, experts: Sequence[int], ridge: float) -> Tensor:
        """[H,H] float64, positive definite: a group's input covariance, shrunk towards the layer's and the identity."""

    @property
    def flatness(self) -> float:
        """How even the spectrum of the layer's inputs is, up to 1: what `ridge` is multiplied by there."""

    def white(self, experts: Sequence[int], ridge: float) -> float:
        """Share of the identity in moments of what some experts see: `ridge` by flatness, more for few tokens."""

    def white_inside(self, expert: int, size: int, ridge: float) -> float:
        """The same for `size` features that one expert makes of what it sees: `ridge`, more for few tokens."""

    def projected(self, expert: int, b_RH: Tensor, prior_HR: Tensor, ridge: float) -> Tensor:
        """[H,R]: C B^T for the expert's own input covariance C, shrunk as there, towards `prior_HR` = the layer's C B^T."""

    def sample(self, expert: int, size: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]] | None:
        """Rows [N,H] and weights [N] that stand for the expert's inputs when `size` features are estimated.

        They come in parts of at most `ROWS` rows, all weights together of sum 1; None if nothing is known of any input.
        Of an expert's own rows at most `most` are taken, evenly spaced.
        """


@dataclass(frozen=True)
class Uninformed:
    """No calibration data: all input directions alike, all experts alike. MoLAE's own setting (arXiv 2503.23100)."""

    num_experts: int
    hidden: int
    device: torch.device | str = "cpu"

    def weight(self, expert: int) -> float:
        return 1.0 / self.num_experts

    def covariance(self, experts: Sequence[int], ridge: float) -> Tensor:
        return Moments.identity(self.hidden, self.device).gram_DD

    @property
    def flatness(self) -> float:
        return 1.0

    def white(self, experts: Sequence[int], ridge: float) -> float:
        return ridge

    def white_inside(self, expert: int, size: int, ridge: float) -> float:
        return ridge

    def projected(self, expert: int, b_RH: Tensor, prior_HR: Tensor, ridge: float) -> Tensor:
        return prior_HR

    def sample(self, expert: int, size: int, most: int | None = None) -> None:
        return None


@dataclass(frozen=True)
class Calibrated:
    """Tokens a layer's experts saw, with the routing the model itself computed.

    Attributes:
        x_TH: inputs of the experts module, any float dtype; on the CPU, or mapped from a file.
        index_TK: int64 expert of each slot; indices >= num_experts are slots without an expert.
        gate_TK: the model's own routing weights.
        token_T: weight of a token's squared error, 1 / |h|^2 of the residual stream after the layer.
        num_experts: E.
        weighting: how the routing weight g enters: `squared` g^2 (errors of experts uncorrelated), `linear`, `none`.
        shrinkage: kappa of the convex combinations.
        device: where the rows of an expert are sent, and results live.
        even: share of the average expert in what each counts, for text that is routed otherwise.
    """

    x_TH: Tensor
    index_TK: Tensor
    gate_TK: Tensor
    token_T: Tensor
    num_experts: int
    weighting: Weighting = "squared"
    shrinkage: float = 2.0
    device: torch.device | str = "cpu"
    even: float = 0.2

    def inputs(self, index_N: Tensor) -> Tensor:
        """[N,H]: inputs of some tokens, on the device."""
        return self.x_TH[index_N].to(self.device)

    @cached_property
    def slot_weight_TK(self) -> Tensor:
        """[T,K] float64: what a squared output error in a slot counts, averaged over tokens."""
        gate_TK = self.gate_TK.double()
        powers = {"squared": gate_TK.square(), "linear": gate_TK.abs(), "none": torch.ones_like(gate_TK)}
        power_TK = powers[self.weighting]
        routed_TK = self.index_TK < self.num_experts
        return power_TK * routed_TK * self.token_T.double()[:, None] / max(1, self.x_TH.shape[0])

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor]:
        """Slots sorted by expert (stable, so in token order) and the offset of each expert's first slot."""
        flat_S = self.index_TK.reshape(-1)
        counts_E = torch.bincount(flat_S, minlength=self.num_experts)[: self.num_experts]
        offsets = torch.zeros(self.num_experts + 1, dtype=torch.int64)
        offsets[1:] = counts_E.cumsum(0)
        return flat_S.argsort(stable=True), offsets

    @cached_property
    def counts_E(self) -> Tensor:
        """[E] int64: tokens routed to each expert."""
        return self._slots[1].diff()

    def slots(self, expert: int) -> tuple[Tensor, Tensor]:
        """Token indices [N] routed to an expert, and the flat slot indices [N] they were routed by."""
        order_S, offsets = self._slots
        slots_N = order_S[offsets[expert] : offsets[expert + 1]]
        return slots_N // self.index_TK.shape[1], slots_N

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        """Token indices [N] of an expert, and their weights [N] float64 on the device."""
        tokens_N, slots_N = self.slots(expert)
        return tokens_N, self.slot_weight_TK.reshape(-1)[slots_N].to(self.device)

    @cached_property
    def _weights_E(self) -> Tensor:
        slots_S = self.index_TK.reshape(-1).clamp_max(self.num_experts)
        weights_E = torch.zeros(self.num_experts + 1, dtype=torch.float64)
        weights_E = weights_E.index_add_(0, slots_S, self.slot_weight_TK.reshape(-1))[: self.num_experts]
        if not weights_E.any():
            return torch.full_like(weights_E, 1.0 / self.num_experts)
        return (1 - self.even) * weights_E + self.even * weights_E.mean()

    @cached_property
    def layer_moments(self) -> Moments:
        """Input moments of the whole layer."""
        w_T = self.slot_weight_TK.sum(1)
        return self._moments(torch.arange(len(w_T)), w_T.to(self.device))

    def _parts(self, index_N: Tensor, w_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of some tokens beside their weights, at most `ROWS` at a time."""
        for part_N, part_w_N in zip(index_N.split(ROWS), w_N.split(ROWS), strict=True):
            yield self.inputs(part_N), part_w_N

    def _moments_of(self, expert: int) -> Moments:
        """Input moments of one expert; those of the last two are kept, which may form a pair."""
        if expert not in self._recent:
            found = self._moments(*self.rows(expert))
            while len(self._recent) > 1:
                self._recent.pop(next(iter(self._recent)))
            self._recent[expert] = found
        return self._recent[expert]

    @cached_property
    def _recent(self) -> dict[int, Moments]:
        return {}

    def _moments(self, index_N: Tensor, w_N: Tensor) -> Moments:
        moments = Moments.zeros(self.x_TH.shape[1], self.device)
        for x_NH, part_w_N in self._parts(index_N, w_N):
            moments = moments.merge(Moments.of(x_NH, part_w_N))
        return moments

    def routed(self, expert: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Token indices [N], inputs [N,H] and routing weights [N] of an expert on the device, at most `ROWS` at a time."""
        gate_S = self.gate_TK.reshape(-1)
        for tokens_N, slots_N in zip(*(index_N.split(ROWS) for index_N in self.slots(expert)), strict=True):
            yield tokens_N.to(self.device), self.inputs(tokens_N), gate_S[slots_N].to(self.device)

    @cached_property
    def _pool(self) -> tuple[Tensor, Tensor]:
        """Evenly spaced token indices [P] of the layer, and their weights [P] (sum 1) on the device."""
        tokens = self.x_TH.shape[0]
        size = min(tokens, _POOL_TOKENS)
        index_P = torch.arange(size) * tokens // max(1, size)
        w_P = self.slot_weight_TK.sum(1)[index_P]
        w_P = w_P if w_P.any() else torch.ones_like(w_P)
        return index_P, (w_P / w_P.sum()).to(self.device)

    def weight(self, expert: int) -> float:
        """See `Population`; the summed weight of the expert's tokens, a part of it evened out.

        Other text is routed to other experts: one that is hardly seen must not be left without rank.
        """
        return float(self._weights_E[expert])

    @cached_property
    def flatness(self) -> float:
        """Geometric over arithmetic mean of the eigenvalues of the layer's input covariance.

        What n routed tokens cannot tell from nothing, a share H / n of the mean, is added to each: the fewer, the flatter.
        """
        c_HH = self.layer_moments.mean()
        level = float(c_HH.diagonal().mean())
        if level <= 0:
            return 1.0
        noise = len(c_HH) / max(1, int(self.counts_E.sum()))
        root_HH = cholesky(c_HH + noise * level * torch.eye(len(c_HH), dtype=c_HH.dtype, device=c_HH.device))
        return min(1.0, float((2 * root_HH.diagonal().log().mean()).exp()) / level)

    def covariance(self, experts: Sequence[int], ridge: float) -> Tensor:
        ridge, size = ridge * self.flatness, self.x_TH.shape[1]
        layer_HH = ridged(self.layer_moments.mean(), _white(int(self.counts_E.sum()), size, ridge, _NOISE))
        if len(experts) == self.num_experts:
            return layer_HH
        index_N, w_N = (torch.cat(parts) for parts in zip(*(self.rows(expert) for expert in experts), strict=True))
        share = self._share(index_N, w_N, size)
        if share == 0.0:
            return layer_HH
        own = reduce(Moments.merge, (self._moments_of(expert) for expert in experts))
        own_HH = ridged(own.mean(), _white(len(index_N), size, ridge, _NOISE))
        return share * own_HH + (1 - share) * layer_HH

    def white(self, experts: Sequence[int], ridge: float) -> float:
        return self._shrunk(experts, self.x_TH.shape[1], ridge * self.flatness, _NOISE)

    def white_inside(self, expert: int, size: int, ridge: float) -> float:
        return self._shrunk([expert], size, ridge, 1.0)

    def _shrunk(self, experts: Sequence[int], size: int, ridge: float, noise: float) -> float:
        own, tokens = (int(counts.sum()) for counts in (self.counts_E[list(experts)], self.counts_E))
        share = 1.0 if len(experts) == self.num_experts else trust(own, size, self.shrinkage)
        return share * _white(own, size, ridge, noise) + (1 - share) * _white(tokens, size, ridge, noise)

    def projected(self, expert: int, b_RH: Tensor, prior_HR: Tensor, ridge: float) -> Tensor:
        index_N, w_N = self.rows(expert)
        share = self._share(index_N, w_N, self.x_TH.shape[1])
        if share == 0.0:
            return prior_HR
        white = _white(len(index_N), self.x_TH.shape[1], ridge * self.flatness, _NOISE)
        sum_HR, level = torch.zeros(b_RH.T.shape, dtype=torch.float64, device=b_RH.device), 0.0
        for rows_NH, p_N in self._parts(index_N, w_N / w_N.sum()):
            x_NH = rows_NH.to(b_RH.dtype)
            sum_HR += cross(x_NH, x_NH @ b_RH.T, p_N)
            level += float(x_NH.square().mean(1).double() @ p_N)
        own_HR = sum_HR.to(b_RH.dtype)
        return share * ((1 - white) * own_HR + white * level * b_RH.T) + (1 - share) * prior_HR

    def _share(self, index_N: Tensor, w_N: Tensor, size: int) -> float:
        return trust(len(index_N), size, self.shrinkage) if float(w_N.sum()) > 0 else 0.0

    def sample(self, expert: int, size: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]] | None:
        """See `Population`."""
        index_N, w_N = self.rows(expert)
        if most is not None and len(index_N) > most:
            few_N = torch.arange(most) * len(index_N) // most
            index_N, w_N = index_N[few_N], w_N[few_N.to(w_N.device)]
        index_P, p_P = self._pool
        share = self._share(index_N, w_N, size)
        if share == 0.0:
            return self._parts(index_P, p_P) if len(index_P) else None
        p_N = w_N / w_N.sum()
        if share == 1.0:
            return self._parts(index_N, p_N)
        return self._parts(torch.cat([index_N, index_P]), torch.cat([share * p_N, (1 - share) * p_P]))


def _white(count: int, size: int, ridge: float, noise: float) -> float:
    """Share of the identity beside moments of `size` features of so many tokens: never less than their noise."""
    return 1 - (1 - ridge) * trust(count, size, noise)
