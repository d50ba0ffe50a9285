"""The latent experts module: what a compressed model holds in place of a stock experts module.

    z = encode[group_in(e)] x;   h = gate(core_in[e] z);   u = core_out[e] h;   y = sum_e w_e decode[group_out(e)] u

Nothing of the architecture is written again: activation, clamps and interleaving come from the stock module, of which
only the large parameters go. Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor, nn

from molae_compress.errors import ModelError
from molae_compress.modeling.bases import Basis
from molae_compress.modeling.cores import GroupedCore, layer_core
from molae_compress.modeling.routed import Route, make_route
from molae_compress.stock import bare_copy
from molae_compress.tensors import ExpertsSpec, Form, GateUp, LatentShape, Storage

LAYER_RANK = 8  # stock experts classes compute with kernels that take no other widths in 16 bit


class LatentExperts(nn.Module):
    """Latent experts with the calling contract of every stock experts module of transformers.

    Make one with `from_stock`; its tensors are named as in `LatentShape.tensors`.

    Attributes:
        spec: the experts module it stands for.
        shape: how it is stored.
        config: the model's configuration, which names the experts implementation.
        num_experts: E.
    """

    encode: nn.Module
    core: nn.Module
    decode: nn.Module
    decode_bias: Tensor | None

    def __init__(self, experts: nn.Module, spec: ExpertsSpec, shape: LatentShape) -> None:
        super().__init__()
        self.spec, self.shape, self.num_experts = spec, shape, spec.num_experts
        self.config: Any = experts.__dict__["config"]
        # Set past nn.Module: the model must neither save, initialise nor wrap what is left of the stock module.
        self.__dict__["_stock"] = bare_copy(experts)
        like = next(experts.parameters())
        if shape.form == "layer":
            for name, sizes in (("encode", (spec.hidden, shape.rank_in)), ("decode", (shape.rank_in, spec.hidden))):
                self.add_module(name, nn.Linear(*sizes, bias=False, device=like.device, dtype=like.dtype))
            self.core = layer_core(experts, spec, shape)
        else:
            for name, _ in shape.branches():
                self.add_module(name, self._basis(like, shape.input_group, shape.rank_in, decode=False))
            self.core = GroupedCore(experts, spec, shape)
            if shape.rank_out is not None:
                self.decode = self._basis(like, shape.output_group, shape.rank_out, decode=True)
        bias = nn.Parameter(like.new_empty(spec.num_experts, spec.hidden)) if spec.has_bias else None
        self.register_parameter("decode_bias", bias)

    @classmethod
    def from_stock(cls, experts: nn.Module, spec: ExpertsSpec, shape: LatentShape) -> LatentExperts:
        """A module with empty parameters, on the stock module's device (meta included) and of its type.

        Args:
            experts: the stock module; it is left as it is.
            spec: its description.
            shape: the form to build.

        Raises:
            ModelError: `shape` does not fit `spec`.
        """
        check_shape(spec, shape)
        return cls(experts, spec, shape)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T,H] from `hidden_states [T,H]`, the experts of each token `[T,K]` and their routing weights `[T,K]`."""
        if self.shape.form == "layer":
            y_TH: Tensor = self.decode(self.core(self.encode(hidden_states), top_k_index, top_k_weights))
        else:
            y_TH = self._grouped(hidden_states, top_k_index, top_k_weights)
        if self.decode_bias is not None:
            # One row of routing weights per token: cheaper than gathering a bias for every slot.
            routing_TE = top_k_weights.new_zeros(top_k_index.shape[0], self.num_experts)
            routing_TE = routing_TE.scatter_add(1, top_k_index, top_k_weights)
            y_TH = y_TH + routing_TE.to(y_TH.dtype) @ self.decode_bias
        return y_TH.to(hidden_states.dtype)

    def load_latent_(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes copies of the tensors of `LatentShape.tensors`, of the module's type and on its device.

        A module on meta takes them where they are.

        Raises:
            ModelError: a tensor is missing, unknown or of another shape, or pivots do not ascend inside their group.
        """
        check_tensors(self.spec, self.shape, tensors)
        device = next(self.parameters()).device
        for name, tensor in tensors.items():
            parent, _, leaf = name.rpartition(".")
            holder = self.get_submodule(parent)
            old = getattr(holder, leaf)
            place = tensor.device if device.type == "meta" else device
            value = tensor.detach().to(device=place, dtype=old.dtype, copy=True)
            # Replaced instead of written into: what is on meta holds no memory.
            setattr(holder, leaf, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)
        self.finish_loading_()

    def finish_loading_(self) -> None:
        """Sets what is not stored but follows from the shape and the stored tensors."""
        for module in self.modules():
            if isinstance(module, Basis):
                module.prepare()
        if self.shape.form == "layer" and self.spec.has_bias:
            zeros_ER = self.core.get_buffer("down_proj_bias")
            if zeros_ER.is_meta:
                zeros_ER = zeros_ER.new_empty(zeros_ER.shape, device=self.core.get_parameter("down_proj").device)
            self.core.down_proj_bias = zeros_ER.zero_()

    def latent_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the names of `LatentShape.tensors`, detached."""
        held = self.state_dict()
        return {name: held[name] for name in self.shape.tensors(self.spec)}

    def stock(self) -> nn.Module:
        """The stock experts module that this one stands for, without parameters."""
        return bare_copy(self.__dict__["_stock"])

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        rank_out = "dense" if self.shape.rank_out is None else self.shape.rank_out
        return f"experts={self.num_experts}, form={self.shape.form}, rank_in={self.shape.rank_in}, rank_out={rank_out}"

    def _grouped(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        route = make_route(index_TK, self.num_experts, self.config._experts_implementation)
        bases = [getattr(self, basis) for basis, _ in self.shape.branches()]
        if self.shape.input_group == self.num_experts:  # one basis: each token is encoded once for all its experts
            latent_SR = tuple(basis(x_TH)[route.token_S] for basis in bases)
        else:
            x_SH = x_TH[route.token_S]
            latent_SR = tuple(basis(x_SH, route) for basis in bases)
        u_SN = self.core(latent_SR, route)
        if self.shape.rank_out is None:
            return _routed_sum(u_SN, weight_TK, route)
        if self.shape.output_group == self.num_experts:  # one basis: the routed sum is decoded once for each token
            y_TH: Tensor = self.decode(_routed_sum(u_SN, weight_TK, route))
            return y_TH
        return _routed_sum(self.decode(u_SN, route), weight_TK, route)

    def _basis(self, like: Tensor, size: int, rank: int, *, decode: bool) -> Basis:
        return Basis(
            self.spec.num_experts // size,
            size,
            rank,
            self.spec.hidden,
            self.shape.storage,
            decode=decode,
            device=like.device,
            dtype=like.dtype,
        )


def _routed_sum(y_SN: Tensor, weight_TK: Tensor, route: Route) -> Tensor:
    """[T,N]: rows of a token's experts, weighted by its routing and summed."""
    y_TKN = route.restore(y_SN, weight_TK.shape[1])
    return (y_TKN * weight_TK[..., None]).sum(dim=1).to(y_SN.dtype)


def check_shape(spec: ExpertsSpec, shape: LatentShape) -> None:
    """Raises `ModelError` unless the latent shape fits the experts module it stands for."""
    ranks = {"rank_in": shape.rank_in} | ({} if shape.rank_out is None else {"rank_out": shape.rank_out})
    groups = {"input_group": shape.input_group, "output_group": shape.output_group}
    problems = [
        f"{name} is {value!r}, which is not one of {', '.join(get_args(allowed))}"
        for name, value, allowed in (
            ("form", shape.form, Form),
            ("gate_up", shape.gate_up, GateUp),
            ("storage", shape.storage, Storage),
        )
        if value not in get_args(allowed)
    ]
    problems += [
        f"{name} is {rank!r}, which is not between 1 and the hidden size {spec.hidden}"
        for name, rank in ranks.items()
        if not (isinstance(rank, int) and 1 <= rank <= spec.hidden)
    ]
    problems += [
        f"{name} is {size!r}, which does not divide the {spec.num_experts} experts"
        for name, size in groups.items()
        if not (isinstance(size, int) and size >= 1 and spec.num_experts % size == 0)
    ]
    if shape.gate_up == "separate" and not spec.has_gate:
        problems.append("gate_up is separate, but the experts have no gate")
    one_group = shape.input_group == shape.output_group == spec.num_experts
    plain = shape.gate_up == "joint" and shape.storage == "orthonormal"
    if shape.form == "layer" and not (one_group and plain and shape.rank_in == shape.rank_out):
        problems.append("the layer form has one orthonormal joint basis a side, of equal ranks")
    elif shape.form == "layer" and shape.rank_in % LAYER_RANK and shape.rank_in != spec.hidden:
        problems.append(f"the fused kernels of the layer form: {shape.rank_in} is not a multiple of {LAYER_RANK}")
    if problems:
        raise ModelError(f"The latent shape of '{spec.name}' is impossible: {'; '.join(problems)}.")


def check_tensors(spec: ExpertsSpec, shape: LatentShape, tensors: Mapping[str, Tensor]) -> None:
    """Raises `ModelError` unless `tensors` are those of `shape.tensors(spec)`, with valid pivots."""
    wanted = shape.tensors(spec)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        listed = "; ".join(f"{name} is {found.get(name)}, expected {wanted.get(name)}" for name in wrong)
        raise ModelError(f"The latent tensors of '{spec.name}' do not fit its shape: {listed}.")
    for name, pivots in tensors.items():
        if not name.endswith(".pivots"):
            continue
        rank = shape.rank_out if name.startswith("decode") else shape.rank_in
        assert rank is not None
        pivots_GR = pivots.view(-1, rank)
        ascending = bool((pivots_GR.diff(dim=1) > 0).all())
        if not ascending or int(pivots_GR.min()) < 0 or int(pivots_GR.max()) >= spec.hidden:
            raise ModelError(
                f"The column indices '{spec.name}.{name}' do not ascend between 0 and {spec.hidden - 1}.",
                why="The tensors are damaged.",
                remedy="Compress the model again.",
            )
