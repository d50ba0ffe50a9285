"""What the rest of the package agrees on: one experts module before (`DenseExperts`) and after (`LatentShape`) compression.

Free of architecture, files and devices. Shape suffixes used throughout the package:
    T tokens   K experts per token   S = T*K routed slots   E experts   G groups of experts
    H hidden size   I expert intermediate size   J rows of the first projection: 2I with a gate, I without
    R rank (latent width)
Dense weights are kept in one canonical orientation, whatever the model class stores: `w_in [E,J,H]`, `w_out [E,H,I]`;
the J rows stay in the model's own order (gate rows then up rows, or interleaved), because the model's own gate reads them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from molae_compress.errors import ModelError

Form = Literal["layer", "grouped"]
GateUp = Literal["joint", "separate"]
Storage = Literal["orthonormal", "interpolative"]
PIVOT_DTYPE = torch.int32


@dataclass(frozen=True)
class ExpertsSpec:
    """One routed-experts module, described without reference to its class.

    Attributes:
        name: module path inside the model, e.g. `model.layers.3.mlp.experts`.
        layer: index of the decoder layer that holds it.
        num_experts: E.
        hidden: H, the width the experts read and write.
        intermediate: I, the width between the two projections.
        has_gate: the first projection holds gate and up rows (J = 2I); without a gate J = I.
        has_bias: both projections carry a bias per expert.
        is_transposed: the class stores `[E,H,J]` and `[E,I,H]`, and so does the core of the layer form.
        interleaved: gate and up rows alternate instead of following each other.
        has_output_norm: the output of each expert is normalised before routing weights are applied, so it must be decoded
            before they are.
        top_k: K, experts per token.
    """

    name: str
    layer: int
    num_experts: int
    hidden: int
    intermediate: int
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    interleaved: bool = False
    has_output_norm: bool = False
    top_k: int = 1

    @property
    def rows(self) -> int:
        """J: rows of the first projection."""
        return 2 * self.intermediate if self.has_gate else self.intermediate

    @property
    def dense_numel(self) -> int:
        """Numbers in the dense weights of the module, biases included."""
        weights = self.num_experts * self.hidden * (self.rows + self.intermediate)
        return weights + (self.num_experts * (self.rows + self.hidden) if self.has_bias else 0)

    def channel_of_row(self) -> Tensor:
        """[J] int64: the intermediate channel that each row of the first projection feeds."""
        rows_J = torch.arange(self.rows)
        return rows_J // 2 if self.has_gate and self.interleaved else rows_J % self.intermediate

    def gate_rows(self) -> tuple[Tensor, Tensor]:
        """Indices of the gate rows [I] and of the up rows [I], each in channel order."""
        channels_I = torch.arange(self.intermediate)
        return (2 * channels_I, 2 * channels_I + 1) if self.interleaved else (channels_I, channels_I + self.intermediate)


@dataclass
class DenseExperts:
    """The weights of one experts module in canonical orientation, and the model's own activation.

    `activate` maps the first projection's output `[N,J]` to `[N,I]` with the model's own gate, clamps and limits; `after`,
    where there is one, is what the model does to an expert's output `[N,H]` before routing weights are applied.
    """

    spec: ExpertsSpec
    w_in_EJH: Tensor
    w_out_EHI: Tensor
    activate: Callable[[Tensor], Tensor]
    bias_in_EJ: Tensor | None = None
    bias_out_EH: Tensor | None = None
    after: Callable[[Tensor], Tensor] | None = None

    def intermediate(self, expert: int, x_NH: Tensor) -> Tensor:
        """[N,I]: what expert `expert` computes before its second projection, in the dtype of `x_NH`."""
        h_NJ = x_NH @ self.w_in_EJH[expert].to(x_NH.dtype).T
        if self.bias_in_EJ is not None:
            h_NJ = h_NJ + self.bias_in_EJ[expert].to(x_NH.dtype)
        return self.activate(h_NJ)

    def output(self, expert: int, z_NI: Tensor) -> Tensor:
        """[N,H]: what expert `expert` makes of its intermediates, before `after`, in the dtype of `z_NI`."""
        y_NH = z_NI @ self.w_out_EHI[expert].to(z_NI.dtype).T
        return y_NH if self.bias_out_EH is None else y_NH + self.bias_out_EH[expert].to(z_NI.dtype)


class _Stored(ABC):
    """What follows from the names and shapes of the tensors alone."""

    @abstractmethod
    def tensors(self, spec: ExpertsSpec) -> dict[str, tuple[int, ...]]:
        """Every tensor of the latent module: name relative to it -> shape. `*.pivots` are int32, all others float."""

    def numel(self, spec: ExpertsSpec) -> int:
        """Numbers stored for the module, bases, column indices and biases included."""
        return sum(torch.Size(shape).numel() for shape in self.tensors(spec).values())

    def nbytes(self, spec: ExpertsSpec, dtype: torch.dtype) -> int:
        """Bytes stored for the module when its floating-point tensors have type `dtype`."""
        return sum(
            torch.Size(shape).numel() * (PIVOT_DTYPE if name.endswith(".pivots") else dtype).itemsize
            for name, shape in self.tensors(spec).items()
        )


@dataclass(frozen=True)
class LatentShape(_Stored):
    """How one experts module is stored once compressed: an entry of `quantization_config["modules"]`.

    Attributes:
        form: `layer` (encode, the model's own experts class at width R, decode; one group a side, rank_in == rank_out)
            or `grouped` (bases shared by groups of neighbouring experts, down to one expert).
        rank_in: R of the input side (per branch if gate and up have separate bases).
        rank_out: R of the output side; None leaves the second projection dense.
        input_group: experts per input group; group of expert e is e // input_group.
        output_group: experts per output group.
        gate_up: `joint` (one input basis for gate and up) or `separate`.
        storage: `orthonormal` (a basis is R x H numbers) or `interpolative` (R of its columns are the identity and are
            not stored: R x (H-R) numbers and R column indices).
    """

    form: Form
    rank_in: int
    rank_out: int | None
    input_group: int
    output_group: int
    gate_up: GateUp = "joint"
    storage: Storage = "orthonormal"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as written into `config.json`."""
        return asdict(self)

    def banks(self, spec: ExpertsSpec) -> tuple[Bank, ...]:
        """The one bank that holds all experts."""
        return (Bank("", tuple(range(spec.num_experts)), spec, self),)

    def branches(self) -> tuple[tuple[str, str], ...]:
        """(basis, core) tensor stems of the input side: one pair, or one each for gate and up."""
        if self.gate_up == "separate":
            # Not `encode_gate`: a loader of transformers takes names that end in `gate.weight` for a router.
            return ("gate_encode", "gate"), ("up_encode", "up")
        return (("encode", "gate_up"),)

    def tensors(self, spec: ExpertsSpec) -> dict[str, tuple[int, ...]]:
        """Every tensor of the latent module: name relative to the module -> shape. `*.pivots` are int32, all others float.

        Layer form uses the layout and names of the model's own class. In grouped form every tensor is 2-D with
        the latent dimension, concatenated over groups or experts, in front.
        """
        return self._layer_tensors(spec) if self.form == "layer" else self._grouped_tensors(spec)

    def _layer_tensors(self, spec: ExpertsSpec) -> dict[str, tuple[int, ...]]:
        E, H, I, J, R = spec.num_experts, spec.hidden, spec.intermediate, spec.rows, self.rank_in
        first = "gate_up_proj" if spec.has_gate else "up_proj"
        out: dict[str, tuple[int, ...]] = {
            "encode.weight": (R, H),
            f"core.{first}": (E, R, J) if spec.is_transposed else (E, J, R),
            "core.down_proj": (E, I, R) if spec.is_transposed else (E, R, I),
            "decode.weight": (H, R),
        }
        if spec.has_bias:
            out[f"core.{first}_bias"] = (E, J)
            out["decode_bias"] = (E, H)
        return out

    def _grouped_tensors(self, spec: ExpertsSpec) -> dict[str, tuple[int, ...]]:
        E, H, I, J = spec.num_experts, spec.hidden, spec.intermediate, spec.rows
        out: dict[str, tuple[int, ...]] = {}
        for basis, core in self.branches():
            out |= self._basis_tensors(basis, E // self.input_group, self.rank_in, H)
            out[f"core.{core}"] = (E * self.rank_in, J if self.gate_up == "joint" else I)
        out["core.down"] = (E * (H if self.rank_out is None else self.rank_out), I)
        if self.rank_out is not None:
            out |= self._basis_tensors("decode", E // self.output_group, self.rank_out, H)
        if spec.has_bias:
            out["core.bias"] = (E, J)
            out["decode_bias"] = (E, H)
        return out

    def _basis_tensors(self, stem: str, G: int, R: int, H: int) -> dict[str, tuple[int, ...]]:
        if self.storage == "orthonormal":
            return {f"{stem}.weight": (G * R, H)}
        return {f"{stem}.weight": (G * R, H - R), f"{stem}.pivots": (G * R,)}


@dataclass(frozen=True)
class Bank:
    """Some experts of a module, stored in one shape.

    Attributes:
        prefix: of the names of their tensors; empty where one bank holds all experts.
        experts: indices in the module, in the order in which they are stored: groups are neighbours in it.
        spec: that of the module, with this many experts.
        shape: how they are stored.
    """

    prefix: str
    experts: tuple[int, ...]
    spec: ExpertsSpec
    shape: LatentShape


@dataclass(frozen=True)
class BankedShape(_Stored):
    """How an experts module is stored whose experts are not all of one rank: in banks of one shape each.

    Attributes:
        members: experts of each bank, in the order in which they are stored; every expert is in one bank.
        shapes: of the banks, in grouped form; groups divide the experts of their bank.
    """

    members: tuple[tuple[int, ...], ...]
    shapes: tuple[LatentShape, ...]

    def banks(self, spec: ExpertsSpec) -> tuple[Bank, ...]:
        """The banks, with the description of the experts in each."""
        return tuple(
            Bank(f"bank_{number}.", experts, replace(spec, num_experts=len(experts)), shape)
            for number, (experts, shape) in enumerate(zip(self.members, self.shapes, strict=True))
        )

    def tensors(self, spec: ExpertsSpec) -> dict[str, tuple[int, ...]]:
        """Those of all banks, by name relative to the module."""
        banks = self.banks(spec)
        return {f"{bank.prefix}{name}": size for bank in banks for name, size in bank.shape.tensors(bank.spec).items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as written into `config.json`."""
        pairs = zip(self.members, self.shapes, strict=True)
        return {"banks": [{"experts": list(experts), **shape.to_dict()} for experts, shape in pairs]}


AnyShape = LatentShape | BankedShape


def shape_from_dict(entry: dict[str, Any], *, name: str) -> AnyShape:
    """Reads an entry of `config.json`; unknown or missing fields raise `ModelError`."""
    try:
        if "banks" not in entry:
            return LatentShape(**entry)
        parts = [dict(part) for part in entry["banks"]]
        members = tuple(tuple(int(expert) for expert in part.pop("experts")) for part in parts)
        shapes = tuple(LatentShape(**part) for part in parts)
    except (TypeError, KeyError, ValueError) as error:
        raise ModelError(
            f"The quantization_config entry of '{name}' cannot be read ({error}).",
            why="It was written by another version of molae_compress, or edited.",
            remedy="Install the version named in the artifact's config.json, or compress the model again.",
        ) from error
    return BankedShape(members, shapes)
