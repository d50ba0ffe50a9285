"""Which activation a model's own code computes, found by asking it: kernels need a name and three numbers.

Nothing is read from class or configuration, so a new architecture needs no entry, and what is found is proved on the spot:
the formula and the model's code must agree on a grid of values on both sides of every clamp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from molae_compress.kernels.gpu_tiles import ACTIVATIONS

_FAR = 1e4  # beyond every clamp
_SMALL = 0.25  # below every clamp
_CLOSE = 1e-5
_AWAY = (-1000.0, -100.0, -30.0, -10.0, 10.0, 30.0, 100.0, 1000.0)  # gates beyond clamps that no formula here has


@dataclass(frozen=True)
class Activation:
    """What is computed between the two projections: `act(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)`.

    Attributes:
        kind: one of `ACTIVATIONS`; `silu` is `gate * sigmoid(alpha * gate)`.
        alpha: slope of the sigmoid of `silu`.
        limit: 0 for none.
        up_offset: added to the clamped up.
    """

    kind: str
    alpha: float = 1.0
    limit: float = 0.0
    up_offset: float = 0.0

    @property
    def code(self) -> int:
        """The number that kernels know it by."""
        return ACTIVATIONS.index(self.kind)

    @property
    def family(self) -> int:
        """FAMILY of the kernels: 0 leaves out clamps too."""
        if self.kind in ("silu", "gelu_tanh"):
            return 1
        return 0 if self.kind == "identity" and self.limit == 0 else 2

    @property
    def slopes(self) -> tuple[float, float]:
        """The polynomial inside the sigmoid of the first family: tanh(a) = 2 sigmoid(2a) - 1."""
        return (self.alpha, 0.0) if self.kind == "silu" else (1.5957691216057308, 0.07135481627260025)

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """The formula, plainly: `up` is absent where experts have no gate."""
        if self.limit > 0:
            gate = gate.clamp(max=self.limit)
        out = _FORMULAS[self.kind](gate, self.alpha)
        if up is None:
            return out
        if self.limit > 0:
            up = up.clamp(-self.limit, self.limit)
        return out * (up + self.up_offset)


_FORMULAS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda gate, _: gate,
    "silu": lambda gate, alpha: gate * torch.sigmoid(alpha * gate),
    "gelu": lambda gate, _: torch.nn.functional.gelu(gate),
    "gelu_tanh": lambda gate, _: torch.nn.functional.gelu(gate, approximate="tanh"),
    "relu": lambda gate, _: torch.relu(gate),
    "relu2": lambda gate, _: torch.relu(gate).square(),
}
IDENTITY = Activation("identity")


@torch.no_grad()
def find_activation(activate: Callable[[Tensor], Tensor], *, gated: bool, interleaved: bool) -> Activation | None:
    """The activation that `activate` computes, or None if it is none of those the kernels know.

    Args:
        activate: the model's own map from `[N,J]` to `[N,I]`, on CPU.
        gated: J = 2I, else J = I.
        interleaved: gate and up columns alternate, else all gate columns come first.
    """

    def ask(gate: Tensor, up: Tensor) -> Tensor:
        pair = torch.stack((gate, up), dim=-1).flatten(-2) if interleaved else torch.cat((gate, up), dim=-1)
        return activate(pair[None] if gated else gate[None])[0]

    # Small values stay clear of clamps; the context undoes those that models are built in.
    with torch.inference_mode(False), torch.device("cpu"):
        gate = torch.full((2,), _SMALL, dtype=torch.float64)
        at_zero, at_small, far = (float(ask(gate, torch.full_like(gate, up))[0]) for up in (0.0, _SMALL, _FAR))
        slope = (at_small - at_zero) / _SMALL if gated else at_zero
        if slope == 0.0 or not torch.isfinite(torch.tensor(slope)):
            return None
        offset = at_zero / slope if gated else 0.0
        reach = far / slope - offset if gated else _FAR
        limit = 0.0 if reach > _FAR / 2 else reach
        near = torch.linspace(-4, 4, 41, dtype=torch.float64) * max(1.0, limit / 2)
        gates = torch.cat((near, torch.tensor(_AWAY, dtype=torch.float64)))
        grid = gates.repeat_interleave(5)
        up = torch.tensor([-_FAR, -1.0, 0.0, 0.5, 9.0], dtype=torch.float64).repeat(len(gates))
        wanted = ask(grid, up)
        for candidate in _candidates(slope, limit, offset):
            found = candidate(grid, up if gated else None)
            if torch.allclose(found, wanted.double(), rtol=_CLOSE, atol=_CLOSE):
                return candidate
    return None


def _candidates(slope: float, limit: float, offset: float) -> list[Activation]:
    """Activations with the numbers that were read off, rounded ones first: those models are written with."""
    # silu: slope = gate * sigmoid(alpha * gate)
    share = min(max(slope / _SMALL, 1e-9), 1 - 1e-9)
    alpha = math.log(share / (1 - share)) / _SMALL
    numbers = [tuple(round(number, 3) for number in (alpha, limit, offset)), (alpha, limit, offset)]
    return [
        Activation(kind, slope if kind == "silu" else 1.0, reach, added)
        for kind in (*(kind for kind in ACTIVATIONS if kind != "silu"), "silu")  # last: steep enough it is a relu
        for slope, reach, added in numbers
    ]
