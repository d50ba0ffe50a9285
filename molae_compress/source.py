"""The dense model that is compressed: a checkpoint on disk, read one layer at a time, or a model in memory.

Both look the same to a run: which experts there are, the dense weights of one of them, and decoder layers that can be
called. Opening a checkpoint reads headers only, and refuses there whatever could not be compressed later.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from molae_compress.adapters import Layers, find_experts, layers_with_experts
from molae_compress.adapters.keys import KeyMap
from molae_compress.adapters.skeleton import (
    drop_quantization_,
    empty_,
    fill_,
    read_config,
    skeleton,
    zero_computed_buffers_,
)
from molae_compress.adapters.unknown import refuse_further_layers
from molae_compress.checkpoint import Checkpoint, StoredTensors, open_source, resolve_model
from molae_compress.errors import CheckpointError, DataError, ModelError, RecipeError
from molae_compress.layouts import dense_experts, weight_names
from molae_compress.modeling.latent import LatentExperts
from molae_compress.modeling.quantizer import MolaeConfig, swap_
from molae_compress.recipe import Recipe
from molae_compress.tensors import DenseExperts, ExpertsSpec


class Source(Protocol):
    """What a run needs of the dense model, wherever it lies."""

    model: PreTrainedModel
    specs: list[ExpertsSpec]
    device: torch.device

    @property
    def layers(self) -> Layers:
        """The layers of all lists of layers that hold experts."""

    def dense(self, spec: ExpertsSpec) -> DenseExperts:
        """The weights of one experts module, in the precision they are stored in."""

    def dtype(self, spec: ExpertsSpec) -> torch.dtype:
        """The precision the weights of an experts module are stored in."""

    def nbytes(self) -> int:
        """Bytes of all tensors on disk, as they are read: parameters and persistent buffers, tied ones counted once."""

    def expert_bytes(self, spec: ExpertsSpec) -> int:
        """Those of them that hold the weights of an experts module; of a tensor of several modules, its share.

        The sum over all modules is so never more than `nbytes`. A latent module shares nothing: where experts are tied, the
        result may be larger than the original.
        """

    def quantized(self) -> tuple[str, int] | None:
        """The method by which the files hold weights in fewer bits, and the bytes of the tensors in them; None if plain."""

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A layer, by its number in `layers`, that can be called; its experts have no weights and need a stand-in."""

    @contextmanager
    def ends(self, *, head: bool) -> Iterator[None]:
        """While open, what comes before the layers (and after them, with `head`) can be called."""


