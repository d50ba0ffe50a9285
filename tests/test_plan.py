"""Plans: numbers by hand, every bundled recipe, and models far larger than this machine, all without reading a weight."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import molae_compress as molae
from molae_compress.adapters.saving import in_hub_format
from molae_compress.adapters.skeleton import skeleton
from molae_compress.budget import shapes_for
from molae_compress.checkpoint import Checkpoint
from molae_compress.engines import engines
from molae_compress.planning import LIBRARIES, solver_bytes
from molae_compress.ranks import Module
from molae_compress.recipe import Recipe, bundled_recipes
from molae_compress.solver.newton import KEPT
from molae_compress.solver.spectra import LayerSpectra
from molae_compress.tensors import ExpertsSpec, LatentShape
from tests.conftest import CheckpointMaker
from tests.runs import LENGTH, WINDOWS, is_expert, recipe_for, tensors_in
from tests.tiny import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K

ROOT = Path(molae.__file__).parents[1]
FAMILIES_OF = {
    "deepseek": ["deepseek_v3"],
    "gpt_oss": ["gpt_oss"],
    "mixtral": ["mixtral"],
    "olmoe": ["olmoe"],
    "qwen_moe": ["qwen3_moe", "qwen2_moe"],
    "quickstart": [],  # comes with its own model
}


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in this file may read a tensor."""
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read a weight"))
    monkeypatch.setattr(Checkpoint, "chunks", lambda *_: pytest.fail("read a weight"))


def test_the_numbers_of_grouped_experts_by_hand(checkpoint: CheckpointMaker) -> None:
    source = checkpoint("mixtral", dtype=torch.bfloat16)
    planned = molae.plan(recipe_for(source, "budget.rank=8", "basis.experts_per_input_group=2"))
    # input: 4 groups of 2 experts, bases of 8 rows of which 8 columns are the identity; output: a basis for each expert
    bases_in, bases_out = 4 * 8 * (HIDDEN - 8), 8 * 8 * (HIDDEN - 8)
    cores = EXPERTS * 8 * (2 * INTERMEDIATE + INTERMEDIATE)
    pivots = 4 * 8 + 8 * 8
    macs = TOP_K * (8 * (HIDDEN - 8) + 8 * 2 * INTERMEDIATE + 8 * INTERMEDIATE + 8 * (HIDDEN - 8))
    for layer in planned.layers:
        assert layer.dense_parameters == EXPERTS * HIDDEN * 3 * INTERMEDIATE == 18432
        assert layer.parameters == bases_in + bases_out + cores + pivots == 7008
        assert (layer.dense_bytes, layer.bytes) == (2 * 18432, 2 * (7008 - pivots) + 4 * pivots)
        assert layer.dense_flops == 2 * TOP_K * HIDDEN * 3 * INTERMEDIATE
        assert layer.flops == 2 * macs == 3840
        # of two of eight experts, one or both are in a group of two in 13 of 28 cases
        read = 13 / 28 * (2 * bases_in + 4 * 4 * 8) + (2 * bases_out + 4 * 8 * 8 + 2 * cores) * TOP_K / EXPERTS
        assert (layer.dense_active_bytes, layer.active_bytes) == (2 * 18432 * TOP_K / EXPERTS, round(read))
        assert layer.traffic == layer.dense_traffic == 2 * TOP_K * HIDDEN  # groups of experts encode where they live
    stored = tensors_in(source)
    assert planned.source_bytes == sum(tensor.nbytes for tensor in stored.values())
    copied = sum(tensor.nbytes for key, tensor in stored.items() if not is_expert(key))
    assert planned.artifact_bytes == copied + sum(layer.bytes for layer in planned.layers)
    assert (planned.dense_parameters, planned.parameters) == (2 * 18432, 2 * 7008)
    assert planned.tokens == WINDOWS * LENGTH
    # the stream, what the experts read, and the routing: 8 bytes for an expert's number, 4 for its weight
    assert planned.activation_bytes == planned.tokens * (2 * HIDDEN * 4 + TOP_K * 12 + 4)
    assert planned.measured


def test_the_numbers_of_the_layer_form_by_hand(checkpoint: CheckpointMaker) -> None:
    planned = molae.plan(recipe_for(checkpoint("mixtral"), "budget.rank=16", "basis.profile=serving"))
    for layer in planned.layers:
        assert layer.parameters == 2 * 16 * HIDDEN + EXPERTS * 16 * 3 * INTERMEDIATE == 10240
        assert layer.bytes == 4 * 10240
        assert layer.flops == 2 * (2 * 16 * HIDDEN + TOP_K * 16 * 3 * INTERMEDIATE) == 6656
        assert layer.traffic == TOP_K * (16 + 16)
        assert layer.active_bytes == 4 * (2 * 16 * HIDDEN + TOP_K * 16 * 3 * INTERMEDIATE)
    assert "18,432 -> 13,312 operations (0.7222), 36.86 kB -> 26.62 kB of weights read (0.7222)" in str(planned)
    assert planned.to_dict()["active_bytes"] == sum(layer.active_bytes for layer in planned.layers)


