"""From finished layers to an artifact: a Hugging Face model folder, written whole or not at all.

Every tensor of the source is either replaced by the plan or copied bit for bit, also those the model class does not
know. The folder is built in the work directory and appears at its place by one rename.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from molae_compress.adapters.keys import KeyMap
from molae_compress.budget import Shapes
from molae_compress.checkpoint import (
    Checkpoint,
    TensorSource,
    WorkDirectory,
    WrittenShards,
    assert_accounted,
    companion_files,
    without_quantization,
    write_file,
    write_shards,
)
from molae_compress.errors import ModelError
from molae_compress.modeling.quantizer import MolaeConfig
from molae_compress.recipe import Recipe
from molae_compress.report.report import FILE_NAME as REPORT
from molae_compress.report.report import RECIPE
from molae_compress.source import DiskSource
from molae_compress.tensors import ExpertsSpec, LatentShape

NO_ROUTERS = "Leave `heal.router_steps` out of the recipe."


def check_names(keys: KeyMap, specs: Sequence[ExpertsSpec], shapes: Shapes) -> None:
    """Refuses a model whose loader would rename or convert the tensors an artifact adds."""
    for spec in specs:
        shape = shapes.get(spec.name)
        for name in shape.tensors(spec) if shape is not None else ():
            if not keys.survives(f"{spec.name}.{name}"):
                serving = isinstance(shape, LatentShape) and shape.form == "layer"
                raise ModelError(
                    f"transformers would not load the tensor '{spec.name}.{name}' under its name.",
                    why="Rules that convert checkpoints of this architecture would take it for another.",
                    remedy="Use `basis.profile: quality`." if serving else "Report the model class to the project.",
                )


def check_together(keys: Mapping[str, set[str]], shapes: Shapes) -> None:
    """Refuses to leave experts dense that are stored together with experts that become latent.

    Args:
        keys: experts modules of the model, and the keys under which their weights are stored.
        shapes: what becomes of them.
    """
    latent = {key: name for name, own in keys.items() if shapes.get(name) is not None for key in own}
    for name, own in keys.items():
        both = own & latent.keys() if shapes.get(name) is None else set()
        if both:
            raise ModelError(
                f"The experts '{name}' would stay dense, but '{latent[min(both)]}' would not.",
                why="The checkpoint stores both together.",
                remedy="List both under `ignore`, or neither, and give a budget at which both become smaller.",
            )


def replaced_keys(source: DiskSource, shapes: Shapes) -> dict[str, list[str]]:
    """Keys of the checkpoint that latent modules replace, and the modules that replace each.

    Raises:
        ModelError: as `check_together`.
    """
    keys = {spec.name: source.expert_keys(spec) for spec in source.specs}
    check_together(keys, shapes)
    replaced: dict[str, list[str]] = {}
    for name, own in keys.items():
        if shapes.get(name) is not None:
            for key in own:
                replaced.setdefault(key, []).append(name)
    return replaced


def own_keys(source: DiskSource, names: Iterable[str], *, remedy: str) -> dict[str, str]:
    """The key of the checkpoint that holds each of some parameters, as it is and nothing else.

    Raises:
        ModelError: there is none of a parameter; it ends with `remedy`.
    """
    makers = Counter(key for keys in source.keys.targets.values() for key in keys)
    found: dict[str, str] = {}
    for name in names:
        keys = source.keys.targets[name]
        whole = source.checkpoint.entries[keys[0]].shape == tuple(source.model.get_parameter(name).shape)
        if len(keys) > 1 or makers[keys[0]] > 1 or not whole:
            raise ModelError(
                f"The trained '{name}' cannot be written back.",
                why=f"The checkpoint does not hold it as one tensor of its own, but in '{keys[0]}'.",
                remedy=remedy,
            )
        found[name] = keys[0]
    return found


def write_weights(
    folder: Path,
    source: DiskSource,
    shapes: Shapes,
    work: WorkDirectory,
    stage: str,
    recipe: Recipe,
    routers: Mapping[str, Tensor] | None = None,
) -> WrittenShards:
    """Shards of the artifact: latent tensors from the work directory, trained `routers`, else from the checkpoint."""
    replaced = replaced_keys(source, shapes)
    trained = {key: (routers or {})[name] for name, key in own_keys(source, routers or (), remedy=NO_ROUTERS).items()}
    tensors: list[TensorSource] = []
    written: set[str] = set()
    copied = [key for key in source.checkpoint.entries if key not in replaced and key not in trained]
    for key in source.checkpoint.entries:
        if key in trained:
            tensors.append(TensorSource.of(key, trained[key]))
        elif key not in replaced:
            tensors.append(TensorSource.copied(source.checkpoint, key))
        for module in replaced.get(key, ()):
            if module in written:
                continue
            written.add(module)
            stored = Checkpoint.open(work.path(stage, module))
            tensors += [
                TensorSource.stored(stored, name, source.keys.stored_name(f"{module}.{name}")) for name in stored.entries
            ]
    assert_accounted(source.checkpoint.entries, [*replaced, *trained], copied)
    return write_shards(folder, tensors, max_shard_size=recipe.output.max_shard_size)


def copy_companions(folder: Path, source_folder: Path) -> None:
    """Copies tokenizer, generation and licence files."""
    for path in companion_files(source_folder):
        target = folder / path.relative_to(source_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def write_companions(folder: Path, source: DiskSource, shapes: Shapes, recipe: Recipe) -> None:
    """Config with the latent shapes, recipe, and the source's tokenizer and generation files."""
    copy_companions(folder, source.folder)
    config = without_quantization(json.loads((source.folder / "config.json").read_text(encoding="utf-8")))
    entries = {name: shape.to_dict() for name, shape in shapes.items() if shape is not None}
    if entries:
        config["quantization_config"] = MolaeConfig(modules=entries).to_dict()
    write_file(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    write_file(folder / RECIPE, recipe.dump().encode())


def is_artifact(folder: Path) -> bool:
    """Whether a folder is a finished artifact of ours."""
    return (folder / REPORT).exists() and (folder / "config.json").exists()
