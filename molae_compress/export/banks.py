"""The weights of an experts module, latent or dense, in the one form that all lowerings read.

Everything is a view of the model's own tensors where that is possible: a copy in another layout exists only while it is
written to disk. Shape suffixes: see `molae_compress.tensors`; N width of what the second projection gives (R_out, or H
where it is dense), W stored columns of a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molae_compress.layouts import Layout
from molae_compress.modeling.bases import basis_matrix
from molae_compress.modeling.latent import LatentExperts
from molae_compress.tensors import Bank, ExpertsSpec


@dataclass(frozen=True)
class BasisTensors:
    """The bases of one side of a bank.

    Attributes:
        weight_GRW: `[G,R,H]`, or `[G,R,H-R]` with pivots.
        pivots_GR: int64 columns that form the identity, ascending; None if the basis is stored whole.
        group: experts that share a basis.
        hidden: H.
    """

    weight_GRW: Tensor
    pivots_GR: Tensor | None
    group: int
    hidden: int

    @property
    def groups(self) -> int:
        """G."""
        return self.weight_GRW.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.weight_GRW.shape[1]

    def rest_GC(self) -> Tensor:
        """[G,H-R] int64: the columns that are no pivots, ascending."""
        assert self.pivots_GR is not None
        is_rest_GH = torch.ones(self.groups, self.hidden, dtype=torch.bool).scatter(1, self.pivots_GR, False)
        return is_rest_GH.nonzero()[:, 1].view(self.groups, -1)

    def matrix_GRH(self) -> Tensor:
        """The bases written out."""
        pivots = None if self.pivots_GR is None else self.pivots_GR.reshape(-1)
        return basis_matrix(self.weight_GRW.flatten(0, 1), pivots, groups=self.groups, hidden=self.hidden)


@dataclass(frozen=True)
class BankTensors:
    """Some experts of a module, stored in one shape; see `molae_compress.modeling.cores` for what they compute.

    Attributes:
        experts: their indices in the module.
        spec: of the module, with this many experts.
        encode: input bases; None for dense experts, whose cores read the hidden state itself.
        core_ERJ: first projection, R being H for dense experts; of the gate alone where gate and up have bases of their own.
        down_ENI: second projection.
        decode: output bases; None where the second projection is dense (N is H).
        up_encode: input bases of the up projection, where it has its own.
        up_core_ERI: the up projection, where it has its own.
        bias_in_EJ: in the model's order of rows.
        bias_out_EH: at full width, after decoding.
    """

    experts: tuple[int, ...]
    spec: ExpertsSpec
    encode: BasisTensors | None
    core_ERJ: Tensor
    down_ENI: Tensor
    decode: BasisTensors | None
    up_encode: BasisTensors | None = None
    up_core_ERI: Tensor | None = None
    bias_in_EJ: Tensor | None = None
    bias_out_EH: Tensor | None = None


@dataclass(frozen=True)
class ExpertTensors:
    """All experts of a module.

    Attributes:
        spec: of the module.
        banks: of its experts; together they hold each expert once.
        activate: the model's own activation, `[N,J]` to `[N,I]`.
        after: what the model does to an expert's output `[N,H]` before routing weights are applied.
    """

    spec: ExpertsSpec
    banks: tuple[BankTensors, ...]
    activate: Callable[[Tensor], Tensor]
    after: Callable[[Tensor], Tensor] | None

    @property
    def in_place(self) -> bool:
        """Whether one bank holds all experts in the order of the module, so that indices need no translation."""
        return self.banks[0].experts == tuple(range(self.spec.num_experts))


def expert_tensors(module: nn.Module, layout: Layout, spec: ExpertsSpec) -> ExpertTensors:
    """Reads an experts module whose weights are in memory.

    Args:
        module: `LatentExperts`, or a dense module of transformers.
        layout: of the module.
        spec: its description.
    """
    if isinstance(module, LatentExperts):
        held = module.latent_tensors()
        banks = tuple(_latent_bank(bank, held) for bank in module.shape.banks(spec))
        return ExpertTensors(spec, banks, layout.activation(module.stock()), layout.after_expert(module))
    dense = layout.dense(module, spec)
    bank = BankTensors(
        tuple(range(spec.num_experts)),
        spec,
        encode=None,
        core_ERJ=dense.w_in_EJH.transpose(1, 2),
        down_ENI=dense.w_out_EHI,
        decode=None,
        bias_in_EJ=dense.bias_in_EJ,
        bias_out_EH=dense.bias_out_EH,
    )
    return ExpertTensors(spec, (bank,), dense.activate, dense.after)


def _latent_bank(bank: Bank, held: Mapping[str, Tensor]) -> BankTensors:
    own = {name.removeprefix(bank.prefix): tensor for name, tensor in held.items() if name.startswith(bank.prefix)}
    if bank.shape.form == "layer":
        return _layer_form(bank, own)
    spec, shape, E = bank.spec, bank.shape, bank.spec.num_experts

    def basis(stem: str, group: int) -> BasisTensors:
        weight, pivots, G = own[f"{stem}.weight"], own.get(f"{stem}.pivots"), E // group
        pivots_GR = None if pivots is None else pivots.unflatten(0, (G, -1)).long()
        return BasisTensors(weight.unflatten(0, (G, weight.shape[0] // G)), pivots_GR, group, spec.hidden)

    (first, core), *other = [
        (basis(stem, shape.input_group), own[f"core.{name}"].unflatten(0, (E, shape.rank_in)))
        for stem, name in shape.branches()
    ]
    return BankTensors(
        bank.experts,
        spec,
        first,
        core,
        own["core.down"].unflatten(0, (E, -1)),
        None if shape.rank_out is None else basis("decode", shape.output_group),
        up_encode=other[0][0] if other else None,
        up_core_ERI=other[0][1] if other else None,
        bias_in_EJ=own.get("core.bias"),
        bias_out_EH=own.get("decode_bias"),
    )


def _layer_form(bank: Bank, own: Mapping[str, Tensor]) -> BankTensors:
    spec, first = bank.spec, "gate_up_proj" if bank.spec.has_gate else "up_proj"
    core, down = own[f"core.{first}"], own["core.down_proj"]
    return BankTensors(
        bank.experts,
        spec,
        BasisTensors(own["encode.weight"][None], None, spec.num_experts, spec.hidden),
        core if spec.is_transposed else core.transpose(1, 2),
        down.transpose(1, 2) if spec.is_transposed else down,
        BasisTensors(own["decode.weight"].T[None], None, spec.num_experts, spec.hidden),
        bias_in_EJ=own.get(f"core.{first}_bias"),
        bias_out_EH=own.get("decode_bias"),
    )