def test_biases_stay_at_full_width(checkpoint: CheckpointMaker) -> None:
    planned = molae.plan(recipe_for(checkpoint("gpt_oss"), "budget.rank=16", "basis.profile=serving"))
    biases = EXPERTS * (2 * INTERMEDIATE + HIDDEN)
    assert [layer.dense_parameters for layer in planned.layers] == [18432 + biases] * 2
    assert [layer.parameters for layer in planned.layers] == [10240 + biases] * 2


def test_the_memory_of_a_plan_follows_its_limit(checkpoint: CheckpointMaker) -> None:
    recipe = recipe_for(checkpoint("mixtral"))
    held, spilled = molae.plan(recipe), molae.plan(recipe, max_memory=0)
    assert held.memory_bytes - spilled.memory_bytes == held.activation_bytes == spilled.activation_bytes
    assert molae.plan(recipe_for(checkpoint("mixtral"), calibrated=False)).activation_bytes == 0


def test_the_memory_of_the_solver_by_hand(checkpoint: CheckpointMaker) -> None:
    wide = ExpertsSpec("experts", 0, 8, 4096, 14336, top_k=2)  # Mixtral
    metric = 28672 * 28672 * 16
    moments = 2 * 14336 * 14336 * 8 + 6 * 4096 * 4096 * 8
    rows = 2048 * (6 * 28672 + 2 * 4096) * 4
    assert solver_bytes(wide) == metric + moments + 2 * 28672 * 4096 * 4 + rows + KEPT
    ungated = ExpertsSpec("experts", 0, 8, 512, 4096, top_k=2, has_gate=False)  # the refit takes more than the metric
    rows = 2048 * (6 * 4096 + 2 * 512) * 4
    assert solver_bytes(ungated) == 64 * 4096**2 + 48 * 512**2 + 8 * 4096 * 512 + rows + KEPT
    source = checkpoint("mixtral", dtype=torch.bfloat16)
    planned = molae.plan(recipe_for(source), max_memory=0)
    stored = tensors_in(source)
    own = {key: 4 * tensor.numel() for key, tensor in stored.items() if not is_expert(key)}
    ends = sum(size for key, size in own.items() if ".layers." not in key)
    assert ends >= 2 * 4 * stored["model.embed_tokens.weight"].numel()  # and the head
    layer = sum(size for key, size in own.items() if ".layers.0." in key)
    solver = solver_bytes(ExpertsSpec("experts", 0, EXPERTS, HIDDEN, INTERMEDIATE, top_k=TOP_K))
    experts, latent = planned.layers[0].dense_bytes, planned.layers[0].bytes
    assert planned.memory_bytes == LIBRARIES + layer + ends + max(2 * experts, experts + 2 * latent) + solver


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, of in FAMILIES_OF.items() for family in of or [""]])
def test_every_bundled_recipe_plans(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch, name: str, family: str
) -> None:
    assert FAMILIES_OF.keys() | {"scratch"} == bundled_recipes().keys()
    monkeypatch.chdir(ROOT)
    recipe = Recipe.load(name, [f"model={checkpoint(family)}"] if family else [])
    planned = molae.plan(recipe)
    assert len(planned.layers) >= 2
    assert all(layer.shape is not None for layer in planned.layers)
    assert recipe.budget.keep is not None
    assert recipe.budget.keep - 0.05 < planned.parameters / planned.dense_parameters <= recipe.budget.keep
    assert not planned.measured
    assert recipe.calibration is not None
    # an eighth more than the text, which the model writes itself
    assert planned.tokens == recipe.calibration.samples * 9 // 8 * recipe.calibration.sequence_length
    shown = str(planned)
    assert all(layer.name in shown for layer in planned.layers)
    assert "calibration will move them" in shown
    assert json.loads(json.dumps(planned.to_dict()))["artifact_bytes"] == planned.artifact_bytes


