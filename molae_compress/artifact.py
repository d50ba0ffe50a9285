"""From finished layers to an artifact: a Hugging Face model folder, written whole or not at all.

Every tensor of the source is either replaced by the plan or copied bit for bit, also those the model class does not
know. The folder is built in the work directory and appears at its place by one rename.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from molae_compress.budget import Shapes
from molae_compress.checkpoint import (
    Checkpoint,
    TensorSource,
    WorkDirectory,
    WrittenShards,
    assert_accounted,
    companion_files,
    write_file,
    write_shards,
)
from molae_compress.errors import ModelError
from molae_compress.modeling.quantizer import MolaeConfig
from molae_compress.recipe import Recipe
from molae_compress.report.report import FILE_NAME as REPORT
from molae_compress.source import DiskSource


def check_names(source: DiskSource, shapes: Shapes) -> None:
    """Refuses a model whose loader would rename or convert the tensors an artifact adds."""
    for spec in source.specs:
        shape = shapes.get(spec.name)
        for name in shape.tensors(spec) if shape is not None else ():
            if not source.keys.survives(f"{spec.name}.{name}"):
                raise ModelError(
                    f"transformers would not load '{spec.name}.{name}' under its name in {type(source.model).__name__}.",
                    remedy="Report the model class to the project.",
                )


def write_weights(
    folder: Path, source: DiskSource, shapes: Shapes, work: WorkDirectory, stage: str, recipe: Recipe
) -> WrittenShards:
    """Shards of the artifact: latent tensors from the work directory, everything else from the source checkpoint."""
    replaced: dict[str, str] = {}  # source key -> module whose latent form replaces it
    for name, shape in shapes.items():
        if shape is not None:
            replaced |= dict.fromkeys(source.keys.sources_of(name), name)
    tensors: list[TensorSource] = []
    written: set[str] = set()
    copied: list[str] = []
    for key in source.checkpoint.entries:
        module = replaced.get(key)
        if module is None:
            copied.append(key)
            tensors.append(TensorSource.copied(source.checkpoint, key))
        elif module not in written:
            written.add(module)
            stored = Checkpoint.open(work.path(stage, module))
            tensors += [
                TensorSource.stored(stored, name, source.keys.stored_name(f"{module}.{name}")) for name in stored.entries
            ]
    assert_accounted(source.checkpoint.entries, replaced, copied)
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
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    entries = {name: shape.to_dict() for name, shape in shapes.items() if shape is not None}
    if entries:
        config["quantization_config"] = MolaeConfig(modules=entries).to_dict()
    write_file(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    write_file(folder / "recipe.yaml", recipe.dump().encode())


def is_artifact(folder: Path) -> bool:
    """Whether a folder is a finished artifact of ours."""
    return (folder / REPORT).exists() and (folder / "config.json").exists()
