"""The tensors of one bank of a latent module as the solver fills them: bases and cores, in the storage `LatentShape` names.

Bases are rounded to the output dtype as they are stored, and read back rounded, so that what is fitted on top of them
already knows the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from molae_compress.solver.basis import interpolated, interpolative, orthonormal_rows
from molae_compress.tensors import PIVOT_DTYPE, AnyShape, Bank, ExpertsSpec, LatentShape


def branch_rows(spec: ExpertsSpec, shape: LatentShape, device: torch.device | str) -> list[Tensor | slice]:
    """For each input branch, an index of the rows of the first projection it makes; channel order for separate bases."""
    if shape.gate_up == "joint":
        return [slice(None)]
    assert spec.has_gate
    return [rows_X.to(device) for rows_X in spec.gate_rows()]


class Packed:
    """Tensors of one bank, named as `LatentShape.tensors`, by group and by the module's own index of an expert.

    Matrices come in canonical orientation.
    """

    def __init__(self, bank: Bank, tensors: Mapping[str, Tensor]) -> None:
        self.spec, self.shape, self.experts, self.tensors = bank.spec, bank.shape, bank.experts, dict(tensors)
        self._place = {expert: place for place, expert in enumerate(bank.experts)}

    @classmethod
    def empty(cls, bank: Bank, dtype: torch.dtype, device: torch.device | str) -> Packed:
        """Tensors to be filled: floats in `dtype`, pivots as integers."""
        tensors = {
            name: torch.empty(size, dtype=PIVOT_DTYPE if name.endswith(".pivots") else dtype, device=device)
            for name, size in bank.shape.tensors(bank.spec).items()
        }
        return cls(bank, tensors)

    @classmethod
    def all_of(cls, spec: ExpertsSpec, shape: AnyShape, tensors: Mapping[str, Tensor]) -> dict[int, Packed]:
        """The bank of each expert of a module, from tensors named as `shape.tensors`."""
        found: dict[int, Packed] = {}
        for bank in shape.banks(spec):
            own = {name.removeprefix(bank.prefix): value for name, value in tensors.items() if name.startswith(bank.prefix)}
            packed = cls(bank, own)
            found |= dict.fromkeys(bank.experts, packed)
        return found

    def groups(self, size: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Number and experts of every group of `size`."""
        return ((start // size, self.experts[start : start + size]) for start in range(0, len(self.experts), size))

    def set_basis(self, stem: str, group: int, b_RH: Tensor) -> Tensor:
        """Stores the row space of `b_RH` as the basis of a group; returns the basis as stored, [R,H] float32 or wider."""
        rank = b_RH.shape[0]
        rows = slice(group * rank, (group + 1) * rank)
        weight = self.tensors[f"{stem}.weight"]
        if self.shape.storage == "interpolative":
            pivots_R, rest_RX = interpolative(b_RH)
            weight[rows], self.tensors[f"{stem}.pivots"][rows] = rest_RX.to(weight.dtype), pivots_R.to(PIVOT_DTYPE)
        elif self.shape.form == "layer" and stem == "decode":
            weight.copy_(orthonormal_rows(b_RH).T)
        else:
            weight[rows] = orthonormal_rows(b_RH).to(weight.dtype)
        return self.basis(stem, group, rank)

    def basis(self, stem: str, group: int, rank: int) -> Tensor:
        """[R,H]: a group's stored basis, in float32 (float64 if stored so)."""
        rows = slice(group * rank, (group + 1) * rank)
        weight = self.tensors[f"{stem}.weight"]
        wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
        if self.shape.form == "layer" and stem == "decode":
            return weight.T.to(wide)
        if self.shape.storage == "interpolative":
            return interpolated(self.tensors[f"{stem}.pivots"][rows], weight[rows].to(wide))
        return weight[rows].to(wide)

    def core(self, stem: str, expert: int) -> Tensor:
        """View of an expert's core: [rows,R] on the input side, [R,I] for `down`."""
        spec, shape = self.spec, self.shape
        if shape.form == "layer":
            name = "core.down_proj" if stem == "down" else "core.gate_up_proj" if spec.has_gate else "core.up_proj"
            core = self.tensors[name][self._place[expert]]
            return core.T if spec.is_transposed else core
        flat = self.tensors[f"core.{stem}"]
        rank, place = flat.shape[0] // spec.num_experts, self._place[expert]
        core = flat[place * rank : (place + 1) * rank]
        return core if stem == "down" else core.T

    def set_biases(self, bias_in_EJ: Tensor, bias_out_EH: Tensor) -> None:
        """Copies the dense biases, which stay at full width."""
        first = "gate_up_proj" if self.spec.has_gate else "up_proj"
        experts = list(self.experts)
        self.tensors[f"core.{first}_bias" if self.shape.form == "layer" else "core.bias"].copy_(bias_in_EJ[experts])
        self.tensors["decode_bias"].copy_(bias_out_EH[experts])

    def intermediate(self, expert: int, x_NH: Tensor, bias_J: Tensor | None) -> Tensor:
        """[N,J] in the dtype of `x_NH`: the first projection of the stored latent expert, before the activation."""
        parts = []
        for stem, core in self.shape.branches():
            basis_RH = self.basis(stem, self._place[expert] // self.shape.input_group, self.shape.rank_in).to(x_NH.dtype)
            parts.append((x_NH @ basis_RH.T) @ self.core(core, expert).T.to(x_NH.dtype))
        h_NJ = parts[0]
        if len(parts) > 1:
            h_NJ = torch.empty(len(x_NH), self.spec.rows, dtype=x_NH.dtype, device=x_NH.device)
            for rows, part_NX in zip(branch_rows(self.spec, self.shape, x_NH.device), parts, strict=True):
                h_NJ[:, rows] = part_NX
        return h_NJ if bias_J is None else h_NJ + bias_J.to(x_NH.dtype)

    def output(self, expert: int, z_NI: Tensor) -> Tensor:
        """[N,H]: the second projection of the stored latent expert, without the output bias."""
        u_NR = z_NI @ self.core("down", expert).T.to(z_NI.dtype)
        if self.shape.rank_out is None:
            return u_NR
        return u_NR @ self.basis("decode", self._place[expert] // self.shape.output_group, self.shape.rank_out).to(
            z_NI.dtype
        )
