"""Random latent tensors: the start of a model that is trained with latent experts instead of being compressed into them.

Scales are chosen so that every activation has the variance which it has in the dense model of the same family. A dense
projection has entries of variance s^2, whatever the family's rule makes that. In latent form it is `core @ basis`, and both
storages of a basis give the product entries of that very variance:

- orthonormal: the basis has orthonormal rows, so entries of mean square 1/H; the core has entries of variance s^2 H/R. Then
  `z` has the mean square of the coordinates of `x`.
- interpolative: R coordinates pass as they are, at columns drawn by chance, and the others through entries of variance 1/R;
  the core has entries of variance s^2. Every coordinate of `x` then counts the same.

Biases are the family's own. Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from molae_compress.tensors import PIVOT_DTYPE, AnyShape, Bank, DenseExperts, ExpertsSpec, LatentShape


def random_tensors(dense: DenseExperts, shape: AnyShape) -> dict[str, Tensor]:
    """The tensors of `shape.tensors(dense.spec)`, drawn from torch's global generator, in float32 on the CPU.

    Args:
        dense: experts as the model's own class initialises them; of their weights only the scales are read.
        shape: the form to fill.
    """
    spec = dense.spec
    rows_J = _row_scales(dense)
    scale_out = _scale(dense.w_out_EHI)
    tensors: dict[str, Tensor] = {}
    for bank in shape.banks(spec):
        fill = _of_layer_form if bank.shape.form == "layer" else _of_grouped_form
        own = fill(bank, rows_J, scale_out)
        if spec.has_bias:
            assert dense.bias_in_EJ is not None
            assert dense.bias_out_EH is not None
            first = f"core.{_first(spec)}_bias" if bank.shape.form == "layer" else "core.bias"
            experts = list(bank.experts)
            own |= {first: dense.bias_in_EJ[experts].float(), "decode_bias": dense.bias_out_EH[experts].float()}
        tensors |= {f"{bank.prefix}{name}": tensor.cpu() for name, tensor in own.items()}
    return tensors


def core_gain(shape: LatentShape, rank: int, hidden: int) -> float:
    """Standard deviation of a core's entries over that of the dense projection's."""
    return 1.0 if shape.storage == "interpolative" else math.sqrt(hidden / rank)


def _of_grouped_form(bank: Bank, rows_J: Tensor, scale_out: float) -> dict[str, Tensor]:
    spec, shape = bank.spec, bank.shape
    E, H, I = spec.num_experts, spec.hidden, spec.intermediate
    tensors: dict[str, Tensor] = {}
    row_sets = spec.gate_rows() if shape.gate_up == "separate" else (torch.arange(spec.rows),)
    for (basis, core), rows in zip(shape.branches(), row_sets, strict=True):
        tensors |= _basis(basis, shape, E // shape.input_group, shape.rank_in, H)
        scales = rows_J[rows] * core_gain(shape, shape.rank_in, H)
        tensors[f"core.{core}"] = torch.randn(E * shape.rank_in, len(rows)) * scales
    if shape.rank_out is None:
        tensors["core.down"] = torch.randn(E * H, I) * scale_out
    else:
        tensors["core.down"] = torch.randn(E * shape.rank_out, I) * scale_out * core_gain(shape, shape.rank_out, H)
        tensors |= _basis("decode", shape, E // shape.output_group, shape.rank_out, H)
    return tensors


def _of_layer_form(bank: Bank, rows_J: Tensor, scale_out: float) -> dict[str, Tensor]:
    spec, R = bank.spec, bank.shape.rank_in
    E, H, I = spec.num_experts, spec.hidden, spec.intermediate
    gain = core_gain(bank.shape, R, H)
    core_EJR = torch.randn(E, spec.rows, R) * rows_J[:, None] * gain
    core_ERI = torch.randn(E, R, I) * scale_out * gain
    return {
        "encode.weight": _orthonormal_rows(R, H),
        f"core.{_first(spec)}": core_EJR.transpose(1, 2) if spec.is_transposed else core_EJR,
        "core.down_proj": core_ERI.transpose(1, 2) if spec.is_transposed else core_ERI,
        "decode.weight": _orthonormal_rows(R, H).T,
    }


def _basis(stem: str, shape: LatentShape, groups: int, rank: int, hidden: int) -> dict[str, Tensor]:
    if shape.storage == "orthonormal":
        return {f"{stem}.weight": torch.cat([_orthonormal_rows(rank, hidden) for _ in range(groups)])}
    pivots = torch.cat([torch.randperm(hidden)[:rank].sort().values for _ in range(groups)])
    weight = torch.randn(groups * rank, hidden - rank) / math.sqrt(rank)
    return {f"{stem}.weight": weight, f"{stem}.pivots": pivots.to(PIVOT_DTYPE)}


def _orthonormal_rows(rank: int, hidden: int) -> Tensor:
    """[R,H], uniform among all such matrices."""
    q_HR, r_RR = torch.linalg.qr(torch.randn(hidden, rank))
    rows_RH: Tensor = (q_HR * r_RR.diagonal().sign()).T
    return rows_RH


def _row_scales(dense: DenseExperts) -> Tensor:
    """[J] standard deviation of the entries of each row of the first projection: one for gate rows, one for up rows."""
    spec = dense.spec
    scales_J = torch.empty(spec.rows)
    for rows in spec.gate_rows() if spec.has_gate else (torch.arange(spec.rows),):
        scales_J[rows] = _scale(dense.w_in_EJH[:, rows.to(dense.w_in_EJH.device)])
    return scales_J


def _scale(weight: Tensor) -> float:
    return float(weight.float().square().mean().sqrt())


def _first(spec: ExpertsSpec) -> str:
    return "gate_up_proj" if spec.has_gate else "up_proj"
