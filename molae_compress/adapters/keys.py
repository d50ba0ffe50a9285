"""From the keys of a checkpoint to the parameters of a model, and back, by transformers' own conversion mapping.

A checkpoint of the hub rarely names its tensors as the model class does: experts lie there one by one and are stacked
on load, prefixes differ. transformers keeps the rules, per architecture, as regular expressions and small operations;
they are followed here exactly as its loader follows them, so that a model is read one module at a time from any
checkpoint that `from_pretrained` reads.

The functions of transformers used for this are not quite public. No other file of the package uses them, and the tests
beside it say which of them changed, should one change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from molae_compress.errors import CheckpointError, ModelError

try:
    from transformers.core_model_loading import (
        PrefixChange,
        WeightConverter,
        WeightRenaming,
        WeightTransform,
        apply_converters,
        apply_renamings,
        dot_natural_key,
        rename_source_key,
    )
except ImportError as error:
    raise ModelError(
        f"transformers {transformers.__version__} is too old to compress with.",
        why="It loads and serves compressed models, but cannot yet name the tensors of a checkpoint.",
        remedy="Compress in an environment with `transformers>=5.23,<6`.",
    ) from error


@dataclass
class _Group:
    """Source keys that are converted together, and the targets that come out.

    `renamed` is the key under which the loader collects the group; without a converter it is the only target.
    """

    renamed: str
    converter: WeightConverter | None
    targets: tuple[str, ...]
    sources: list[tuple[str, str]] = field(default_factory=list)


class _Transforms:
    """The conversion mapping of a model in one direction."""

    def __init__(self, transforms: list[WeightTransform]) -> None:
        self.renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self.by_pattern = {pattern: converter for converter in self.converters for pattern in converter.source_patterns}


class KeyMap:
    """Which source keys make which parameters and persistent buffers of a model.

    Attributes:
        targets: name of a parameter or persistent buffer -> the source keys that make it, in the order in which they
            are joined. Tied parameters that the checkpoint does not store have the keys of the one they are tied to.
        unknown: source keys that no parameter of the class takes (heads for multi-token prediction and the like).
        missing: parameters and persistent buffers that no source key makes.
    """

    def __init__(self, model_on_meta: PreTrainedModel, source_keys: Iterable[str]) -> None:
        """`model_on_meta` needs no weights; `source_keys` are the names of the tensors in the checkpoint."""
        self._model = model_on_meta
        self._shapes = {name: tensor.shape for name, tensor in model_on_meta.state_dict().items()}
        self._load = _Transforms(get_model_conversion_mapping(model_on_meta))
        # As transformers saves a model that was not loaded: a change of prefix depends on what was loaded.
        saving = get_model_conversion_mapping(model_on_meta, add_legacy=False)[::-1]
        self._save = _Transforms(
            [transform.reverse_transform() for transform in saving if not isinstance(transform, PrefixChange)]
        )
        groups, self.unknown = self._grouped(source_keys)
        # Target -> the group that makes it, and its name among the targets of that group.
        self._makers = {target: (group, target) for group in groups for target in group.targets if target in self._shapes}
        ties = dict(model_on_meta.all_tied_weights_keys)
        for tied, original in ties.items():
            if tied in self._makers:
                self._makers.setdefault(original, self._makers[tied])
        for tied, original in ties.items():
            if original in self._makers:
                self._makers.setdefault(tied, self._makers[original])
        self.targets = {target: tuple(key for key, _ in group.sources) for target, (group, _) in self._makers.items()}
        self.missing = set(self._shapes) - set(self.targets)

    def sources_of(self, module_name: str) -> set[str]:
        """All source keys that feed parameters and persistent buffers of a module; `""` is the whole model."""
        return {key for target in self.targets if _is_under(target, module_name) for key in self.targets[target]}

    def materialise(self, prefix: str, read: Callable[[str], Tensor], *, exclude: str | None = None) -> dict[str, Tensor]:
        """The parameters and persistent buffers of a module, made from source tensors by transformers' converters.

        One target is made at a time, and its source tensors are dropped as soon as they are used. Nothing is cast. A
        `read` that returns tensors on the meta device checks the shapes of a checkpoint without reading it.

        Args:
            prefix: name of a module or of a parameter; `""` is the whole model.
            read: returns the source tensor of a key.
            exclude: name of a module or parameter inside that is left out.

        Returns:
            Target name -> tensor, of the shape the model declares and the type the checkpoint stores.

        Raises:
            CheckpointError: source tensors cannot be joined, or give another shape than the model declares.
        """
        wanted: dict[str, list[tuple[str, str]]] = {}
        groups: dict[str, _Group] = {}
        for target, (group, output) in self._makers.items():
            if _is_under(target, prefix) and not (exclude is not None and _is_under(target, exclude)):
                groups[group.renamed] = group
                wanted.setdefault(group.renamed, []).append((target, output))
        made: dict[str, Tensor] = {}
        for renamed, group in groups.items():
            outputs = self._convert(group, read)
            made |= {target: outputs[output] for target, output in wanted[renamed]}
        return made

    def stored_name(self, name: str) -> str:
        """The key under which `save_pretrained` stores a parameter, if it is saved as it is.

        It differs from `name` where the checkpoints of an architecture call the module otherwise.
        """
        return apply_renamings(name, self._save.renamings)

    def collected(self, names: Iterable[str]) -> set[str]:
        """The keys under which `save_pretrained` collects parameters: equal for those that it stores together."""
        return {apply_converters(name, self._save.converters)[0] for name in names}

    def survives(self, name: str) -> bool:
        """Whether a parameter of this name is stored and loaded as it is.

        No converter may take it in either direction, and the key under which `save_pretrained` stores it
        (`stored_name`) must load as `name` again.
        """
        if apply_converters(name, self._save.converters)[1] is not None:
            return False
        return rename_source_key(self.stored_name(name), self._load.renamings, self._load.converters) == (name, None)

    def _grouped(self, source_keys: Iterable[str]) -> tuple[list[_Group], set[str]]:
        """Groups in the order in which the loader meets them, and the keys that belong to none."""
        prefix, declared = self._model.base_model_prefix, dict(self._shapes)
        groups: dict[str, _Group] = {}
        unknown: set[str] = set()
        # The loader's order: experts are stacked in it.
        for key in sorted(source_keys, key=dot_natural_key):
            renamed, pattern = rename_source_key(key, self._load.renamings, self._load.converters, prefix, declared)
            if renamed not in declared and key in declared:
                renamed, pattern = rename_source_key(key, [], [], prefix, declared)
            converter = self._load.by_pattern[pattern] if pattern is not None else None
            group = groups.get(renamed)
            # The loader ignores a second key for a parameter that is complete with the first.
            if renamed not in declared or (group is not None and (converter is None or group.converter is None)):
                unknown.add(key)
                continue
            if group is None:
                group = groups[renamed] = _Group(renamed, converter, _targets(renamed, converter))
            group.sources.append((key, pattern or key))
        return list(groups.values()), unknown

    def _convert(self, group: _Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            outputs = {group.renamed: read(group.sources[0][0])}
        else:
            converter = deepcopy(group.converter)
            _collect(group, converter, read)
            try:
                with torch.no_grad():
                    converted = converter.convert(group.renamed, model=self._model, config=self._model.config)
            except (RuntimeError, ValueError, IndexError, KeyError) as error:
                raise self._unfit(group, f"cannot be joined ({error})") from error
            outputs = {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}
        if set(outputs) != set(group.targets):
            raise self._unfit(group, f"give {sorted(outputs)} instead of {sorted(group.targets)}")
        for target, tensor in outputs.items():
            if target in self._shapes and tensor.shape != self._shapes[target]:
                raise self._unfit(group, f"give the shape {list(tensor.shape)} instead of {list(self._shapes[target])}")
        return outputs

    def _unfit(self, group: _Group, fault: str) -> CheckpointError:
        first = group.sources[0][0]
        named = f"'{first}'" if len(group.sources) == 1 else f"'{first}' and {len(group.sources) - 1} others"
        return CheckpointError(
            f"The tensors of the checkpoint for '{group.renamed}' ({named}) {fault}.",
            why="The checkpoint lacks tensors, or does not fit its config.json.",
            remedy="Download config.json and all weights files of the same version of the model again.",
        )


def _collect(group: _Group, converter: WeightConverter, read: Callable[[str], Tensor]) -> None:
    # A function of its own: nothing but the converter may hold a source tensor once it starts to join them.
    for pattern in dict.fromkeys(pattern for _, pattern in group.sources):
        keys = [key for key, taken_by in group.sources if taken_by == pattern]
        for key, tensor in zip(keys, _read_all(keys, read), strict=True):
            # Typed as a future there, which only an asynchronous loader passes.
            converter.add_tensor(group.renamed, key, pattern, cast(Any, tensor))


def _read_all(keys: list[str], read: Callable[[str], Tensor]) -> list[Tensor]:
    """The source tensors of a group, as parts of one block if they are alike.

    The memory of one block goes back to the system as soon as it is freed, that of many small tensors often does not.
    """
    first = read(keys[0])
    if len(keys) == 1:
        return [first]
    parts = list(first.new_empty((len(keys), *first.shape)))
    parts[0].copy_(first)
    for index, key in enumerate(keys[1:], start=1):
        tensor = read(key)
        if tensor.shape == first.shape and tensor.dtype == first.dtype:
            parts[index].copy_(tensor)
        else:
            parts[index] = tensor
    return parts


def _is_under(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _targets(renamed: str, converter: WeightConverter | None) -> tuple[str, ...]:
    """All targets that a converter makes where the first of its target patterns became `renamed`."""
    if converter is None or len(converter.target_patterns) == 1:
        return (renamed,)
    first, *others = converter.target_patterns
    return (renamed, *(renamed.replace(first, other, 1) for other in others))
