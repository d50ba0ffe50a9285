"""Serving without an engine: what each of several processes holds of an artifact, and that together it is all of it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from molae_compress import serving
from molae_compress.adapters import find_experts
from molae_compress.checkpoint import Checkpoint
from molae_compress.errors import CheckpointError, ModelError
from molae_compress.layouts import layout_of
from molae_compress.modeling import LatentExperts, MolaeConfig, attach_
from molae_compress.serving.artifact import Module, ServedArtifact, empty_share, kernel_computes
from molae_compress.serving.share import Share, cut_layer_form, runs_of
from molae_compress.serving.stored import LATENT_NAME, find_tensors, module_of
from molae_compress.tensors import AnyShape, LatentShape
from tests.test_modeling import SHAPES, random_latent, some_routing
from tests.tiny import EXPERTS, HIDDEN, INTERMEDIATE, tiny_model

Stored = Callable[[str, AnyShape], tuple[Path, LatentExperts]]
GROUPED = {name: shape for name, shape in SHAPES.items() if name != "layer"}
SPLITS = [(1, 1), (1, 2), (3, 1), (2, 2)]  # processes over experts, over channels


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "mixtral"])
def family(request: pytest.FixtureRequest) -> str:
    """Plain experts; transposed, interleaved and biased ones; and one whose layers another program names in its own way."""
    return str(request.param)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """`saved`, written once: a folder to read, never to write into."""
    return cache(lambda family, shape: saved(tmp_path_factory.mktemp(family), family, shape))


def saved(folder: Path, family: str, shape: AnyShape) -> tuple[Path, LatentExperts]:
    """An artifact whose last layer is compressed, and the module of it."""
    model = tiny_model(family)
    spec = find_experts(model)[-1]
    attach_(model, {spec.name: (shape, random_latent(spec, shape))}).save_pretrained(folder)
    latent = model.get_submodule(spec.name)
    assert isinstance(latent, LatentExperts)
    return folder, latent


def opened(folder: Path) -> ServedArtifact:
    shapes = MolaeConfig(**json.loads((folder / "config.json").read_text())["quantization_config"]).shapes()
    return ServedArtifact(AutoConfig.from_pretrained(folder), shapes, lambda: folder, implementation="eager")


def claimed(artifact: ServedArtifact) -> Module:
    module = artifact.claim("model.layers.1.a_block_of_its_own.experts")
    assert module is not None
    return module


def shares(experts: int, channels: int) -> list[Share]:
    """Shares of processes that divide experts and channels between them."""
    bounds = [EXPERTS * rank // experts for rank in range(experts + 1)]
    width = INTERMEDIATE // channels
    return [
        Share(tuple(range(bounds[e], bounds[e + 1])), range(c * width, (c + 1) * width), adds_bias=c == 0)
        for e, c in product(range(experts), range(channels))
    ]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("shape", GROUPED.values(), ids=GROUPED.keys())
def test_shares_in_grouped_form_add_up(family: str, shape: AnyShape, split: tuple[int, int], stored: Stored) -> None:
    folder, whole = stored(family, shape)
    x_TH, index_TK, weight_TK = some_routing()
    with torch.no_grad():
        want_TH = whole.routed(x_TH, index_TK, weight_TK)
        got_TH, numel = torch.zeros_like(want_TH), 0
        for share in shares(*split):
            artifact = opened(folder)
            module = claimed(artifact)
            latent, cuts = empty_share(module, share, torch.float32, torch.device("cpu"))
            assert {name: tuple(part.shape) for name, part in cuts.items()} == latent.shape.tensors(latent.spec)
            tensors = artifact.read(module, cuts)
            if not share.adds_bias:
                tensors |= {name: value * 0 for name, value in tensors.items() if name.endswith("decode_bias")}
            latent.load_latent_(tensors)
            got_TH += latent.routed(x_TH, index_TK, weight_TK)
            numel += sum(value.numel() for name, value in tensors.items() if "core" in name)
    torch.testing.assert_close(got_TH, want_TH, rtol=1e-5, atol=1e-5)
    # Cores are held once; only bases are in several processes.
    assert numel == sum(value.numel() for name, value in whole.latent_tensors().items() if "core" in name)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_shares_in_layer_form_hold_every_number_of_the_cores_once(
    family: str, split: tuple[int, int], tmp_path: Path
) -> None:
    folder, whole = saved(tmp_path, family, SHAPES["layer"])
    artifact = opened(folder)
    module = claimed(artifact)
    assert isinstance(module.shape, LatentShape)
    held = whole.latent_tensors()
    parts = [artifact.read(module, cut_layer_form(module.spec, module.shape, share)) for share in shares(*split)]
    for name, tensor in held.items():
        found = [part[name] for part in parts]
        if name in ("encode.weight", "decode.weight"):
            assert all(torch.equal(part, tensor) for part in found)
        elif name != "decode_bias":
            assert torch.equal(torch.cat([part.flatten() for part in found]).sort().values, tensor.flatten().sort().values)


def test_a_share_of_channels_keeps_the_order_of_the_models_rows(stored: Stored) -> None:
    """gpt_oss alternates gate and up rows, the others store one after the other: a share does as its model."""
    for family, rows in (
        ("gpt_oss", [*range(INTERMEDIATE, 2 * INTERMEDIATE)]),
        ("qwen3_moe", [*range(12, 24), *range(36, 48)]),
    ):
        folder, whole = stored(family, SHAPES["interpolative"])
        artifact = opened(folder)
        module = claimed(artifact)
        share = Share(tuple(range(EXPERTS)), range(INTERMEDIATE // 2, INTERMEDIATE))
        _, cuts = empty_share(module, share, torch.float32, torch.device("cpu"))
        assert torch.equal(artifact.read(module, cuts)["core.gate_up"], whole.latent_tensors()["core.gate_up"][:, rows])


def test_a_group_that_is_torn_apart_gives_every_expert_a_copy(tmp_path: Path) -> None:
    shape = LatentShape("grouped", 12, 20, 4, 2)
    folder, whole = saved(tmp_path, "qwen3_moe", shape)
    artifact = opened(folder)
    latent, cuts = empty_share(claimed(artifact), Share((3, 4, 5), range(INTERMEDIATE)), torch.float32, torch.device("cpu"))
    basis = whole.latent_tensors()["encode.weight"].view(2, 12, HIDDEN)
    assert latent._banks[0].shape.input_group == 1
    assert torch.equal(artifact.read(claimed(artifact), cuts)["bank_0.encode.weight"].view(3, 12, HIDDEN), basis[[0, 1, 1]])


def changed(folder: Path, change: str) -> None:
    """Damages the weights of an artifact."""
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(path)
    name = next(name for name in tensors if name.endswith("core.down"))
    if change == "missing":
        del tensors[name]
    elif change == "nan":
        tensors[name][0, 0] = float("nan")
    else:
        tensors[name] = tensors[name][1:].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "words"), [("missing", "has no tensor"), ("short", "has no tensor"), ("nan", "NaN")])
def test_damaged_weights_are_refused(change: str, words: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "mixtral", SHAPES["interpolative"])
    changed(folder, change)
    artifact = opened(folder)
    module = claimed(artifact)
    _, cuts = empty_share(module, shares(1, 1)[0], torch.float32, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=words):
        artifact.read(module, cuts)


def test_one_module_is_served_once(stored: Stored) -> None:
    folder, _ = stored("qwen3_moe", SHAPES["interpolative"])
    artifact = opened(folder)
    assert artifact.claim("model.layers.0.mlp.experts") is None
    module = claimed(opened(folder))
    with pytest.raises(ModelError, match=r"no experts for the compressed modules model\.layers\.1\.mlp\.experts"):
        artifact.read(module, {})
    claimed(artifact)
    assert artifact.read(module, {}) == {}
    with pytest.raises(ModelError, match="both the compressed module"):
        artifact.claim("draft.layers.1.mlp.experts")


def test_modules_are_told_by_the_number_of_their_layer() -> None:
    names = dict.fromkeys(("model.layers.1.mlp.experts", "model.layers.11.mlp.experts"))
    assert module_of("language_model.model.layers.11.moe.experts", names) == "model.layers.11.mlp.experts"
    assert module_of("model.layers.2.mlp.experts", names) is None
    two = dict.fromkeys(("model.layers.1.text_moe.experts", "model.layers.1.vision_moe.experts"))
    assert module_of("model.layers.1.vision_moe.experts", two) == "model.layers.1.vision_moe.experts"
    with pytest.raises(ModelError, match="cannot be told"):
        module_of("model.layers.1.mlp.experts", two)


def test_every_latent_name_is_taken_out_of_the_stream_and_no_other(family: str, stored: Stored) -> None:
    for shape in SHAPES.values():
        folder, whole = stored(family, shape)
        entries = Checkpoint.open(folder).entries
        latent = set(find_tensors(Checkpoint.open(folder), whole.spec.name, whole.spec, shape).values())
        assert {key for key in entries if re.search(LATENT_NAME, key)} == latent
        assert len(latent) == len(whole.latent_tensors())


@pytest.mark.parametrize(
    ("family", "kernel", "changes", "same"),
    [
        ("qwen3_moe", "silu", {}, True),
        ("qwen3_moe", "gelu", {}, False),
        ("qwen3_moe", "swigluoai", {}, False),
        ("qwen3_moe", "a new one", {}, False),
        ("gpt_oss", "swigluoai", {"swiglu_limit": 7.0}, True),
        ("gpt_oss", "swigluoai", {"swiglu_limit": 1.0}, False),
        ("gpt_oss", "silu", {"swiglu_limit": 7.0}, False),
        ("mixtral", "gelu_tanh", {"hidden_act": "gelu_pytorch_tanh"}, True),
    ],
)
def test_whether_a_kernel_computes_what_the_model_does(
    family: str, kernel: str, changes: dict[str, Any], same: bool
) -> None:
    model = tiny_model(family, **changes)
    spec = find_experts(model)[-1]
    experts = model.get_submodule(spec.name)
    layout = layout_of(spec.name, experts)
    assert layout is not None
    assert kernel_computes(Module(experts, layout, spec, SHAPES["layer"]), kernel) == same


def test_runs() -> None:
    assert runs_of([0, 1, 2, 5, 7, 8]) == (range(3), range(5, 6), range(7, 9))


def test_versions_of_vllm() -> None:
    assert serving.supports("0.32.0")
    assert serving.supports("0.32.1.dev3+cpu")
    assert not serving.supports("0.31.2")
    assert not serving.supports("0.33.0")
    assert "0.33.0" in serving.refusal("0.33.0")
    assert "expand" in serving.refusal("0.33.0")


def test_another_version_of_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stranger = ModuleType("vllm")
    stranger.__version__ = "0.40.1"
    monkeypatch.setitem(sys.modules, "vllm", stranger)
    serving.register()
    assert "0.40.1" in caplog.text
    assert "molae_compress.serving.quantization" not in sys.modules
