"""Small runs of the main path, shared by its tests: text to calibrate on, recipes, and what is compared afterwards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from molae_compress.checkpoint.reader import DTYPES
from molae_compress.recipe import Recipe
from tests.tiny import TOP_K, tiny_ids

WINDOWS, LENGTH, HELD_OUT = 6, 24, 1  # one window of so few is held out to measure errors
SLOTS = WINDOWS * LENGTH * TOP_K  # tokens that the experts of a layer see, each counted for every expert it is routed to
TEXT = "".join(f"Line {i}: {i * i % 97} apples cost {i * 7 % 13} coins, says fox number {i % 5}.\n" for i in range(60))


def text_beside(model: Path) -> Path:
    """A text file next to a model folder, written when it is first asked for."""
    path = model.parent / "calibration.txt"
    if not path.exists():
        path.write_text(TEXT)
    return path


def recipe_for(model: Path, *overrides: str, calibrated: bool = True) -> Recipe:
    """A recipe with few calibration tokens, and values replaced as `--set` replaces them."""
    content: dict[str, Any] = {"molae": 1, "model": str(model)}
    if calibrated:
        text = str(text_beside(model))
        content["calibration"] = {"data": text, "samples": WINDOWS, "sequence_length": LENGTH, "batch_size": 2}
    return Recipe.load(content, overrides)


def hashes(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """Path inside the folder -> sha256, of all files that match."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def same_every_time(folder: Path) -> dict[str, str]:
    """Hashes of the files that equal runs write equal: all but the report, which holds timings."""
    return {name: digest for name, digest in hashes(folder).items() if name != "molae_report.json"}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, as the safetensors library reads it."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def tensor_of(code: str, *shape: int) -> Tensor:
    """Random bits of a type, without NaN or infinity."""
    dtype = DTYPES[code]
    generator = torch.Generator().manual_seed(sum(code.encode()))
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).abs().add(0.5).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def bits(tensor: Tensor) -> bytes:
    """What a tensor holds, to compare it bit for bit."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def is_expert(key: str) -> bool:
    """Whether a key on disk belongs to routed experts, dense or latent."""
    return ".experts." in key


def loaded(folder: Path) -> PreTrainedModel:
    """The model of a folder in float32; refuses missing, unexpected and mismatched keys."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: keys for kind, keys in info.items() if keys}
    assert not wrong, wrong
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    """[2,9,V]: logits of fixed tokens."""
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def edit_json(path: Path, **values: Any) -> None:
    """Replaces top-level values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