@dataclass
class DiskSource:
    """A checkpoint folder: a skeleton on meta, and weights read when they are asked for."""

    folder: Path
    checkpoint: StoredTensors
    model: PreTrainedModel
    keys: KeyMap
    specs: list[ExpertsSpec]
    experts: list[str]
    device: torch.device

    @classmethod
    def open(
        cls,
        model: str,
        *,
        revision: str | None = None,
        device: torch.device,
        trust_remote_code: bool = False,
        dense: bool = True,
    ) -> DiskSource:
        """Finds the folder, checks its headers against the model class, and reads no weights.

        With `dense` the model must be dense. Otherwise it may be an artifact, whose latent experts come with their layer;
        dense ones never do.

        Raises:
            CheckpointError: the folder, its files or their tensors are not those of the model.
            ModelError: no routed experts, or ones that are not understood.
        """
        folder = resolve_model(model, revision=revision)
        config = read_config(folder, trust_remote_code=trust_remote_code)
        quantized = config.to_dict().get("quantization_config")
        latent = None
        if not dense and quantized is not None and quantized.get("quant_method") == "molae":
            latent = MolaeConfig(**quantized)
        checkpoint = open_source(folder, config.to_dict()) if latent is None else Checkpoint.open(folder)
        drop_quantization_(config)  # the skeleton is dense, of an artifact until its experts are swapped
        bare = skeleton(config, trust_remote_code=trust_remote_code)
        specs = find_experts(bare)
        found = [spec.name for spec in specs]
        if latent is not None:
            swapped = swap_(bare, latent)
            for name in swapped:
                zero_computed_buffers_(bare.get_submodule(name))
            specs = [spec for spec in specs if spec.name not in swapped]
        keys = KeyMap(bare, checkpoint.entries)
        if keys.missing:
            some = sorted(keys.missing)
            raise CheckpointError(
                f"The checkpoint '{folder}' lacks {len(some)} tensors of {type(bare).__name__}, for example '{some[0]}'.",
                why="Missing weights would be invented.",
                remedy="Fetch the checkpoint again, with all its shards.",
            )
        refuse_further_layers(folder, checkpoint.entries.keys() - keys.unknown, keys.unknown)
        source = cls(folder, checkpoint, bare, keys, specs, found, device)
        keys.materialise("", source._meta)  # on meta: shapes are checked without reading a weight
        for spec in source.specs:
            _check_experts(source, spec)
        return source

    @cached_property
    def layers(self) -> Layers:
        return layers_with_experts(self.model, self.experts)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding."""
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.weight.shape[0])

    def _meta(self, key: str) -> Tensor:
        entry = self.checkpoint.entries[key]
        return torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")

    def dense(self, spec: ExpertsSpec) -> DenseExperts:
        tensors = self.keys.materialise(spec.name, self.checkpoint.read)
        own = {name.removeprefix(f"{spec.name}."): tensor.to(self.device) for name, tensor in tensors.items()}
        return dense_experts(self.model, spec, own)

    def dtype(self, spec: ExpertsSpec) -> torch.dtype:
        key = min(self.expert_keys(spec))
        return self.checkpoint.entries[key].torch_dtype

    def nbytes(self) -> int:
        return self.checkpoint.total_bytes

    def expert_bytes(self, spec: ExpertsSpec) -> int:
        total = 0.0
        for key in self.expert_keys(spec):
            owners = [other.dense_numel for other in self.specs if key in self.expert_keys(other)] if self._shared else []
            total += self.checkpoint.entries[key].nbytes * (spec.dense_numel / sum(owners) if owners else 1)
        return round(total)

    def expert_keys(self, spec: ExpertsSpec) -> set[str]:
        """Keys of the checkpoint that hold the weights of an experts module, and nothing else it may hold.

        Two modules share keys where the checkpoint stores them together, or where they are tied.
        """
        return self._expert_keys[spec.name]

    def all_expert_keys(self) -> set[str]:
        """Those of all experts modules."""
        return set().union(*self._expert_keys.values())

    @cached_property
    def _expert_keys(self) -> dict[str, set[str]]:
        return {
            spec.name: {key for name in weight_names(self.model, spec.name) for key in self.keys.targets.get(name, ())}
            for spec in self.specs
        }

    @cached_property
    def _shared(self) -> bool:
        return sum(map(len, self._expert_keys.values())) > len(self.all_expert_keys())

    def quantized(self) -> tuple[str, int] | None:
        method = self.checkpoint.quantization
        return (method, self.checkpoint.stored_bytes) if method is not None else None

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        name = self.layers.paths[index]
        layer = self.model.get_submodule(name)
        inside = [spec.name for spec in self.specs if spec.name.startswith(f"{name}.")]
        experts = {weight for module in inside for weight in weight_names(self.model, module)}
        for target in self._targets(name):
            if target not in experts:
                fill_(self.model, self.keys.materialise(target, self.checkpoint.read), self.device)
        for module in layer.modules():
            if isinstance(module, LatentExperts):
                module.finish_loading_()
        try:
            yield layer
        finally:
            empty_(layer)

    @contextmanager
    def ends(self, *, head: bool) -> Iterator[None]:
        output = self.model.get_output_embeddings()
        unused = [f"{name}." for name, module in self.model.named_modules() if module is output and not head]
        unused += [f"{path}." for path in self.layers.paths]
        for target in self._targets(""):
            if not target.startswith(tuple(unused)):
                fill_(self.model, self.keys.materialise(target, self.checkpoint.read), self.device)
        if head:
            self.model.tie_weights(recompute_mapping=False)  # the skeleton knows what is left to tie
        for buffer_owner in self.model.modules():
            for name in buffer_owner._non_persistent_buffers_set:
                buffer = buffer_owner._buffers[name]
                if buffer is not None:
                    buffer_owner._buffers[name] = buffer.to(self.device)
        try:
            yield
        finally:
            empty_(self.model)

    def _targets(self, module: str) -> list[str]:
        prefix = f"{module}." if module else ""
        return [target for target in self.keys.targets if target.startswith(prefix)]


@dataclass
class LiveSource:
    """A model in memory: nothing is read, nothing is freed."""

    model: PreTrainedModel
    specs: list[ExpertsSpec]
    device: torch.device

    @classmethod
    def of(cls, model: PreTrainedModel) -> LiveSource:
        """Looks at a model in memory; raises `ModelError` as `find_experts`."""
        return cls(model, find_experts(model), model.device)

    @cached_property
    def layers(self) -> Layers:
        return layers_with_experts(self.model, [spec.name for spec in self.specs])

    def dense(self, spec: ExpertsSpec) -> DenseExperts:
        return dense_experts(self.model, spec)

    def dtype(self, spec: ExpertsSpec) -> torch.dtype:
        return self._weights(spec)[0].dtype

    def expert_bytes(self, spec: ExpertsSpec) -> int:
        return round(sum(weight.nbytes / self._owners[id(weight)] for weight in self._weights(spec)))

    @cached_property
    def _owners(self) -> Counter[int]:
        """How many experts modules hold each weight, by its id."""
        return Counter(id(weight) for spec in self.specs for weight in self._weights(spec))

    def _weights(self, spec: ExpertsSpec) -> list[nn.Parameter]:
        return [self.model.get_parameter(name) for name in weight_names(self.model, spec.name)]

    def nbytes(self) -> int:
        ignored = self.model._keys_to_ignore_on_save or ()
        state = self.model.state_dict(keep_vars=True).items()
        return sum({id(tensor): tensor.nbytes for name, tensor in state if name not in ignored}.values())

    def quantized(self) -> None:
        return None

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        yield self.model.get_submodule(self.layers.paths[index])

    @contextmanager
    def ends(self, *, head: bool) -> Iterator[None]:
        yield


def chosen(specs: list[ExpertsSpec], recipe: Recipe) -> list[ExpertsSpec]:
    """The experts modules a recipe compresses: all but those its `ignore` names.

    Raises:
        RecipeError: an `ignore` entry matches no module, or nothing is left.
    """
    names = [spec.name for spec in specs]
    ignored: set[str] = set()
    for entry in recipe.ignore:
        pattern = entry.removeprefix("re:") if entry.startswith("re:") else re.escape(entry)
        matched = {name for name in names if re.fullmatch(pattern, name)}
        if not matched:
            raise RecipeError(
                f"`ignore: {entry}` matches no experts module.",
                why=f"The modules are {names[0]} … {names[-1]}.",
                remedy="Give a module name, or `re:` and a pattern that matches whole names.",
            )
        ignored |= matched
    left = [spec for spec in specs if spec.name not in ignored]
    if not left:
        raise RecipeError("`ignore` matches all experts modules.", remedy="Leave some to compress.")
    return left


def choose_device(device: str) -> torch.device:
    """`auto` is a GPU if there is one, else the CPU; one layer at a time lives there.

    Raises:
        ModelError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"The device '{device}' cannot be used.",
            why=f"torch says: {str(error).splitlines()[0].rstrip('.')}.",
            remedy="Use `auto` or `cpu`, or install a build of torch for this device.",
        ) from error


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    Raises:
        ModelError: there is none, or none that can be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise _no_tokenizer(folder, str(error)) from error
    # without files transformers makes an empty one, of special tokens alone
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise _no_tokenizer(folder)
    return cast(PreTrainedTokenizerBase, tokenizer)


