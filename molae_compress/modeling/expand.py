"""Back to dense experts: `W = core @ basis`, so that every runtime can load the model without this package.

Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molae_compress.errors import ModelError
from molae_compress.modeling.bases import basis_matrix
from molae_compress.modeling.latent import LatentExperts
from molae_compress.tensors import AnyShape, DenseExperts, ExpertsSpec, LatentShape

Dense = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def dense_weights(spec: ExpertsSpec, shape: AnyShape, tensors: Mapping[str, Tensor]) -> Dense:
    """The dense weights that latent tensors stand for, in canonical orientation.

    Args:
        spec: the experts module.
        shape: how it is stored.
        tensors: the tensors of `shape.tensors(spec)`.

    Returns:
        `w_in [E,J,H]`, `w_out [E,H,I]` and the biases `[E,J]`, `[E,H]` (None without), computed in fp32, in the type of
        the tensors and on their device.
    """
    if isinstance(shape, LatentShape):
        return _dense_of(spec, shape, tensors)
    found: list[Tensor | None] = [None] * 4
    for bank in shape.banks(spec):
        own = {name.removeprefix(bank.prefix): value for name, value in tensors.items() if name.startswith(bank.prefix)}
        for part, value in enumerate(_dense_of(bank.spec, bank.shape, own)):
            if value is None:
                continue
            whole = value.new_empty(spec.num_experts, *value.shape[1:]) if found[part] is None else found[part]
            assert whole is not None
            whole[list(bank.experts)] = value
            found[part] = whole
    w_in_EJH, w_out_EHI, bias_in_EJ, bias_out_EH = found
    assert w_in_EJH is not None
    assert w_out_EHI is not None
    return w_in_EJH, w_out_EHI, bias_in_EJ, bias_out_EH


def _dense_of(spec: ExpertsSpec, shape: LatentShape, tensors: Mapping[str, Tensor]) -> Dense:
    if shape.form == "layer":
        return _from_layer_form(spec, tensors)
    E, H, I = spec.num_experts, spec.hidden, spec.intermediate
    down_ENI = tensors["core.down"].view(E, -1, I)
    w_in_EJH = down_ENI.new_empty(E, spec.rows, H)
    row_sets = spec.gate_rows() if shape.gate_up == "separate" else (torch.arange(spec.rows),)
    for (basis, core), rows in zip(shape.branches(), row_sets, strict=True):
        core_ERJ = tensors[f"core.{core}"].view(E, shape.rank_in, -1)
        matrix_GRH = _matrix(tensors, basis, E // shape.input_group, H)
        for e in range(E):
            w_JH = core_ERJ[e].T.float() @ matrix_GRH[e // shape.input_group].float()
            w_in_EJH[e, rows.to(w_JH.device)] = w_JH.to(w_in_EJH.dtype)
    w_out_EHI = down_ENI.clone() if shape.rank_out is None else down_ENI.new_empty(E, H, I)
    if shape.rank_out is not None:
        matrix_GRH = _matrix(tensors, "decode", E // shape.output_group, H)
        for e in range(E):
            w_out_EHI[e] = matrix_GRH[e // shape.output_group].T.float() @ down_ENI[e].float()
    return w_in_EJH, w_out_EHI, tensors.get("core.bias"), tensors.get("decode_bias")


def to_dense(latent: LatentExperts) -> DenseExperts:
    """The dense experts that a latent module stands for, in its type and on its device.

    Raises:
        ModelError: its parameters are offloaded.
    """
    tensors = latent.latent_tensors()
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ModelError(
            f"The latent experts '{latent.spec.name}' are not in memory.",
            remedy="Load the model without offloading.",
        )
    w_in, w_out, bias_in, bias_out = dense_weights(latent.spec, latent.shape, tensors)
    activate, after = latent.layout.activation(latent.stock()), latent.layout.after_expert(latent)
    return DenseExperts(latent.spec, w_in, w_out, activate, bias_in, bias_out, after)


def dense_module(latent: LatentExperts) -> nn.Module:
    """The original experts module again, with dense weights; raises `ModelError` as `to_dense`."""
    return latent.layout.store_(latent.stock(), to_dense(latent))


def expand_(model: PreTrainedModel) -> PreTrainedModel:
    """Puts the stock experts modules back, with dense weights, in place.

    `save_pretrained` then writes a plain checkpoint. Layers are expanded one at a time.

    Raises:
        ModelError: the model holds no latent experts, or they are offloaded.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LatentExperts)]
    if not names:
        raise ModelError(
            f"{type(model).__name__} holds no latent experts, so there is nothing to expand.",
            remedy="Give a model that molae_compress has compressed.",
        )
    for name in names:
        latent = model.get_submodule(name)
        assert isinstance(latent, LatentExperts)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, dense_module(latent))
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[assignment]
    # What loading recorded speaks of latent tensors; without it saving writes the family's own format.
    model._weight_conversions = None  # type: ignore[assignment]
    return model


def _from_layer_form(spec: ExpertsSpec, tensors: Mapping[str, Tensor]) -> Dense:
    first = "gate_up_proj" if spec.has_gate else "up_proj"
    core_in, core_out = tensors[f"core.{first}"], tensors["core.down_proj"]
    if spec.is_transposed:
        core_in, core_out = core_in.transpose(1, 2), core_out.transpose(1, 2)
    encode_RH, decode_HR = tensors["encode.weight"].float(), tensors["decode.weight"].float()
    w_in_EJH = torch.stack([(core_JR.float() @ encode_RH).to(core_in.dtype) for core_JR in core_in])
    w_out_EHI = torch.stack([(decode_HR @ core_RI.float()).to(core_out.dtype) for core_RI in core_out])
    return w_in_EJH, w_out_EHI, tensors.get(f"core.{first}_bias"), tensors.get("decode_bias")


def _matrix(tensors: Mapping[str, Tensor], stem: str, groups: int, hidden: int) -> Tensor:
    return basis_matrix(tensors[f"{stem}.weight"], tensors.get(f"{stem}.pivots"), groups=groups, hidden=hidden)
