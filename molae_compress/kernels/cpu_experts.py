"""Experts on a CPU by the operator library: torch's tensors and torch's threads, the arithmetic of the ONNX operators.

Single rows, which decoding consists of, read their weights at the rate of main memory there; torch's products of one row get
about half of it. The library is loaded when it is first wanted. Where there is none, whoever asks computes with torch.
Shape suffixes: see `molae_compress.tensors`; N and M are widths.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from molae_compress.errors import KernelError
from molae_compress.kernels.gpu_operands import Matrices
from molae_compress.kernels.gpu_problem import LatentExpertsProblem
from molae_compress.kernels.library import library_path

_ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_PLAIN = (Tensor, nn.Parameter)
# Rows of a group up to which a product here is faster than torch's product of each group, as measured on Zen 4. Single rows
# of weights are read 1.4 to 2.7 times as fast in every type. Of many rows, float32 is as fast as torch (0.9 to 1.1) and
# float16, for which torch has no kernel, 2.5 to 4 times as fast; bfloat16, which torch's library multiplies better, 0.65 to
# 1.0 times. A whole latent bank is the faster one at every size all the same: it saves torch's gathers and scatters.
_FEW_ROWS = {torch.bfloat16: 4}
_MESSAGE_BYTES = 512


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in groups for name in names.split()]


# The structures of csrc/cpu_entry.h.
class _Pool(ctypes.Structure):
    _fields_ = _fields((ctypes.c_void_p, "parallel"), (ctypes.c_int32, "threads"))


class _Product(ctypes.Structure):
    _fields_ = _fields(
        (_Pool, "pool"),
        (ctypes.c_int32, "element transposed"),
        (ctypes.c_int64, "rows inputs outputs groups"),
        (ctypes.c_void_p, "a weight ends out"),
    )


class _Experts(ctypes.Structure):
    _fields_ = _fields(
        (_Pool, "pool"),
        (ctypes.c_int32, "element activation gated interleaved core_transposed down_transposed decode_transposed"),
        (ctypes.c_float, "alpha limit up_offset"),
        (ctypes.c_int64, "tokens hidden intermediate top_k experts input_group output_group rank_in rank_out"),
        (ctypes.c_void_p, "x index routing encode encode_pivots core up_encode up_encode_pivots core_up core_bias"),
        (ctypes.c_void_p, "down decode decode_pivots decode_bias y"),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The operator library, None with a warning where it was not compiled; it needs no ONNX Runtime for this."""
    try:
        library = ctypes.CDLL(str(library_path()))
    except (KernelError, OSError) as error:
        warnings.warn(f"Torch computes the experts on this CPU, which is slower. {error}", RuntimeWarning, stacklevel=2)
        return None
    for function, call in ((library.molae_cpu_product, _Product), (library.molae_cpu_experts, _Experts)):
        function.argtypes = (ctypes.POINTER(call), ctypes.c_char_p, ctypes.c_size_t)
    return library


@functools.cache
def _parallel() -> int | None:
    """Address of `GOMP_parallel` in torch's own OpenMP runtime, None where that is another kind.

    A second runtime would bring threads of its own, and its waiting threads would take the cores from torch's. Torch makes
    its runtime visible to all; one that was there before, preloaded for example, is the one torch uses, and found first.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def is_recorded() -> bool:
    """Whether a compiler or a tracer follows the call: what the library writes is no operation of torch to them."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def can_run(x_TH: Tensor, weights: Iterable[Tensor], *more: Tensor) -> bool:
    """Whether the library is there and takes these tensors: on a CPU, of one type, contiguous, and without a gradient."""
    if x_TH.device.type != "cpu" or x_TH.dtype not in _ELEMENTS or is_recorded():
        return False
    wants_gradient, kind = torch.is_grad_enabled(), x_TH.dtype
    if type(x_TH) not in _PLAIN or (wants_gradient and any(tensor.requires_grad for tensor in (x_TH, *more))):
        return False
    for held in weights:
        # Others hold their numbers elsewhere: on a device, in a file, in a packed type, nowhere.
        if type(held) not in _PLAIN or held.device.type != "cpu" or not held.is_contiguous():
            return False
        if held.is_floating_point() and (held.dtype != kind or (wants_gradient and held.requires_grad)):
            return False
    return _library() is not None


def pays(dtype: torch.dtype, rows: int, groups: int) -> bool:
    """Whether single products, of so many rows in all, are faster here than torch's."""
    limit = _FEW_ROWS.get(dtype)
    return limit is None or rows <= limit * groups


def product(a_SN: Tensor, weight: Tensor, ends_G: Tensor | None = None, *, transposed: bool) -> Tensor:
    """`[S,M]`: each row times the matrix of its group; zeros past the last end.

    Args:
        a_SN: rows, sorted by group.
        weight: `[G,N,M]` if `transposed`, else `[G,M,N]`; G = 1 may be left out.
        ends_G: int32, one past the last row of each group; may be absent with one group.
        transposed: orientation of `weight`.
    """
    a_SN = a_SN.contiguous()
    N, M = weight.shape[-2:] if transposed else weight.shape[:-3:-1]
    out_SM = a_SN.new_empty(a_SN.shape[0], M)
    groups = 1 if ends_G is None else weight.shape[0]
    if a_SN.shape[1] != N or weight.numel() != groups * N * M or (ends_G is not None and ends_G.shape != (groups,)):
        raise _error(f"rows of {a_SN.shape[1]} numbers do not fit a weight of shape {list(weight.shape)}")
    sizes, places = (a_SN.shape[0], N, M, groups), map(_address, (a_SN, weight, ends_G, out_SM))
    _call("molae_cpu_product", _Product(_pool(), _ELEMENTS[a_SN.dtype], transposed, *sizes, *places))
    return out_SM