def _no_tokenizer(folder: str | Path, reason: str = "") -> ModelError:
    own_code = "trust_remote_code" in reason
    return ModelError(
        f"'{folder}' has no tokenizer that can be loaded.",
        why="It brings its own code." if own_code else "Without it text cannot be turned into the model's tokens.",
        remedy="Read that code, then allow it with --trust-remote-code."
        if own_code
        else "Fetch the tokenizer files of the model too (tokenizer.json, tokenizer_config.json).",
    )


def check_tokens(windows_NL: Tensor, vocabulary: int) -> None:
    """Raises `DataError` if a token has no row in the model's embedding."""
    if (largest := int(windows_NL.max())) >= vocabulary:
        raise DataError(
            f"The tokenizer makes the token {largest}, and the model has no embedding for it (it has {vocabulary}).",
            why="Tokenizer and weights are not of the same model.",
            remedy="Fetch tokenizer and weights of the same model again.",
        )


def _check_experts(source: DiskSource, spec: ExpertsSpec) -> None:
    """Refuses experts in eight bits that do not say so, in several types, with tensors unknown to the class, or too few."""
    if spec.top_k > spec.num_experts:
        raise ModelError(
            f"By config.json each token uses {spec.top_k} of the {spec.num_experts} experts of '{spec.name}'.",
            why="The router cannot choose so many.",
            remedy="Fetch config.json and weights of the same model again.",
        )
    keys = source.keys.sources_of(spec.name)
    dtypes = {source.checkpoint.entries[key].dtype for key in keys}
    if not dtypes <= {"F64", "F32", "F16", "BF16"} or len(dtypes) > 1:
        raise CheckpointError(
            f"The experts '{spec.name}' are stored as {', '.join(sorted(dtypes))}.",
            why="Only plain floating-point weights of one type can be factorised.",
            remedy="Use a release of the model in bfloat16, float16 or float32.",
        )
    place = commonprefix(sorted(keys)).rpartition(".")[0]  # noqa: RUF071 - of names, not of paths
    if strangers := sorted(key for key in source.keys.unknown if key.startswith(f"{place}.")):
        raise CheckpointError(
            f"The checkpoint has {len(strangers)} tensors of the experts '{spec.name}' that {type(source.model).__name__} "
            f"does not know, for example '{strangers[0]}'.",
            why="They may be scales of quantised weights, without which the experts mean something else.",
            remedy="Use an unquantised release of the model, with a transformers version that knows it.",
        )
