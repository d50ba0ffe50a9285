"""What the keys of a recipe do to a run: each is applied to tiny checkpoints and its promise is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import molae_compress as molae
from molae_compress import Report, compress
from molae_compress.calibration.text import read_texts, token_windows
from molae_compress.errors import RecipeError
from molae_compress.solver.population import Calibrated
from molae_compress.tensors import DenseExperts
from tests.conftest import CheckpointMaker
from tests.runs import (
    HELD_OUT,
    LENGTH,
    WINDOWS,
    distance,
    hashes,
    is_expert,
    loaded,
    logits,
    recipe_for,
    same_every_time,
    tensors_in,
)
from tests.tiny import EXPERTS, HIDDEN, INTERMEDIATE, tiny_tokenizer

Apply = Callable[..., tuple[Report, Path]]
SERVING = "basis.profile=serving"


@pytest.fixture
def apply(tmp_path: Path) -> Apply:
    """`apply(model, *overrides)`: the report and the folder of a run."""

    def run(model: Path, *overrides: str, calibrated: bool = True, max_memory: int | None = None) -> tuple[Report, Path]:
        folder = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        return molae.run(recipe_for(model, *overrides, calibrated=calibrated), folder, max_memory=max_memory), folder

    return run


def total_error(report: Report) -> float:
    assert report.err_h is not None
    return report.err_h


# Every form, against the same in memory


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "overrides",
    [
        [SERVING],
        ["basis.gate_up=separate"],
        ["basis.storage=orthonormal"],
        ["basis.experts_per_output_group=all", "basis.output=combined"],
        [SERVING, "basis.output=combined"],
        ["basis.experts_per_input_group=1", "basis.experts_per_output_group=4"],
        ["basis.down=dense", "budget.keep=0.8"],
        ["basis.metric=input"],
        ["budget.allocate=uniform"],
        ["budget.rank=16"],
        ["refit.cores=false", "refit.down=false", "refit.shrinkage=0"],
        ["refit.sequential=true"],
        ["refit.sequential=true", "ignore=['model.layers.0.mlp.experts']"],
        ["calibration.weighting=none"],
        ["calibration=null"],
        ["method=paper", "calibration=null", "budget.keep=0.8"],
    ],
    ids=" ".join,
)
def test_disk_and_memory_agree(checkpoint: CheckpointMaker, apply: Apply, family: str, overrides: list[str]) -> None:
    source = checkpoint(family)
    report, folder = apply(source, *overrides)
    found = molae.verify(folder)
    assert found.passed, found
    live = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    in_memory = molae.compress_(live, recipe_for(source, *overrides))
    assert distance(logits(loaded(folder)), logits(live)) < 1e-5
    assert [layer.shape for layer in report.layers] == [layer.shape for layer in in_memory.layers]
    if "calibration=null" in overrides:
        assert report.err_h is in_memory.err_h is None
    else:
        assert total_error(report) == pytest.approx(total_error(in_memory), rel=1e-4)


@pytest.mark.parametrize("profile", ["quality", "serving"])
def test_full_rank_is_the_identity(checkpoint: CheckpointMaker, apply: Apply, family: str, profile: str) -> None:
    source = checkpoint(family)
    report, folder = apply(source, "budget.rank=full", f"basis.profile={profile}")
    assert all(layer.shape is not None for layer in report.layers)
    assert distance(logits(loaded(folder)), logits(loaded(source))) < 1e-4
    assert total_error(report) < 1e-7


@pytest.mark.parametrize("sequential", ["false", "true"])
def test_a_layer_is_fitted_to_what_the_layers_before_it_deliver(
    checkpoint: CheckpointMaker, apply: Apply, monkeypatch: pytest.MonkeyPatch, family: str, sequential: str
) -> None:
    source = checkpoint(family)
    fitted: dict[str, torch.Tensor] = {}
    real = compress.solve_layer

    def watched(dense: DenseExperts, population: Calibrated, *args: Any) -> dict[str, torch.Tensor]:
        fitted[dense.spec.name] = population.x_TH
        return real(dense, population, *args)

    monkeypatch.setattr(compress, "solve_layer", watched)
    recipe = recipe_for(source, f"refit.sequential={sequential}", "budget.keep=0.4")
    folder = apply(source, f"refit.sequential={sequential}", "budget.keep=0.4")[1]
    past = loaded(folder if sequential == "true" else source)
    read: dict[str, torch.Tensor] = {}
    for name in fitted:
        past.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
    calibration = recipe.calibration
    assert calibration is not None
    assert calibration.data is not None
    texts = read_texts(calibration.data, calibration.column)
    ids_NL = token_windows(texts, tiny_tokenizer(), samples=WINDOWS, sequence_length=LENGTH, seed=calibration.seed)
    with torch.no_grad():
        past(input_ids=ids_NL[:-HELD_OUT])
    assert len(fitted) == 2
    for name, x_TH in fitted.items():
        assert distance(x_TH, read[name].flatten(0, -2)) < 1e-5, name


# Budgets


def test_a_smaller_budget_costs_quality(checkpoint: CheckpointMaker, apply: Apply, family: str) -> None:
    reports = [apply(checkpoint(family), f"budget.keep={keep}")[0] for keep in (0.8, 0.6, 0.4)]
    errors = [total_error(report) for report in reports]
    assert errors == sorted(errors)
    assert errors[0] < 0.7 * errors[2]
    sizes = [report.artifact["bytes"] for report in reports]
    assert sizes == sorted(sizes, reverse=True)


def predicted_error(work: Path, report: Report) -> float:
    """What the measured spectra say that the ranks of a report lose."""
    total = 0.0
    for layer in report.layers:
        assert layer.shape is not None
        energies_GM = load_file(work / "observe" / f"{layer.name}.safetensors")
        for bank in layer.shape.get("banks", [{"experts": range(EXPERTS), **layer.shape}]):
            for key, energy_GM in energies_GM.items():
                if key == "order":
                    continue
                side = "output" if key == "output" else "input"
                groups = sorted({expert // bank[f"{side}_group"] for expert in bank["experts"]})
                total += float(energy_GM[groups, bank["rank_out" if key == "output" else "rank_in"] :].sum())
    return total


def test_measured_ranks_lose_less_than_uniform_ones(checkpoint: CheckpointMaker, family: str, tmp_path: Path) -> None:
    lost = []
    for kind in ("spectrum", "uniform"):
        settings = ("budget.keep=0.5", "budget.align=1", "basis.experts_per_input_group=1")
        recipe = recipe_for(checkpoint(family), f"budget.allocate={kind}", *settings)
        report = molae.run(recipe, tmp_path / kind, work_dir=tmp_path / "spectrum.kept" if kind == "spectrum" else None)
        lost.append(predicted_error(tmp_path / "spectrum.kept", report))
    assert lost[0] < lost[1]


def test_a_layer_that_needs_less_gets_less(own_checkpoint: CheckpointMaker, apply: Apply) -> None:
    source = own_checkpoint("mixtral")
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key, tensor in tensors.items():  # the experts of layer 0 hold nothing but a subspace of 4 dimensions, and noise
        if "layers.0." in key and is_expert(key):
            low = torch.randn(tensor.shape[0], 4, generator=generator) @ torch.randn(4, tensor.shape[1], generator=generator)
            tensor.copy_(low * tensor.std() / low.std() + 0.02 * tensor)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    settings = ("budget.keep=0.5", "calibration.samples=48", "budget.banks=1")
    spectrum, uniform = (apply(source, f"budget.allocate={kind}", *settings)[0] for kind in ("spectrum", "uniform"))
    first, last = (layer.shape for layer in spectrum.layers)
    assert first is not None
    assert last is not None
    assert first["rank_in"] < last["rank_in"]
    assert first["rank_out"] < last["rank_out"]
    assert total_error(spectrum) < 0.8 * total_error(uniform)


def test_experts_that_need_less_get_less(own_checkpoint: CheckpointMaker, apply: Apply) -> None:
    source = own_checkpoint("mixtral")
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    poor = {1, 4, 6}
    for key, tensor in tensors.items():  # some experts hold nothing but a subspace of 4 dimensions, and noise
        if is_expert(key) and int(key.split(".experts.")[1].split(".")[0]) in poor:
            low = torch.randn(tensor.shape[0], 4, generator=generator) @ torch.randn(4, tensor.shape[1], generator=generator)
            tensor.copy_(low * tensor.std() / low.std() + 0.02 * tensor)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    settings = ("budget.keep=0.5", "calibration.samples=48", "basis.experts_per_input_group=1")
    banked, (plain, _) = apply(source, *settings), apply(source, *settings, "budget.banks=1")
    report, folder = banked
    assert total_error(report) < 0.8 * total_error(plain)
    for layer in report.layers:
        assert layer.shape is not None
        banks = layer.shape["banks"]
        assert 2 <= len(banks) <= 4
        ranks = {expert: bank["rank_in"] + bank["rank_out"] for bank in banks for expert in bank["experts"]}
        of_poor, of_rich = ([rank for e, rank in ranks.items() if (e in poor) == kind] for kind in (True, False))
        assert max(of_poor) <= min(of_rich)
        assert max(of_poor) < 0.8 * max(of_rich)
    assert molae.verify(folder).passed
    assert report.plan["parameters"] <= 0.5 * report.plan["dense_parameters"]
    assert report.plan["parameters"] > 0.98 * plain.plan["parameters"]


@pytest.mark.parametrize("allocate", ["allocate=spectrum", "banks=1", "allocate=uniform"])
def test_operations_keep_to_their_cap(checkpoint: CheckpointMaker, apply: Apply, allocate: str) -> None:
    source, groups = checkpoint("mixtral"), ("basis.experts_per_input_group=4", "basis.storage=orthonormal")
    settings = (f"budget.{allocate}", "budget.align=1", "refit.newton=0", *groups)

    def of(*overrides: str) -> tuple[float, float, list[Any]]:
        report, _ = apply(source, *settings, *overrides)
        flops, parameters = (report.plan[key] / report.plan[f"dense_{key}"] for key in ("flops", "parameters"))
        shapes = [layer.shape for layer in report.layers]
        assert ("times as many operations" in str(report.warnings)) == (flops > 1)
        return flops, parameters, shapes

    free, wide, loose = of("budget.max_flops=null", "budget.keep=0.9"), of("budget.keep=0.9"), of("budget.keep=0.5")
    assert free[0] > 1 >= wide[0] > 0.95
    assert 0.9 >= free[1] > wide[1] > 0.7
    assert loose == of("budget.keep=0.5", "budget.max_flops=null")  # where it does not bind it changes nothing
    assert loose[0] < 0.8
    tight = of("budget.keep=0.5", "budget.max_flops=0.4")
    assert 0.35 < tight[0] <= 0.4
    assert tight[1] <= 0.5


def test_a_cap_on_operations_that_cannot_be_kept(checkpoint: CheckpointMaker) -> None:
    source = checkpoint("mixtral")
    groups = (f"basis.experts_per_{side}_group=4" for side in ("input", "output"))
    dear = ("budget.rank=24", "basis.storage=orthonormal", *groups)
    assert "times as many operations per token" in str(molae.plan(recipe_for(source, *dear)))
    assert "times as many" not in str(molae.plan(recipe_for(source, "budget.rank=8", "budget.max_flops=1.0")))
    paper = recipe_for(source, "method=paper", "budget.keep=0.9", calibrated=False)
    assert "times as many operations per token" in str(molae.plan(paper))
    with pytest.raises(RecipeError, match=r"`budget.rank: 24` takes 1\.\d+ times the operations .*`budget.max_flops: 1.0`"):
        molae.plan(recipe_for(source, *dear, "budget.max_flops=1.0"))
    for uniform in ("spectrum", "uniform"):
        with pytest.raises(RecipeError, match=r"`budget.max_flops: 0.01` is too small: .* a share of 0\.0\d+"):
            molae.plan(recipe_for(source, "budget.max_flops=0.01", f"budget.allocate={uniform}"))


@pytest.mark.parametrize(
    "overrides",
    [["budget.align=1"], [SERVING], ["basis.down=dense"], ["output.dtype=bfloat16"], ["ignore=['re:.*0.mlp.experts']"]],
    ids=" ".join,
)
def test_a_target_size_is_met(checkpoint: CheckpointMaker, apply: Apply, overrides: list[str]) -> None:
    source = checkpoint("qwen2_moe")
    target = 3 * sum(tensor.nbytes for tensor in tensors_in(source).values()) // 4
    report, folder = apply(source, f"budget.target_size={target}", *overrides)
    stored = sum(tensor.nbytes for tensor in tensors_in(folder).values())
    assert report.artifact["bytes"] == stored
    assert 0.85 * target < stored <= target


def test_the_plan_of_known_ranks_is_what_is_written(checkpoint: CheckpointMaker, apply: Apply, family: str) -> None:
    for overrides in (["budget.rank=8"], ["budget.allocate=uniform"], ["budget.rank=16", SERVING]):
        planned = molae.plan(recipe_for(checkpoint(family), *overrides))
        assert planned.measured
        report, folder = apply(checkpoint(family), *overrides)
        assert planned.artifact_bytes == sum(tensor.nbytes for tensor in tensors_in(folder).values())
        assert json.loads(json.dumps(planned.to_dict()))["layers"] == report.to_dict()["plan"]["layers"]


# The paper's procedure


def test_the_papers_method_leaves_down_as_it_is(checkpoint: CheckpointMaker, apply: Apply, family: str) -> None:
    source = checkpoint(family)
    report, folder = apply(source, "method=paper", "budget.keep=0.8", calibrated=False)
    dense = tensors_in(source)
    latent = loaded(folder)
    original = loaded(source)
    for layer in report.layers:
        assert layer.shape is not None
        assert (layer.shape["gate_up"], layer.shape["rank_out"], layer.shape["input_group"]) == ("separate", None, 4)
        down = latent.get_submodule(layer.name).latent_tensors()["core.down"].view(EXPERTS, HIDDEN, INTERMEDIATE)
        stock = original.get_submodule(layer.name).down_proj
        assert torch.equal(down, stock.transpose(1, 2) if stock.shape[1] == INTERMEDIATE else stock)
        assert layer.err_h is None
    assert len(dense) > 0
    assert distance(logits(latent), logits(original)) > 1e-3


# Output


def test_ignored_modules_stay_bit_for_bit(checkpoint: CheckpointMaker, apply: Apply, family: str) -> None:
    source = checkpoint(family)
    names = [layer.name for layer in molae.plan(recipe_for(source)).layers]
    report, folder = apply(source, f"ignore=['{names[0]}']")
    assert [layer.name for layer in report.layers] == names[1:]
    before, after = tensors_in(source), tensors_in(folder)
    number = names[0].split(".")[2]
    kept = {key for key in before if not is_expert(key) or f"layers.{number}." in key}
    assert sum(map(is_expert, kept)) == sum(map(is_expert, before)) / 2
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert molae.verify(folder).passed
    stored = sum(tensor.nbytes for tensor in after.values())
    assert report.artifact["bytes"] == stored
    with pytest.raises(RecipeError, match="matches no experts module"):
        molae.plan(recipe_for(source, "ignore=['model.layers.7.mlp.experts']"))
    with pytest.raises(RecipeError, match="matches all"):
        molae.plan(recipe_for(source, "ignore=['re:.*']"))


def test_the_output_type_is_that_of_the_experts_alone(checkpoint: CheckpointMaker, apply: Apply) -> None:
    source = checkpoint("qwen2_moe")
    exact, narrow = apply(source)[1], apply(source, "output.dtype=bfloat16")[1]
    floating = {key: tensor for key, tensor in tensors_in(narrow).items() if tensor.is_floating_point()}
    assert {tensor.dtype for key, tensor in floating.items() if is_expert(key)} == {torch.bfloat16}
    assert {tensor.dtype for key, tensor in floating.items() if not is_expert(key)} == {torch.float32}
    assert 0 < distance(logits(loaded(narrow)), logits(loaded(exact))) < 0.1
    assert molae.verify(narrow).passed


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_bfloat16_checkpoint_stays_one(checkpoint: CheckpointMaker, apply: Apply, family: str) -> None:
    source = checkpoint(family, dtype=torch.bfloat16)
    report, folder = apply(source)
    before = {key: tensor.dtype for key, tensor in tensors_in(source).items()}
    for key, tensor in tensors_in(folder).items():
        expected = before.get(key, torch.int32 if key.endswith(".pivots") else torch.bfloat16)
        assert tensor.dtype == expected, key
    assert molae.verify(folder).passed
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    in_float32, _ = apply(checkpoint(family))
    assert report.err_h == pytest.approx(in_float32.err_h, rel=0.2)


def test_shards_do_not_matter(
    checkpoint: CheckpointMaker, sharded_checkpoint: CheckpointMaker, apply: Apply, family: str
) -> None:
    one, other = apply(checkpoint(family))[1], apply(sharded_checkpoint(family), "output.max_shard_size=40kB")[1]
    before, after = tensors_in(one), tensors_in(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    shards = sorted(other.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 40_000
    assert molae.verify(other).passed


def test_tensors_that_the_class_does_not_know_are_copied(own_checkpoint: CheckpointMaker, apply: Apply) -> None:
    source = own_checkpoint("deepseek_v3")
    tensors = load_file(source / "model.safetensors")
    extra = {  # as DeepSeek stores its head for multi-token prediction: one more layer, with experts of its own
        "model.layers.3.eh_proj.weight": torch.randn(HIDDEN, 2 * HIDDEN),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.randn(INTERMEDIATE, HIDDEN).bfloat16(),
        "model.layers.3.self_attn.steps": torch.arange(5),
    }
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    report, folder = apply(source)
    after = tensors_in(folder)
    for key, tensor in extra.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor)
    assert report.artifact["bytes"] == sum(tensor.nbytes for tensor in after.values())
    assert molae.verify(folder).passed


# How it is computed does not matter


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_batch_size_does_not_matter(checkpoint: CheckpointMaker, apply: Apply, family: str) -> None:
    one, four = (apply(checkpoint(family), f"calibration.batch_size={size}") for size in (1, 4))
    assert [layer.shape for layer in one[0].layers] == [layer.shape for layer in four[0].layers]
    assert distance(logits(loaded(one[1])), logits(loaded(four[1]))) < 1e-4


def test_equal_runs_write_equal_files(checkpoint: CheckpointMaker, apply: Apply, family: str) -> None:
    source = checkpoint(family)
    before = hashes(source)
    first, again = (same_every_time(apply(source)[1]) for _ in range(2))
    assert first == again
    assert {"README.md", "config.json", "model.safetensors", "recipe.yaml"} < first.keys()
    assert hashes(source) == before


@pytest.mark.parametrize("sequential", ["true", "false"])
def test_activations_on_disk_change_nothing(checkpoint: CheckpointMaker, apply: Apply, sequential: str) -> None:
    source, how = checkpoint("deepseek_v3"), f"refit.sequential={sequential}"
    assert same_every_time(apply(source, how)[1]) == same_every_time(apply(source, how, max_memory=0)[1])
