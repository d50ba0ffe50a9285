"""The latent tensors of an artifact: found in its files, and cut out of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from molae_compress.checkpoint import Checkpoint, check_finite
from molae_compress.errors import CheckpointError, ModelError
from molae_compress.layouts import LAYER_NUMBER
from molae_compress.serving.share import Cut
from molae_compress.tensors import AnyShape, ExpertsSpec

# What a latent tensor is called, whatever lies in front of it.
LATENT_NAME = (
    r"\.(?:bank_\d+\.)?(?:(?:(?:gate_|up_)?encode|decode)\.(?:weight|pivots)|decode_bias"
    r"|core\.(?:gate_up|gate|up|down|bias|(?:gate_up|up|down)_proj|(?:gate_up|up)_proj_bias))$"
)


def module_of(prefix: str, modules: Mapping[str, Any]) -> str | None:
    """The compressed module that another program's experts `prefix` are, or None if they stayed dense.

    Programs name the modules inside a layer each in their way; what they agree on is the number of the layer.

    Args:
        prefix: path of the experts in that program, e.g. `model.layers.3.block_sparse_moe.experts`.
        modules: by paths in transformers.

    Raises:
        ModelError: the layer has several compressed modules, and none is called like that.
    """
    if prefix in modules:
        return prefix
    same = [name for name in modules if _layer(name) == _layer(prefix)]
    tails = [name for name in same if _in_layer(name) == _in_layer(prefix)]
    if len(tails or same) > 1:
        raise ModelError(
            f"Which of the compressed modules {', '.join(same)} the experts '{prefix}' are cannot be told.",
            remedy="Expand the model with `molae-compress expand`, and serve the result.",
        )
    return next(iter(tails or same), None)


def find_tensors(checkpoint: Checkpoint, module: str, spec: ExpertsSpec, shape: AnyShape) -> dict[str, str]:
    """Names in the checkpoint of the latent tensors of a module, by those of `shape.tensors`.

    A folder that transformers saved may have them below the path of the original checkpoint instead of the module's.

    Raises:
        CheckpointError: one is missing, there twice, or of another size than config.json says.
    """
    found: dict[str, str] = {}
    for name, size in shape.tensors(spec).items():
        whole = f"{module}.{name}"
        same = [whole] if whole in checkpoint.entries else []
        same = same or [key for key in checkpoint.entries if key.endswith(f".{name}") and _layer(key) == _layer(module)]
        same = [key for key in same if _in_layer(key) == _in_layer(whole)] or same  # a layer may have several modules
        if len(same) != 1 or checkpoint.entries[same[0]].shape != size:
            shapes = {key: checkpoint.entries[key].shape for key in same}
            raise CheckpointError(
                f"The artifact '{checkpoint.path}' has no tensor '{whole}' of shape {size}"
                + (f", but {shapes}." if shapes else "."),
                why="Its config.json says that these experts are compressed.",
                remedy="Fetch the artifact again; `molae-compress verify` tells whether it is whole.",
            )
        found[name] = same[0]
    return found


def read_cuts(checkpoint: Checkpoint, stored: Mapping[str, str], cuts: Mapping[str, Cut]) -> dict[str, Tensor]:
    """Reads what a share of one experts module needs, and nothing else.

    Args:
        checkpoint: the artifact.
        stored: names in the checkpoint, by the names that cuts have for them.
        cuts: by the names under which the tensors are wanted.

    Raises:
        CheckpointError: a tensor cannot be read, or is not finite.
    """
    tensors = {}
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name, cut in cuts.items():
            key = stored[cut.stored]
            file = checkpoint.entries[key].file
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                tensors[name] = _cut_out(opened[file].get_slice(key), cut)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"The tensor '{key}' in '{file}' cannot be read ({error}).",
                    remedy="Check that the file still exists and that its disk is healthy and mounted.",
                ) from error
            check_finite(key, tensors[name].flatten(), where=f"in '{file}'")
    return tensors


def _cut_out(stored: Any, cut: Cut) -> Tensor:
    """Pieces of a stored tensor, put together in the order of the cut."""
    blocks = [stored[tuple(slice(run.start, run.stop) for run in runs)] for runs in product(*cut.parts)]
    if len(blocks) == 1:
        return torch.as_tensor(blocks[0]).contiguous()
    whole: Tensor = blocks[0].new_empty(cut.shape)
    # The pieces come in the order of `product`: each goes where the lengths of the runs before its own end.
    places = [_places(runs) for runs in cut.parts]
    for block, place in zip(blocks, product(*places), strict=True):
        whole[place] = block
    return whole


def _places(runs: tuple[range, ...]) -> list[slice]:
    ends = [0]
    for run in runs:
        ends.append(ends[-1] + len(run))
    return [slice(start, end) for start, end in pairwise(ends)]


def _layer(name: str) -> str | None:
    number = LAYER_NUMBER.search(name)
    return None if number is None else number[1]


def _in_layer(name: str) -> str:
    number = LAYER_NUMBER.search(name)
    return name if number is None else name[number.end() :]
