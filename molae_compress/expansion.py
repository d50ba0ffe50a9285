"""An artifact back to a plain dense checkpoint, streamed: any runtime can load the result, at the original's size.

Every latent module becomes expert tensors in the format of its model family; all other tensors are copied bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molae_compress.adapters.saving import in_hub_format
from molae_compress.adapters.skeleton import empty_, fill_, read_config, skeleton
from molae_compress.artifact import copy_companions, is_artifact
from molae_compress.checkpoint import (
    TensorSource,
    WorkDirectory,
    assert_accounted,
    check_free_space,
    check_output_folder,
    check_places,
    put_at,
    write_file,
    write_shards,
)
from molae_compress.checkpoint.writer import disk_errors
from molae_compress.compress import Progress, silent
from molae_compress.errors import ModelError
from molae_compress.modeling.expand import dense_module
from molae_compress.modeling.latent import LatentExperts
from molae_compress.modeling.quantizer import installed_version
from molae_compress.source import DiskSource

_STAGE = "expand"
_SHARD_BYTES = 5_000_000_000


def expand(
    folder: str | Path,
    out: str | Path,
    *,
    work_dir: str | Path | None = None,
    fresh: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the dense checkpoint that an artifact stands for; killed, the same call goes on where it stopped.

    Args:
        folder: the artifact.
        out: folder to write; must not exist or be empty. It appears when it is complete.
        work_dir: where finished layers wait meanwhile; `<out>.expand-work` by default, removed at the end.
        fresh: start over instead of going on.
        trust_remote_code: allow code from the artifact's folder.
        progress: called with a stage, what is done of it, and of how much.

    Raises:
        ModelError: the folder holds no latent experts.
        CheckpointError: it cannot be read, or `out` cannot be written.
    """
    out, progress = Path(out).expanduser().resolve(), progress or silent
    path = Path(work_dir).expanduser().resolve() if work_dir is not None else out.with_name(f"{out.name}.expand-work")
    check_output_folder(out, ours=lambda _: False)
    source = DiskSource.open(str(folder), device=torch.device("cpu"), trust_remote_code=trust_remote_code, dense=False)
    check_places(out, path, source.folder.resolve(), ours=is_artifact)
    latent = {name: module for name, module in source.model.named_modules() if isinstance(module, LatentExperts)}
    if not latent:
        raise ModelError(f"'{folder}' holds no latent experts.", remedy="Give a folder that `apply` wrote.")
    dense_bytes = sum(module.spec.dense_numel * next(module.parameters()).element_size() for module in latent.values())
    check_free_space(out.parent, source.checkpoint.total_bytes + 2 * dense_bytes, "the dense checkpoint")
    inputs = {
        "artifact": source.checkpoint.fingerprint(),
        "config": hashlib.sha256((source.folder / "config.json").read_bytes()).hexdigest(),
        "molae_compress": installed_version(),
    }
    config = read_config(source.folder, trust_remote_code=trust_remote_code)
    del config.quantization_config
    bare = skeleton(config, trust_remote_code=trust_remote_code)
    with WorkDirectory.open(path, stage_inputs={_STAGE: inputs}, fresh=fresh) as work:
        layers = sorted({module.spec.layer for module in latent.values()})
        for done, layer in enumerate(layers):
            if f"layer.{layer}" not in work.done(_STAGE):
                inside = {name: module for name, module in latent.items() if module.spec.layer == layer}
                _expand_layer(source, bare, f"layer.{layer}", inside, work)
            progress(_STAGE, done + 1, len(layers))
        # beside the result, so that it gets there by a rename also if the work directory lies on another disk
        staging = out.with_name(f".{out.name}.{hashlib.sha256(str(path).encode()).hexdigest()[:8]}.partial")
        put_at(out, staging, lambda: _write(staging, source, latent, [f"layer.{layer}" for layer in layers], work))
        work.remove()


def _write(
    folder: Path, source: DiskSource, latent: Mapping[str, LatentExperts], items: Sequence[str], work: WorkDirectory
) -> None:
    """The dense checkpoint: expert tensors from the work directory, all others from the artifact."""
    with disk_errors(folder):
        folder.mkdir(parents=True)
    replaced = {key for name, module in latent.items() for key in _latent_keys(source, name, module)}
    copied = [key for key in source.checkpoint.entries if key not in replaced]
    assert_accounted(source.checkpoint.entries, replaced, copied)
    tensors = [TensorSource.copied(source.checkpoint, key) for key in copied]
    for item in items:
        stored = work.path(_STAGE, item)
        tensors += [TensorSource.stored(stored, key, key) for key in work.load(_STAGE, item)[1]["keys"]]
    write_shards(folder, tensors, max_shard_size=_SHARD_BYTES)
    copy_companions(folder, source.folder)
    content = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    del content["quantization_config"]
    write_file(folder / "config.json", (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _latent_keys(source: DiskSource, name: str, module: LatentExperts) -> set[str]:
    """Keys of an artifact that hold the latent tensors of a module."""
    return {key for tensor in module.shape.tensors(module.spec) for key in source.keys.sources_of(f"{name}.{tensor}")}


def _expand_layer(
    source: DiskSource, bare: PreTrainedModel, item: str, latent: Mapping[str, LatentExperts], work: WorkDirectory
) -> None:
    """All experts of a layer at once: some families store several modules together."""
    weights: dict[str, Tensor] = {}
    for name, module in latent.items():
        fill_(source.model, source.keys.materialise(name, source.checkpoint.read), source.device, keep_dtype=True)
        stock = dense_module(module)
        weights |= {f"{name}.{key}": stock.get_parameter(key).detach() for key in module.layout.weight_names(stock)}
        empty_(module)
    named = in_hub_format(bare, weights)
    work.commit(_STAGE, item, named, {"keys": list(named)})
