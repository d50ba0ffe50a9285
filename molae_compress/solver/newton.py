"""Beyond the closed form on the input side: a Gauss-Newton step of a group's bases and cores together.

The closed form weighs errors of the first projection as if slopes of the activation did not depend on the input. Here they
do: for the experts e of a group, one step from the closed form towards the minimum of

    sum_e w_e E_e |V_e (phi(A_e B x) - phi(W_e x))|^2  +  rho / (1 - rho) s sum_e w_e tr((A_e B - W_e)^T M_e (A_e B - W_e))

phi is linear around A_e B x, the least-squares problem for the changes of B and of all A_e is solved by a few preconditioned
conjugate gradients, and as much of the step is taken as lowers the objective. The second term says the same of inputs of
which nothing is known (white, of mean square s), in the share rho that they have in the closed form too; M_e is the diagonal
of the output metric. Outputs are never formed: |V d|^2 = d^T (V^T V) d.
Shape suffixes: N rows of one sample, X rows of one input branch; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from molae_compress.solver.moments import cholesky
from molae_compress.solver.population import Population
from molae_compress.tensors import DenseExperts

# An expert's tokens beyond this multiple of the sizes of its first projection hardly change the step (docs/method.md).
_TOKENS = 16
_SHARES = (1.0, 0.5, 0.25)  # of the step, tried in turn
KEPT = 64 * 2**20  # bytes at most of what every iteration reads again; what is more than that is computed again
_DAMPING = 1e-3  # of what preconditions, as a share of its mean diagonal
_TINY = 1e-300


def sloped(dense: DenseExperts, h_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """What the activation makes of first projections, [N,I], and its slope [N,J] at each of their rows."""
    with torch.enable_grad():
        h_NJ = h_NJ.detach().requires_grad_()
        z_NI = dense.activate(h_NJ)
        # every row of the first projection feeds one channel, so the gradient of the sum is each row's own slope
        (slope_NJ,) = torch.autograd.grad(z_NI.sum(), h_NJ)
    return z_NI.detach(), slope_NJ


@dataclass(frozen=True)
class InputSide:
    """Bases and cores of one group of experts, or a change of them, by branch.

    Attributes:
        bases: [R,H] of each branch.
        cores: for each branch [X,R] of each expert.
    """

    bases: list[Tensor]
    cores: list[list[Tensor]]

    def parts(self) -> list[Tensor]:
        """All tensors, always in the same order."""
        return [*self.bases, *(core for each in self.cores for core in each)]

    def zeros(self) -> InputSide:
        """Zeros of the same shapes."""
        return InputSide([torch.zeros_like(b) for b in self.bases], [[torch.zeros_like(a) for a in c] for c in self.cores])

    def plus(self, change: InputSide, factor: float = 1.0) -> InputSide:
        """The sum with a multiple of a change."""
        added = [
            [one.add(two, alpha=factor) for one, two in zip(*each, strict=True)]
            for each in zip([self.bases, *self.cores], [change.bases, *change.cores], strict=True)
        ]
        return InputSide(added[0], added[1:])

    def dot(self, other: InputSide) -> float:
        """Inner product, summed in float64."""
        products = ((one * two).sum(dtype=torch.float64) for one, two in zip(self.parts(), other.parts(), strict=True))
        return float(sum(products, torch.zeros((), dtype=torch.float64, device=self.bases[0].device)))


def refined(
    dense: DenseExperts,
    population: Population,
    group: Sequence[int],
    rows: Sequence[Tensor | slice],
    closed: InputSide,
    covariance_HH: Tensor,
    ridge: float,
    iterations: int,
    *,
    keep_bases: bool = False,
) -> InputSide:
    """Bases and cores of one group after the step.

    Args:
        dense: weights, on the device of `population`.
        population: what is known of the experts' inputs; where nothing is, the closed form is kept.
        group: the experts.
        rows: for each branch an index of the rows of the first projection that it makes.
        closed: the closed form, in one dtype of float32 or wider.
        covariance_HH: of the group's inputs, positive definite, float64.
        ridge: rho; 1 says that nothing is known.
        iterations: of conjugate gradients; each sends the tokens of the group through its experts once and back.
        keep_bases: only cores change, so that the experts of a large group can be refined one by one.
    """
    if ridge >= 1 or population.sample(group[0], dense.spec.rows) is None:
        return closed
    level = ridge / (1 - ridge) * float(covariance_HH.diagonal().mean())
    problem = _Problem(dense, population, group, rows, closed, level, keep_bases)
    before, gradient, metric_EJ = problem.gradient()
    precondition = _Preconditioner(closed, metric_EJ, rows, covariance_HH, keep_bases)
    step, left = closed.zeros(), closed.zeros().plus(gradient, -1.0)
    direction = closer = precondition(left)
    size = left.dot(closer)
    for _ in range(iterations):
        curved = problem.curvature(metric_EJ, direction)
        length = size / max(direction.dot(curved), _TINY)
        step, left = step.plus(direction, length), left.plus(curved, -length)
        closer = precondition(left)
        size, previous = left.dot(closer), size
        direction = closer.plus(direction, size / max(previous, _TINY))
    for share in _SHARES:
        there = closed.plus(step, share)
        if problem.objective(there, metric_EJ) < before:
            return there
    return closed


class _Rows(NamedTuple):
    """Some rows of one expert at the point that the objective is expanded around.

    Attributes:
        x_NH: inputs.
        weight_N1: of the rows; those of all rows add up to the weight of the expert.
        target_NI: intermediates of the dense expert.
        latent: [N,R] of each branch.
        z_NI: intermediates at the point.
        slope_NJ: of the activation there.
    """

    x_NH: Tensor
    weight_N1: Tensor
    target_NI: Tensor
    latent: list[Tensor]
    z_NI: Tensor
    slope_NJ: Tensor

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in (*self.latent, *(part for part in self if isinstance(part, Tensor))))


@dataclass(frozen=True)
class _Problem:
    """The objective of one group.

    Attributes:
        dense, population, group, rows: see `refined`.
        at: the point that it is expanded around.
        level: factor of the second term.
        keep_bases: derivatives with respect to bases are left at zero.
    """

    dense: DenseExperts
    population: Population
    group: Sequence[int]
    rows: Sequence[Tensor | slice]
    at: InputSide
    level: float
    keep_bases: bool = False
    _kept: dict[int, list[_Rows]] = field(default_factory=dict)

    def gradient(self) -> tuple[float, InputSide, Tensor]:
        """Value and half the gradient of the objective, and the diagonal metrics [E,J]."""
        out, total, metrics = self.at.zeros(), 0.0, []
        for place, expert in enumerate(self.group):
            metric_II, square_J = self._metric(expert), self.at.bases[0].new_zeros(self.dense.spec.rows)
            for rows in self._expanded(place):
                error_NI = rows.z_NI - rows.target_NI
                pull_NI = (error_NI @ metric_II) * rows.weight_N1
                total += float((error_NI * pull_NI).sum(dtype=torch.float64))
                square_J += (rows.slope_NJ.square() * rows.weight_N1).sum(0)
                self._add_back(out, place, rows.slope_NJ * pull_NI[:, self._channel()], rows)
            metrics.append(metric_II.diagonal()[self._channel()] * square_J)
            total += self._add_unknown(out, self.at, metrics[-1], place)
        return total, out, torch.stack(metrics)

    def curvature(self, metric_EJ: Tensor, change: InputSide) -> InputSide:
        """Gauss-Newton matrix of the objective times a change."""
        out, channel_J = self.at.zeros(), self._channel()
        for place, expert in enumerate(self.group):
            metric_II = self._metric(expert)
            for rows in self._expanded(place):
                moved_NJ = self._projected(change.cores, place, rows.latent)
                if not self.keep_bases:
                    moved_NJ += self._projected(self.at.cores, place, _latent(change, rows.x_NH))
                moved_NI = torch.zeros_like(rows.z_NI).index_add_(1, channel_J, rows.slope_NJ * moved_NJ)
                pull_NI = (moved_NI @ metric_II) * rows.weight_N1
                self._add_back(out, place, rows.slope_NJ * pull_NI[:, channel_J], rows)
            self._add_unknown(out, self.at, metric_EJ[place], place, change)
        return out

    def objective(self, at: InputSide, metric_EJ: Tensor) -> float:
        """The objective at a point."""
        total, unused = 0.0, at.zeros()
        for place, expert in enumerate(self.group):
            metric_II = self._metric(expert)
            for x_NH, w_N1 in self._samples(expert):
                z_NI = self.dense.activate(self._first(at, place, _latent(at, x_NH)))
                error_NI = z_NI - self.dense.intermediate(expert, x_NH)
                total += float(((error_NI @ metric_II) * error_NI * w_N1).sum(dtype=torch.float64))
            total += self._add_unknown(unused, at, metric_EJ[place], place)
        return total

    def _channel(self) -> Tensor:
        return self.dense.spec.channel_of_row().to(self.at.bases[0].device)

    def _metric(self, expert: int) -> Tensor:
        """[I,I]: V^T V."""
        v_HI = self.dense.w_out_EHI[expert].to(self.at.bases[0].dtype)
        return v_HI.T @ v_HI

    def _expanded(self, place: int) -> Iterator[_Rows]:
        """All rows of an expert; kept for the next iteration while there is room."""
        if place in self._kept:
            yield from self._kept[place]
            return
        kept, room = [], KEPT - sum(rows.nbytes() for held in self._kept.values() for rows in held)
        expert = self.group[place]
        for x_NH, w_N1 in self._samples(expert):
            latent = _latent(self.at, x_NH)
            z_NI, slope_NJ = sloped(self.dense, self._first(self.at, place, latent))
            rows = _Rows(x_NH, w_N1, self.dense.intermediate(expert, x_NH), latent, z_NI, slope_NJ)
            yield rows
            room -= rows.nbytes()
            kept.append(rows)
            if room < 0:
                kept.clear()
        if room >= 0:
            self._kept[place] = kept

    def _samples(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [N,H] of an expert and their weights [N,1], which add up to the weight of the expert."""
        spec, dtype = self.dense.spec, self.at.bases[0].dtype
        sample = self.population.sample(expert, spec.rows, _TOKENS * (spec.rows + spec.hidden))
        assert sample is not None
        weight = self.population.weight(expert)
        for x_NH, p_N in sample:
            yield x_NH.to(dtype), (p_N * weight).to(dtype)[:, None]

    def _projected(self, cores: Sequence[Sequence[Tensor]], place: int, latent: Sequence[Tensor]) -> Tensor:
        """[N,J]: latent rows [N,R] of each branch times an expert's cores, in the model's order of rows."""
        out_NJ = latent[0].new_empty(len(latent[0]), self.dense.spec.rows)
        for branch, z_NR in enumerate(latent):
            out_NJ[:, self.rows[branch]] = z_NR @ cores[branch][place].T
        return out_NJ

    def _first(self, at: InputSide, place: int, latent: Sequence[Tensor]) -> Tensor:
        """[N,J]: the latent first projection, bias included."""
        h_NJ, bias_EJ = self._projected(at.cores, place, latent), self.dense.bias_in_EJ
        return h_NJ if bias_EJ is None else h_NJ + bias_EJ[self.group[place]].to(h_NJ.dtype)

    def _add_back(self, out: InputSide, place: int, g_NJ: Tensor, at: _Rows) -> None:
        """Adds to `out` what a gradient with respect to first projections means for bases and cores."""
        for branch, z_NR in enumerate(at.latent):
            g_NX = g_NJ[:, self.rows[branch]]
            out.cores[branch][place] += g_NX.T @ z_NR
            if not self.keep_bases:
                out.bases[branch] += (g_NX @ self.at.cores[branch][place]).T @ at.x_NH

    def _add_unknown(
        self, out: InputSide, at: InputSide, metric_J: Tensor, place: int, change: InputSide | None = None
    ) -> float:
        """Value of the second term for one expert; adds to `out` half its gradient, or its curvature times `change`."""
        total, w_JH = 0.0, self.dense.w_in_EJH[self.group[place]]
        for branch, (b_RH, rows) in enumerate(zip(at.bases, self.rows, strict=True)):
            a_XR = at.cores[branch][place]
            if change is None:
                off_XH = a_XR @ b_RH - w_JH[rows].to(b_RH.dtype)
            else:
                off_XH = change.cores[branch][place] @ b_RH + a_XR @ change.bases[branch]
            pull_XH = self.level * metric_J[rows][:, None] * off_XH
            total += float((pull_XH * off_XH).sum(dtype=torch.float64))
            out.cores[branch][place] += pull_XH @ b_RH.T
            if not self.keep_bases:
                out.bases[branch] += a_XR.T @ pull_XH
        return total