def write_header_only(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file whose tensors are one large hole: it has its full size, and takes no room."""
    header, position = {}, 0
    for name, tensor in tensors.items():
        end = position + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    os.truncate(path, 8 + len(encoded) + position)


@pytest.mark.slow
def test_a_model_of_671_billion_parameters_is_planned_from_its_headers(tmp_path: Path) -> None:
    config = AutoConfig.for_model("deepseek_v3", architectures=["DeepseekV3ForCausalLM"])  # its defaults are V3 itself
    assert (config.num_hidden_layers, config.n_routed_experts, config.hidden_size) == (61, 256, 7168)
    config.save_pretrained(tmp_path)
    model = skeleton(config)
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in in_hub_format(model, model.state_dict()).items():
        part = name.split(".")[2] if ".layers." in name else "ends"
        files.setdefault(f"model-{part:0>5}.safetensors", {})[name] = tensor
    for file, tensors in files.items():
        write_header_only(tmp_path / file, tensors)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    assert len(weight_map) > 44_000
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    started = time.monotonic()
    planned = molae.plan(Recipe.load("deepseek", [f"model={tmp_path}"]))
    assert time.monotonic() - started < 30
    assert len(planned.layers) == 58
    assert planned.dense_parameters == 58 * 256 * 3 * 7168 * 2048
    assert 1.3e12 < planned.source_bytes < 1.4e12
    assert 0.59 < planned.parameters / planned.dense_parameters <= 0.6
    assert planned.memory_bytes - planned.activation_bytes < 60e9  # one layer of it, not the model


def test_a_projection_may_keep_its_whole_size_where_numbers_are_counted() -> None:
    spec = ExpertsSpec("experts", 0, 4, 256, 96, top_k=2)
    recipe = molae.Recipe.load({"molae": 1})
    for dtype, whole in ((None, True), (torch.bfloat16, False)):
        for side in Module.of(recipe, spec, dtype).sides:
            assert (side.costs[side.choices[-1]] >= side.dense) is whole
            assert [side.costs[k] < side.dense for k in side.choices[:-1]] == [True] * (len(side.choices) - 1)


@pytest.mark.parametrize(
    ("hidden", "step"), [(128, 8), (504, 8), (512, 64), (2048, 64), (2880, 64), (4088, 64), (4096, 128), (7168, 128)]
)
@pytest.mark.parametrize("keep", [0.75, 0.6, 0.5])
def test_ranks_of_the_serving_profile_suit_engines_and_meet_the_budget(hidden: int, step: int, keep: float) -> None:
    layers = 6
    specs = [ExpertsSpec(f"layers.{k}.experts", k, 16, hidden, hidden // 2, top_k=8) for k in range(layers)]
    falling_M = 0.5 ** torch.linspace(0, 8, hidden, dtype=torch.float64)
    spectra = {
        spec.name: LayerSpectra((falling_M[None] / (1 + spec.layer),), falling_M[None], torch.arange(16)) for spec in specs
    }
    text = {"data": "python-docs:calibration"}
    recipe = Recipe.load({"molae": 1, "basis": {"profile": "serving"}, "budget": {"keep": keep}, "calibration": text})
    sizes = {
        "dtypes": dict.fromkeys(spectra, torch.float32),
        "dense_bytes": {spec.name: 4 * spec.dense_numel for spec in specs},
    }
    for measured in (spectra, None):
        shapes = shapes_for(recipe, specs, spectra=measured, **sizes)
        ranks = [shape.rank_in for shape in shapes.values() if isinstance(shape, LatentShape)]
        assert ranks == [shape.rank_out for shape in shapes.values() if isinstance(shape, LatentShape)]
        assert len(ranks) == layers
        assert math.gcd(*ranks, 2 * step) % step == 0
        spent = sum(shape.numel(spec) for spec, shape in zip(specs, shapes.values(), strict=True) if shape is not None)
        one_step = step * (2 * hidden + 16 * 3 * hidden // 2)
        left = keep * sum(spec.dense_numel for spec in specs) - spent
        assert 0 <= left < (one_step if measured else layers * one_step)
    assert ("pads them" in engines("qwen3_moe", iter(shapes.values()))["vLLM"]) == any(rank % 64 for rank in ranks)
    chosen = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"align": 16})})
    shapes = shapes_for(chosen, specs, spectra=spectra, **sizes)
    assert math.gcd(*(shape.rank_in for shape in shapes.values() if isinstance(shape, LatentShape))) == 16


def test_engines_follow_from_form_and_architecture(checkpoint: CheckpointMaker) -> None:
    grouped = molae.plan(recipe_for(checkpoint("qwen3_moe")))
    layer = molae.plan(recipe_for(checkpoint("qwen3_moe"), "basis.profile=serving"))
    assert "grouped products" in grouped.engines()["vLLM"]
    assert "ort-moe" not in grouped.engines()["ONNX Runtime"]
    assert "fused" in layer.engines()["vLLM"]
    assert "ort-moe" in layer.engines()["ONNX Runtime"]
    assert all("not tested" in engines("phimoe", [])[name] for name in ("vLLM", "ONNX Runtime"))
    work = layer.per_token()
    fast, prompt = work["dense_active_bytes"] / work["active_bytes"], work["dense_flops"] / work["flops"]
    assert f"at most         {fast:.2f} times as fast as dense for one token" in str(layer)
    assert f"(bytes of experts), {prompt:.2f} for a prompt (operations)" in str(layer)
    heads = ["runs in         transformers: ", *(f"{'':16}{name}: " for name in ("vLLM", "ONNX Runtime", "any other"))]
    lines = [f"{head}{how}" for head, how in zip(heads, layer.engines().values(), strict=True)]
    assert "\n".join(lines) in str(layer)
    assert layer.to_dict()["engines"] == layer.engines()
