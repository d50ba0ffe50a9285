"""What one process of several holds of a latent experts module, and where that lies in the stored tensors.

Two ways of splitting are known, alone or together. Under expert parallelism a process has some of the experts whole, and a
token's other experts are strangers to it. Under tensor parallelism it has some of the channels between the two projections
of every expert: bases are the same everywhere, and what the processes compute adds up, because everything after the
activation is linear. Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from molae_compress.tensors import AnyShape, Bank, BankedShape, ExpertsSpec, LatentShape

Runs = tuple[range, ...]


@dataclass(frozen=True)
class Share:
    """The part of an experts module that a process holds.

    Attributes:
        experts: indices in the whole module, ascending.
        channels: those of the I channels that it computes.
        adds_bias: the output biases, which have no channels, are this process' to add.
    """

    experts: tuple[int, ...]
    channels: range
    adds_bias: bool = True


@dataclass(frozen=True)
class Cut:
    """Where a tensor of a share lies: the stored tensor, and what of each of its dimensions is put together."""

    stored: str
    parts: tuple[Runs, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is cut out."""
        return tuple(sum(map(len, runs)) for runs in self.parts)


def whole_share(spec: ExpertsSpec) -> Share:
    """Everything, for a process that is alone."""
    return Share(tuple(range(spec.num_experts)), range(spec.intermediate))


def cut_layer_form(spec: ExpertsSpec, shape: LatentShape, share: Share) -> dict[str, Cut]:
    """The tensors of a share of an experts module in layer form, by the names of `LatentShape.tensors`."""
    experts, rows_J = runs_of(share.experts), _rows_of(spec, share)
    wide = {"core.gate_up_proj": 2 if spec.is_transposed else 1, "core.down_proj": 1 if spec.is_transposed else 2}
    wide |= {"core.up_proj": wide["core.gate_up_proj"], "core.gate_up_proj_bias": 1, "core.up_proj_bias": 1}
    cuts = {}
    for name, size in shape.tensors(spec).items():
        parts: list[Runs] = [(range(length),) for length in size]
        if name.startswith(("core.", "decode_bias")):
            parts[0] = experts
        if name in wide:
            parts[wide[name]] = (share.channels,) if name == "core.down_proj" else rows_J
        cuts[name] = Cut(name, tuple(parts))
    return cuts


def cut_grouped_form(spec: ExpertsSpec, shape: AnyShape, share: Share) -> tuple[ExpertsSpec, AnyShape, dict[str, Cut]]:
    """A share of an experts module in grouped form: what it is, how it is stored, and where its tensors lie.

    Args:
        spec: the whole module.
        shape: how that is stored.
        share: what is wanted of it.

    Returns:
        The whole module's spec with the channels of the share: experts keep their indices. The shape of the share: that of
        the module if it has all experts, else banks that lack some. A cut for each tensor of that shape.
    """
    own = set(share.experts)
    is_whole = len(own) == spec.num_experts
    members: list[tuple[int, ...]] = []
    shapes: list[LatentShape] = []
    cuts: dict[str, Cut] = {}
    for bank in shape.banks(spec):
        places = [place for place, expert in enumerate(bank.experts) if expert in own]
        if places:
            prefix = bank.prefix if is_whole else f"bank_{len(members)}."
            part, found = _cut_bank(bank, places, share)
            cuts |= {f"{prefix}{name}": piece for name, piece in found.items()}
            members.append(tuple(bank.experts[place] for place in places))
            shapes.append(part)
    banked = BankedShape(tuple(members), tuple(shapes))
    return replace(spec, intermediate=len(share.channels)), shape if is_whole else banked, cuts


def _cut_bank(bank: Bank, places: Sequence[int], share: Share) -> tuple[LatentShape, dict[str, Cut]]:
    """The shape of the experts at some places of a bank, and their tensors by names without a prefix."""
    experts = bank.spec.num_experts
    input_groups, input_group = _groups_of(places, bank.shape.input_group)
    output_groups, output_group = _groups_of(places, bank.shape.output_group)
    columns = {"core.gate_up": _rows_of(bank.spec, share), "core.bias": _rows_of(bank.spec, share)}
    columns |= dict.fromkeys(("core.gate", "core.up", "core.down"), (share.channels,))
    cuts = {}
    for name, size in bank.shape.tensors(bank.spec).items():
        stem = name.partition(".")[0]
        blocks, stored = places, experts
        if stem == "decode":
            blocks, stored = output_groups, experts // bank.shape.output_group
        elif stem.endswith("encode"):
            blocks, stored = input_groups, experts // bank.shape.input_group
        height = size[0] // stored
        rows = tuple(range(run.start * height, run.stop * height) for run in runs_of(blocks))
        cuts[name] = Cut(f"{bank.prefix}{name}", (rows, *(columns.get(name, (range(width),)) for width in size[1:])))
    return replace(bank.shape, input_group=input_group, output_group=output_group), cuts


def _groups_of(places: Sequence[int], size: int) -> tuple[list[int], int]:
    """The groups that experts at some places need, in their order, and how many of these experts each serves.

    Where the groups are left with different numbers of experts, every expert gets a copy of its basis.
    """
    groups = [place // size for place in places]
    distinct = sorted(set(groups))
    counts = {groups.count(group) for group in distinct}
    return (distinct, counts.pop()) if len(counts) == 1 else (groups, 1)


def _rows_of(spec: ExpertsSpec, share: Share) -> Runs:
    """The rows of the first projection that feed the channels of a share, in the model's own order."""
    channels = spec.channel_of_row().tolist()
    return runs_of(row for row, channel in enumerate(channels) if channel in share.channels)


def runs_of(indices: Iterable[int]) -> Runs:
    """Ascending indices as runs of neighbours."""
    runs = []
    for _, neighbours in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        run = [index for _, index in neighbours]
        runs.append(range(run[0], run[-1] + 1))
    return tuple(runs)