def _latent(side: InputSide, x_NH: Tensor) -> list[Tensor]:
    return [x_NH @ b_RH.T for b_RH in side.bases]


class _Preconditioner:
    """Inverse of the curvature as if slopes did not depend on inputs: a Kronecker product for every basis and core."""

    def __init__(
        self,
        at: InputSide,
        metric_EJ: Tensor,
        rows: Sequence[Tensor | slice],
        covariance_HH: Tensor,
        keep_bases: bool,
    ) -> None:
        work, lifted_EJ = at.bases[0].dtype, metric_EJ + _DAMPING * metric_EJ.mean() + torch.finfo(metric_EJ.dtype).tiny
        self._metrics = [lifted_EJ[:, each] for each in rows]  # [E,X] of each branch
        self._latent = [cholesky(b_RH.double() @ covariance_HH @ b_RH.double().T).to(work) for b_RH in at.bases]
        self._keep_bases, self._cores = keep_bases, list[Tensor]()
        if keep_bases:
            return
        self._root_HH = cholesky(covariance_HH).to(work)
        for b_RH, cores, metric_EX in zip(at.bases, at.cores, self._metrics, strict=True):
            sum_RR = torch.zeros(len(b_RH), len(b_RH), dtype=torch.float64, device=b_RH.device)
            for a_XR, metric_X in zip(cores, metric_EX, strict=True):
                sum_RR += (a_XR.T * metric_X) @ a_XR
            sum_RR.diagonal().add_(_DAMPING * sum_RR.diagonal().mean())
            self._cores.append(cholesky(sum_RR).to(work))

    def __call__(self, change: InputSide) -> InputSide:
        bases = change.bases  # of zeros
        if not self._keep_bases:
            bases = [
                torch.cholesky_solve(torch.cholesky_solve(b_RH, root_RR).T, self._root_HH).T
                for b_RH, root_RR in zip(change.bases, self._cores, strict=True)
            ]
        cores = [
            [
                torch.cholesky_solve((a_XR / metric_X[:, None]).T, root_RR).T
                for a_XR, metric_X in zip(each, metric_EX, strict=True)
            ]
            for each, metric_EX, root_RR in zip(change.cores, self._metrics, self._latent, strict=True)
        ]
        return InputSide(bases, cores)
