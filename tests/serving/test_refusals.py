"""What vLLM cannot serve is refused while it loads, with the reason and what to do; nothing is served half loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from molae_compress.errors import CheckpointError, ModelError
from tests.serving.engine import engine

Edit = Callable[[Any], Any]


def damaged(made: Path, folder: Path, *, config: Edit | None = None, tensors: Edit | None = None) -> Path:
    """A copy of the artifact with a dense layer, changed."""
    copy = Path(shutil.copytree(made / "mixed/artifact", folder / "artifact"))
    if config is not None:
        content = json.loads((copy / "config.json").read_text())
        config(content)
        (copy / "config.json").write_text(json.dumps(content))
    if tensors is not None:
        held = load_file(copy / "model.safetensors")
        tensors(held)
        save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def without(end: str) -> Edit:
    """Takes the first tensor away whose name ends like that."""
    return lambda held: held.pop(next(name for name in sorted(held) if name.endswith(end)))


@pytest.mark.parametrize("end", ["bank_0.core.down", "core.gate_up_proj", "decode.pivots", "encode.weight"])
def test_a_latent_tensor_is_missing(made: Path, tmp_path: Path, end: str) -> None:
    folder = damaged(made, tmp_path, tensors=without(end))
    with pytest.raises(CheckpointError, match="has no tensor"), engine(folder):
        pass


def test_a_dense_expert_is_missing(made: Path, tmp_path: Path) -> None:
    folder = damaged(made, tmp_path, tensors=without("experts.5.w2.weight"))
    with pytest.raises(CheckpointError, match="does not hold all of them"), engine(folder):
        pass


def test_a_compressed_layer_that_the_model_does_not_have(made: Path, tmp_path: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        modules = content["quantization_config"]["modules"]
        modules["model.layers.9.mlp.experts"] = modules.pop("model.layers.3.mlp.experts")

    folder = damaged(made, tmp_path, config=rename)
    with pytest.raises(ModelError, match=r"layers\.9"), engine(folder):
        pass


def test_a_clamp_that_the_kernel_does_not_have(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made / "gpt_oss-layer/artifact", tmp_path / "artifact"))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"swiglu_limit": 1.0}))
    with pytest.raises(ModelError, match="computes something else than the model"), engine(folder):
        pass


def test_another_format(made: Path, tmp_path: Path) -> None:
    folder = damaged(made, tmp_path, config=lambda content: content["quantization_config"].update(format=2))
    with pytest.raises(ModelError, match="format 2"), engine(folder):
        pass


def test_adapters(made: Path) -> None:
    with pytest.raises(ModelError, match="LoRA"), engine(made / "mixed/artifact", enable_lora=True):
        pass


def test_moving_experts_between_processes(made: Path) -> None:
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True}
    with (
        pytest.raises((NotImplementedError, RuntimeError, ValueError)),
        engine(made / "qwen3_moe-default/artifact", own_process=True, **options),
    ):
        pass
