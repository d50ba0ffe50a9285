"""Proof that model code which calls its experts one by one can work with latent ones, before anything is computed.

Such code may do anything with an expert it takes out of a list: slice the list, look at a weight. So its block is run once
on a few random tokens, with small random latent experts; what the other parts of the block hold is real.
Shape suffixes: see `molae_compress.tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from molae_compress.budget import Shapes
from molae_compress.calibration.replay import Passed, leaves
from molae_compress.calibration.walk import LayerArguments, pass_through, set_submodule
from molae_compress.errors import ModelError, MolaeError
from molae_compress.layouts import layout_of, weight_names
from molae_compress.layouts.singly import without_numbers
from molae_compress.modeling.latent import LAYER_RANK, LatentExperts
from molae_compress.source import Source
from molae_compress.stream import stand_in
from molae_compress.tensors import AnyShape, ExpertsSpec

_TOKENS = 64
# What code of a model may end with.
_ENDS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def check_called_singly(source: Source, shapes: Shapes) -> None:
    """Runs every kind of block that takes single experts out of a list, with latent experts in place of that list.

    A block that does not take hidden states alone is run in its layer, as the model calls that. Whatever does not run here
    with experts of its own either, which give zeros, proves nothing.

    Args:
        source: the dense model, in evaluation mode.
        shapes: of the modules that are to be compressed; None where one stays dense.

    Raises:
        ModelError: a block fails, or gives other shapes or no finite numbers.
    """
    seen: set[tuple[type[nn.Module], str]] = set()
    for spec in source.specs:
        shape, (above, _, leaf) = shapes.get(spec.name), spec.name.rpartition(".")
        block = source.model.get_submodule(above)
        layout = layout_of(spec.name, source.model.get_submodule(spec.name))
        if shape is None or layout is None or not layout.called_one_by_one or (type(block), leaf) in seen:
            continue
        seen.add((type(block), leaf))
        with torch.no_grad():
            with source.layer(source.layers.of(spec.name)):
                x = _hidden_states(source, spec, block)
                # blocks take windows of tokens, or just tokens
                if any(_proves(source, spec, shape, partial(block, x_in)) for x_in in (x, x[0])):
                    continue
            _prove_in_layer(source, spec, shape)


def _proves(source: Source, spec: ExpertsSpec, shape: AnyShape, call: Callable[[], Any]) -> bool:
    """Makes a call that runs a block, with its own experts and with latent ones; False if it fails with its own.

    Raises:
        ModelError: it fails with latent ones only.
    """
    block = source.model.get_submodule(spec.name.rpartition(".")[0])
    layer = source.layers.of(spec.name)
    plain = {other.name: _plain(source, other) for other in source.specs if source.layers.of(other.name) == layer}
    try:
        with _in_place(source.model, plain):
            expected = _tensors(call())
    except (MolaeError, *_ENDS):
        return False
    try:
        with _in_place(source.model, plain | {spec.name: _latent(source, spec, shape)}):
            found = _tensors(call())
    except (MolaeError, *_ENDS) as error:
        said = str(error).splitlines()[0].rstrip(".") if str(error) else ""
        raise _refusal(spec, block, f"it ends with {type(error).__name__}: {said}") from error
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        raise _refusal(spec, block, "it gives tensors of other shapes than with its own experts")
    if not all(one.isfinite().all() for one, own in zip(found, expected, strict=True) if own.isfinite().all()):
        raise _refusal(spec, block, "it gives no finite numbers, as code that computes with weights of single experts")
    return True


def _prove_in_layer(source: Source, spec: ExpertsSpec, shape: AnyShape) -> None:
    """Carries a few tokens to the layer of a block and through it; raises `ModelError`."""
    embedding: Any = source.model.get_input_embeddings()
    ids_1L = torch.arange(_TOKENS)[None] % int(embedding.weight.shape[0])
    arguments = LayerArguments(source.model, source.layers.paths, source.device)
    passed: Passed = ()
    number = source.layers.of(spec.name)
    with source.ends(head=False):
        try:
            for layer in range(number):
                prefix = f"{source.layers.paths[layer]}."
                inside = [other for other in source.specs if other.name.startswith(prefix)]
                experts = {other.name.removeprefix(prefix): _plain(source, other) for other in inside}
                with source.layer(layer) as module:
                    ((passed, _),) = pass_through(arguments, module, experts, iter([(ids_1L, passed)]))
        except (MolaeError, *_ENDS):
            return
        with source.layer(number) as module:

            def call() -> Any:
                given = arguments.call(module, ids_1L, passed)
                return None if given is None else given.returned

            _proves(source, spec, shape, call)


def _plain(source: Source, spec: ExpertsSpec) -> nn.Module:
    """Stands for a dense experts module: a list is one of zeros."""
    layout = layout_of(spec.name, source.model.get_submodule(spec.name))
    assert layout is not None
    return _zeros(source, spec) if layout.called_one_by_one else stand_in(source, spec, source.dense(spec))


def _zeros(source: Source, spec: ExpertsSpec) -> nn.Module:
    """The dense experts module of its own class, whose weights are zeros that take no memory."""
    experts = source.model.get_submodule(spec.name)
    names = [name.removeprefix(f"{spec.name}.") for name in weight_names(source.model, spec.name)]
    like = torch.empty(0, dtype=experts.get_parameter(names[0]).dtype, device=source.device)
    return without_numbers(experts, {name: experts.get_parameter(name).shape for name in names}, like, value=0.0)


def _latent(source: Source, spec: ExpertsSpec, shape: AnyShape) -> LatentExperts:
    """Random latent experts of the form asked for, of low rank."""
    generator = torch.Generator().manual_seed(0)
    first = shape.banks(spec)[0].shape
    rank_out = None if first.rank_out is None else min(LAYER_RANK, first.rank_out)
    low = replace(first, rank_in=min(LAYER_RANK, first.rank_in), rank_out=rank_out)
    tensors: dict[str, Tensor] = {}
    for name, size in low.tensors(spec).items():
        if name.endswith(".pivots"):
            rank = low.rank_out if name.startswith("decode") else low.rank_in
            assert rank is not None
            tensors[name] = torch.arange(rank, dtype=torch.int32).repeat(size[0] // rank)
        else:
            tensors[name] = 0.02 * torch.randn(size, generator=generator)
    module = LatentExperts.from_stock(source.model.get_submodule(spec.name), spec, low)
    module.load_latent_({name: tensor.to(source.device) for name, tensor in tensors.items()})
    return module


def _hidden_states(source: Source, spec: ExpertsSpec, block: nn.Module) -> Tensor:
    """[1,T,H] random, in the type of the block."""
    held = (p.dtype for p in block.parameters() if p.is_floating_point() and not p.is_meta)
    x = torch.randn(1, _TOKENS, spec.hidden, generator=torch.Generator().manual_seed(0))
    return x.to(device=source.device, dtype=next(held, torch.float32))


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(out) if isinstance(leaf, Tensor)]


@contextmanager
def _in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other modules at some paths."""
    originals = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            set_submodule(model, path, module)
        yield
    finally:
        for path, original in originals.items():
            set_submodule(model, path, original)


def _refusal(spec: ExpertsSpec, block: nn.Module, reason: str) -> ModelError:
    return ModelError(
        f"The block {type(block).__name__} around the experts '{spec.name}' does not work with latent experts: {reason}.",
        why="It takes single experts out of a list and does more with them than a latent expert can answer.",
        remedy="Write a layout for the class of the block (see docs/adapters.md), or list the experts under `ignore`.",
    )
