"""The latent experts module: what a compressed model holds in place of a stock experts module.

    z = encode[group_in(e)] x;   h = gate(core_in[e] z);   u = core_out[e] h;   y = sum_e w_e decode[group_out(e)] u

Nothing of the architecture is written again: activation, clamps and interleaving come from the stock module, of which
only the large parameters go. Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from molae_compress.errors import ModelError
from molae_compress.kernels.gpu_experts import NAME, latent_bank, layer_bank
from molae_compress.layouts import FLAGS, Layout, bare_copy, layout_of
from molae_compress.layouts.singly import CalledSingly, single_names, weight_shapes, without_numbers
from molae_compress.modeling.bases import Basis
from molae_compress.modeling.cores import GroupedCore, layer_core
from molae_compress.modeling.routed import make_route, routed_sum
from molae_compress.tensors import AnyShape, Bank, ExpertsSpec, Form, GateUp, LatentShape, Storage

LAYER_RANK = 8  # stock experts classes compute with kernels that take no other widths in 16 bit


_PARTS = ("encode", "gate_encode", "up_encode", "core", "decode")


class _Tensors(nn.Module):
    """What one bank stores: bases, cores, and the output biases."""

    encode: nn.Module
    core: nn.Module
    decode: nn.Module
    decode_bias: Tensor | None

    def forward(self, compute: Callable[..., Tensor], *args: Any) -> Tensor:
        """What `compute` makes of this bank: called, so that what brings offloaded tensors back knows when to."""
        return compute(self, *args)


class LatentExperts(_Tensors):
    """Latent experts, called as the experts module of transformers for which they stand.

    Make one with `from_stock`; its own tensors are named as in `LatentShape.tensors`, those of several banks lie in one
    submodule each. What else the original holds (a
    router, a norm, a bias after the routed sum) lies beside them under its own name.

    Attributes:
        spec: the experts module it stands for.
        shape: how it is stored.
        layout: how the original stores its weights and is called.
        num_experts: E.
    """

    def __init__(self, experts: nn.Module, layout: Layout, spec: ExpertsSpec, shape: AnyShape) -> None:
        super().__init__()
        self.spec, self.shape, self.layout, self.num_experts = spec, shape, layout, spec.num_experts
        self._weights = weights = layout.weight_names(experts)
        like = experts.get_parameter(weights[0])
        # Set past nn.Module: the model must neither save, initialise nor wrap what is left of the original.
        stock = self.__dict__["_stock"] = bare_copy(experts, weights)
        for key, value in vars(stock).items():
            if key not in vars(self) and key not in FLAGS:
                self.__dict__[key] = value  # models and layouts read such attributes
        _keep(experts, weights, self)
        self._banks = shape.banks(spec)
        self._place_lists = [
            [bank.experts.index(e) if e in bank.experts else len(bank.experts) for e in range(spec.num_experts)]
            for bank in self._banks
        ]
        for bank in self._banks:
            holder = _Tensors() if bank.prefix else self
            if bank.prefix:
                self.add_module(bank.prefix.removesuffix("."), holder)
            _add_tensors_(holder, experts, layout, bank, like)

    @classmethod
    def from_stock(cls, experts: nn.Module, spec: ExpertsSpec, shape: AnyShape) -> LatentExperts:
        """A module with empty parameters, on the stock module's device (meta included) and of its type.

        Args:
            experts: the stock module; it is left as it is.
            spec: its description.
            shape: the form to build.

        Raises:
            ModelError: `shape` does not fit `spec`.
        """
        check_shape(spec, shape)
        layout = layout_of(spec.name, experts)
        assert layout is not None
        return (LatentExpertList if layout.called_one_by_one else cls)(experts, layout, spec, shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called and answering as the original; most are `forward(hidden_states, top_k_index, top_k_weights)`."""
        call = self.layout.enter(self, self.spec, args, kwargs)
        return call.leave(self.routed(call.x_TH, call.index_TK, call.weight_TK).to(call.x_TH.dtype))

    def routed(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T,H] from inputs [T,H], the experts of each token [T,K] and their routing weights [T,K]."""
        if not self._banks[0].prefix:
            return self._of_bank(self, self._banks[0], x_TH, index_TK, weight_TK)
        y_TH = torch.zeros_like(x_TH)
        for number, bank in enumerate(self._banks):
            # slots of experts of other banks point behind the last one
            place_TK = self._places(x_TH.device)[number][index_TK]
            own_TK = weight_TK.masked_fill(place_TK == bank.spec.num_experts, 0.0)
            y_TH = y_TH + self.get_submodule(f"bank_{number}")(self._of_bank, bank, x_TH, place_TK, own_TK)
        return y_TH

    def _of_bank(self, held: _Tensors, bank: Bank, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T,H]: what the experts of one bank add."""
        if bank.shape.form == "layer":
            y_TH = self._layered(held, x_TH, index_TK, weight_TK)
        else:
            y_TH = self._grouped(held, bank, x_TH, index_TK, weight_TK)
        if held.decode_bias is not None:
            # One row of routing weights per token: cheaper than gathering a bias for every slot.
            routing_TE = weight_TK.new_zeros(index_TK.shape[0], bank.spec.num_experts + 1)
            routing_TE = routing_TE.scatter_add(1, index_TK, weight_TK)[:, :-1]
            y_TH = y_TH + routing_TE.to(y_TH.dtype) @ held.decode_bias
        return y_TH

    def _places(self, device: torch.device) -> Tensor:
        """[banks,E] int64: where each expert lies in each bank, one past the end where it does not.

        Not a buffer, which loading and offloading would have to fill.
        """
        kept: Tensor | None = self.__dict__.get("_kept_places")
        if kept is None or kept.device != device:
            kept = torch.tensor(self._place_lists, device=device)
            if not torch.compiler.is_compiling():
                self.__dict__["_kept_places"] = kept
        return kept

    def load_latent_(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes copies of the tensors of `LatentShape.tensors`, of the module's type and on its device.

        A module on meta takes them where they are.

        Raises:
            ModelError: a tensor is missing, unknown or of another shape, or pivots do not ascend inside their group.
        """
        check_tensors(self.spec, self.shape, tensors)
        for name, tensor in tensors.items():
            parent, _, leaf = name.rpartition(".")
            holder = self.get_submodule(parent)
            old = getattr(holder, leaf)
            place = tensor.device if old.is_meta else old.device
            value = tensor.detach().to(device=place, dtype=old.dtype, copy=True)
            # Replaced instead of written into: what is on meta holds no memory.
            setattr(holder, leaf, nn.Parameter(value) if isinstance(old, nn.Parameter) else value)
        for module in self.modules():
            # transformers initialises every module without this mark when it is asked to initialise the model, and knows
            # neither bases nor cores, though some are of classes that it knows.
            module._is_hf_initialized = True  # type: ignore[assignment]
        self.finish_loading_()

    def finish_loading_(self) -> None:
        """Sets what is not stored but follows from the shape and the stored tensors."""
        for module in self.modules():
            if isinstance(module, Basis):
                module.prepare()
        self._places(next(self.parameters()).device)
        if self._banks[0].shape.form == "layer" and self.spec.has_bias and self.layout.own_core:
            zeros_ER = self.core.get_buffer("down_proj_bias")
            if zeros_ER.is_meta:
                zeros_ER = self.core.get_parameter("down_proj").new_empty(zeros_ER.shape)
            self.core.down_proj_bias = zeros_ER.zero_()

    def latent_tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the names of `LatentShape.tensors`, detached."""
        held = self.state_dict()
        return {name: held[name] for name in self.shape.tensors(self.spec)}

    def stock(self) -> nn.Module:
        """The experts module that this one stands for, without the experts' weights."""
        held: nn.Module = self.__dict__["_stock"]
        stock = bare_copy(held, self._weights)
        _keep(self, (*self.shape.tensors(self.spec),), stock)
        return stock

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        banks = [f"{bank.spec.num_experts} x {bank.shape.rank_in}/{bank.shape.rank_out or 'dense'}" for bank in self._banks]
        return f"experts={self.num_experts}, form={self._banks[0].shape.form}, ranks={', '.join(banks)}"

    def _implementation(self) -> str | None:
        return getattr(self.__dict__.get("config"), "_experts_implementation", None)

    def _layered(self, held: _Tensors, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        bare = self._implementation() == NAME and _is_bare(held, nn.Linear, type(self.__dict__["_stock"]))
        fused_TH = layer_bank(held, x_TH, index_TK, weight_TK) if bare else None
        y_TH: Tensor = held.decode(held.core(held.encode(x_TH), index_TK, weight_TK)) if fused_TH is None else fused_TH
        return y_TH

    def _grouped(self, held: _Tensors, bank: Bank, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        shape, implementation = bank.shape, self._implementation()
        after = self.layout.after_expert(self)
        if implementation == NAME and after is None and _is_bare(held, Basis, GroupedCore):
            fused_TH = latent_bank(held, bank.spec, shape, x_TH, index_TK, weight_TK)
            if fused_TH is not None:
                return fused_TH
        route = make_route(index_TK, bank.spec.num_experts, implementation, strangers=bool(bank.prefix))
        bases = [getattr(held, basis) for basis, _ in shape.branches()]
        if shape.input_group == bank.spec.num_experts:  # one basis: each token is encoded once for all its experts
            latent_SR = tuple(basis(x_TH)[route.token_S] for basis in bases)
        else:
            x_SH = x_TH[route.token_S]
            latent_SR = tuple(basis(x_SH, route) for basis in bases)
        u_SN = held.core(latent_SR, route)
        one_output_basis = shape.rank_out is not None and shape.output_group == bank.spec.num_experts
        if one_output_basis and after is None:  # the routed sum is decoded once for each token
            y_TH: Tensor = held.decode(routed_sum(u_SN, weight_TK, route))
            return y_TH
        y_SH = u_SN if shape.rank_out is None else held.decode(u_SN, route)
        return routed_sum(y_SH if after is None else after(y_SH), weight_TK, route)


def _is_bare(held: _Tensors, *kinds: type[nn.Module]) -> bool:
    """Whether nothing stands around the parts of a bank: kernels read their tensors, past what adapters and hooks do."""
    parts = [part for name, part in held.named_children() if name in _PARTS]
    return all(type(part) in kinds and not part._forward_hooks and not part._forward_pre_hooks for part in parts)


def _add_tensors_(holder: nn.Module, experts: nn.Module, layout: Layout, bank: Bank, like: Tensor) -> None:
    """Gives `holder` the empty parameters and buffers of a bank."""
    spec, shape = bank.spec, bank.shape

    def basis(size: int, rank: int, *, decode: bool) -> Basis:
        groups, H = spec.num_experts // size, spec.hidden
        return Basis(groups, size, rank, H, shape.storage, decode=decode, device=like.device, dtype=like.dtype)

    if shape.form == "layer":
        for name, sizes in (("encode", (spec.hidden, shape.rank_in)), ("decode", (shape.rank_in, spec.hidden))):
            holder.add_module(name, nn.Linear(*sizes, bias=False, device=like.device, dtype=like.dtype))
        holder.core = layer_core(experts, layout, spec, shape, like)
    else:
        for name, _ in shape.branches():
            holder.add_module(name, basis(shape.input_group, shape.rank_in, decode=False))
        holder.core = GroupedCore(experts, layout, spec, shape, like)
        if shape.rank_out is not None:
            holder.decode = basis(shape.output_group, shape.rank_out, decode=True)
    bias = nn.Parameter(like.new_empty(spec.num_experts, spec.hidden)) if spec.has_bias else None
    holder.register_parameter("decode_bias", bias)


class LatentExpertList(CalledSingly, LatentExperts):
    """Latent experts in place of a list or dictionary, out of which the model takes single experts to call them itself."""

    def __init__(self, experts: nn.Module, layout: Layout, spec: ExpertsSpec, shape: LatentShape) -> None:
        super().__init__(experts, layout, spec, shape)
        self.names, self.has_keys = single_names(self._weights), isinstance(experts, nn.ModuleDict)
        self._shapes = weight_shapes(experts, self._weights, self.names[0])
        self.__dict__["_example"] = None

    def example(self) -> nn.Module:
        """What a single expert looks like, in the type and on the device that the latent tensors now have."""
        like = next(tensor for tensor in self.parameters() if tensor.is_floating_point())
        held: tuple[torch.dtype, torch.device, nn.Module] | None = self.__dict__["_example"]
        if held is None or held[:2] != (like.dtype, like.device):
            stock: nn.Module = self.__dict__["_stock"]
            held = like.dtype, like.device, without_numbers(stock.get_submodule(self.names[0]), self._shapes, like)
            self.__dict__["_example"] = held  # past nn.Module, as the original
        return held[2]

    def one(self, expert: int, x: Tensor) -> Tensor:
        """What one expert makes of `x [...,H]`."""
        x_NH = x.reshape(-1, self.spec.hidden)
        index_N1 = torch.full((x_NH.shape[0], 1), expert, device=x.device)
        return self.routed(x_NH, index_N1, torch.ones_like(x_NH[:, :1])).to(x.dtype).reshape(x.shape)


def _keep(module: nn.Module, left_out: tuple[str, ...], holder: nn.Module) -> None:
    """Gives `holder` all that `module` holds beside the parameters `left_out` and the submodules they lie in."""
    gone = {name.partition(".")[0] for name in left_out}
    for name, child in module._modules.items():
        if name not in gone:
            holder.add_module(name, child)
    for name, parameter in module._parameters.items():
        if name not in gone and parameter is not None:
            holder.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        if name not in gone and buffer is not None:
            holder.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)


def check_shape(spec: ExpertsSpec, shape: AnyShape) -> None:
    """Raises `ModelError` unless the latent shape fits the experts module it stands for."""
    if isinstance(shape, LatentShape):
        problems = _problems(spec, shape)
    else:
        problems = [problem for bank in shape.banks(spec) for problem in _problems(bank.spec, bank.shape)]
        if sorted(expert for experts in shape.members for expert in experts) != list(range(spec.num_experts)):
            problems.append(f"its banks do not hold each of the {spec.num_experts} experts once")
        if any(part.form == "layer" for part in shape.shapes):
            problems.append("the layer form has no banks")
    if problems:
        raise ModelError(f"The latent shape of '{spec.name}' is impossible: {'; '.join(problems)}.")


def _problems(spec: ExpertsSpec, shape: LatentShape) -> list[str]:
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
    if shape.form == "layer" and spec.has_output_norm:
        problems.append("the layer form sums experts before decoding, but the model normalises the output of each expert")
    one_group = shape.input_group == shape.output_group == spec.num_experts
    plain = shape.gate_up == "joint" and shape.storage == "orthonormal"
    if shape.form == "layer" and not (one_group and plain and shape.rank_in == shape.rank_out):
        problems.append("the layer form has one orthonormal joint basis a side, of equal ranks")
    elif shape.form == "layer" and shape.rank_in % LAYER_RANK and shape.rank_in != spec.hidden:
        problems.append(f"the fused kernels of the layer form: {shape.rank_in} is not a multiple of {LAYER_RANK}")
    return problems


def check_tensors(spec: ExpertsSpec, shape: AnyShape, tensors: Mapping[str, Tensor]) -> None:
    """Raises `ModelError` unless `tensors` are those of `shape.tensors(spec)`, with valid pivots."""
    wanted = shape.tensors(spec)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        listed = "; ".join(f"{name} is {found.get(name)}, expected {wanted.get(name)}" for name in wrong)
        raise ModelError(f"The latent tensors of '{spec.name}' do not fit its shape: {listed}.")
    for bank in shape.banks(spec):
        for stem, rank in (("encode", bank.shape.rank_in), ("decode", bank.shape.rank_out)):
            for name in (name for name in tensors if name.startswith(bank.prefix) and name.endswith(f"{stem}.pivots")):
                assert rank is not None
                pivots_GR = tensors[name].view(-1, rank)
                ascending = bool((pivots_GR.diff(dim=1) > 0).all())
                if not ascending or int(pivots_GR.min()) < 0 or int(pivots_GR.max()) >= spec.hidden:
                    raise ModelError(
                        f"The column indices '{spec.name}.{name}' do not ascend between 0 and {spec.hidden - 1}.",
                        why="The tensors are damaged.",
                        remedy="Compress the model again.",
                    )