def latent_experts(problem: LatentExpertsProblem) -> Tensor:
    """`[T,H]`: what a bank of latent experts in grouped form adds."""
    p, tensors = problem, problem.tensors
    return _experts(
        p.x_TH,
        p.index_TK,
        p.weight_TK,
        {name: tensor for name, tensor in vars(tensors).items() if tensor is not None},
        activation=p.activation.code,
        gated=p.gated,
        interleaved=p.interleaved,
        core_transposed=True,
        decode_transposed=True,
        alpha=p.activation.alpha,
        limit=p.activation.limit,
        up_offset=p.activation.up_offset,
        intermediate=tensors.down.shape[1],
        experts=p.num_experts,
        input_group=p.input_group,
        output_group=p.output_group,
        rank_in=p.rank_in,
        rank_out=p.rank_out,
    )


def dense_experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    first: Matrices,
    second: Matrices,
    bias_EH: Tensor | None = None,
    *,
    encode_RH: Tensor | None = None,
    decode_HR: Tensor | None = None,
) -> Tensor:
    """`[T,H]`: stock experts of two matrices each, or the layer form with one basis a side around them.

    Args:
        x_TH: inputs.
        index_TK: expert of each slot; E is none.
        weight_TK: routing weights.
        first: one matrix an expert into the activation, and its bias.
        second: one out of it, without its bias.
        bias_EH: that bias, at full width.
        encode_RH: what inputs pass through first.
        decode_HR: what routed sums pass through last.
    """
    found = {
        "core": first.weight,
        "core_bias": first.bias,
        "down": second.weight,
        "decode_bias": bias_EH,
        "encode": encode_RH,
        "decode": decode_HR,
    }
    E, activation = first.weight.shape[0], first.activation
    return _experts(
        x_TH,
        index_TK,
        weight_TK,
        {name: tensor for name, tensor in found.items() if tensor is not None},
        activation=activation.code,
        gated=first.gated,
        interleaved=first.interleaved,
        core_transposed=first.transposed,
        down_transposed=second.transposed,
        alpha=activation.alpha,
        limit=activation.limit,
        up_offset=activation.up_offset,
        intermediate=second.weight.shape[1 if second.transposed else 2],
        experts=E,
        input_group=E,
        output_group=E,
        rank_in=0 if encode_RH is None else encode_RH.shape[0],
        rank_out=0 if decode_HR is None else decode_HR.shape[1],
    )


def _experts(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, tensors: dict[str, Tensor], **fields: Any) -> Tensor:
    x_TH, index_TK, routing_TK = x_TH.contiguous(), index_TK.long().contiguous(), weight_TK.float().contiguous()
    y_TH = torch.empty_like(x_TH)
    (T, H), K = x_TH.shape, index_TK.shape[1]
    if not index_TK.shape == routing_TK.shape == (T, K):
        shapes = f"{list(index_TK.shape)} and {list(routing_TK.shape)}"
        raise _error(f"{T} tokens have experts and routing weights of the shapes {shapes}")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _check(tensors, x_TH.dtype, H, **fields)
    tensors |= {"x": x_TH, "index": index_TK, "routing": routing_TK, "y": y_TH}
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    call = _Experts(pool=_pool(), element=_ELEMENTS[x_TH.dtype], tokens=T, hidden=H, top_k=K, **fields, **places)
    _call("molae_cpu_experts", call)
    return y_TH


def _check(tensors: dict[str, Tensor], dtype: torch.dtype, H: int, **fields: Any) -> None:
    """Raises `KernelError` unless the tensors are as large as the call takes them for, and of its types."""
    E, intermediate, rank_in, rank_out = (fields[name] for name in ("experts", "intermediate", "rank_in", "rank_out"))
    rows_in, rows_out = E // fields["input_group"] * rank_in, E // fields["output_group"] * rank_out
    J = intermediate * (1 + fields["gated"])
    sizes = {
        "core": E * (rank_in or H) * (intermediate if "core_up" in tensors else J),
        "core_up": E * rank_in * intermediate,
        "core_bias": E * J,
        "down": E * intermediate * (rank_out or H),
        "decode_bias": E * H,
    }
    for name, rows, rank in (("encode", rows_in, rank_in), ("up_encode", rows_in, rank_in), ("decode", rows_out, rank_out)):
        sizes[f"{name}_pivots"] = rows
        sizes[name] = rows * (H - rank if f"{name}_pivots" in tensors else H)
    for name, tensor in tensors.items():
        wanted = torch.int32 if name.endswith("pivots") else dtype
        if tensor.numel() != sizes[name] or tensor.dtype != wanted or tensor.device.type != "cpu":
            found = f"{tensor.numel()} numbers of {tensor.dtype} on {tensor.device}"
            raise _error(f"'{name}' is {found}, expected {sizes[name]} of {wanted} on cpu")


def _pool() -> _Pool:
    return _Pool(_parallel(), torch.get_num_threads())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, call: _Product | _Experts) -> None:
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if getattr(_library(), name)(ctypes.byref(call), message, _MESSAGE_BYTES):
        raise _error(message.value.decode(errors="replace"))


def _error(problem: str) -> KernelError:
    return KernelError(
        f"The experts cannot be computed: {problem}.",
        why="The routing or the tensors do not fit each other.",
        remedy='Load the model with experts_implementation="eager", which says where.',
    )
