"""Routers trained on the predictions of the whole model: its gradients layer by layer, what changes, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import molae_compress as molae
from molae_compress import routers
from molae_compress.backward import Kept, StreamedModel
from molae_compress.budget import Shapes
from molae_compress.calibration.walk import model_inputs
from molae_compress.compress import Run
from molae_compress.errors import DataError, ModelError, RecipeError, ResumeError
from molae_compress.source import DiskSource, LiveSource, load_tokenizer
from molae_compress.stream import StandIn, stand_in
from tests.conftest import CheckpointMaker
from tests.runs import LENGTH, WINDOWS, bits, loaded, recipe_for, same_every_time, tensors_in
from tests.tiny import FAMILIES, tiny_ids, tiny_model
from tests.zoo import zoo_model

PLAIN = ("budget.keep=0.5", "calibration.samples=48", "calibration.batch_size=8")
HEAL = ("heal.router_steps=16", *PLAIN)


def windows() -> Tensor:
    return tiny_ids(WINDOWS, LENGTH)


def solved_run(source: DiskSource | LiveSource, model: Path, *overrides: str) -> tuple[Run, Shapes]:
    run = Run(recipe_for(model, *HEAL, *overrides), source, windows())
    shapes = run.shapes()
    run.solve_layers(shapes)
    return run, shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_layer_by_layer_are_those_of_the_whole_model(family: str, checkpoint: CheckpointMaker) -> None:
    folder = checkpoint(family)
    source = DiskSource.open(str(folder), device=torch.device("cpu"))
    run, shapes = solved_run(source, folder)
    names = routers.trainable_routers(source, run.specs)
    ids_BL = tiny_ids(3, 11, seed=5)
    kept = Kept(None, None)
    with source.ends(head=True):
        model = StreamedModel(
            source, routers._compressed(run, shapes), {name: routers.stored(source, name).float() for name in names}
        )
        (passed,) = model.forward([ids_BL], keep=kept)
        values, gradients = model.loss(ids_BL, passed, lambda logits, _: logits.square().sum(), train=True)
        found = model.backward([ids_BL], kept, [gradients])
    whole = tiny_model(family)
    molae.compress_(whole, recipe_for(folder, "budget.keep=0.5"), data=windows())
    whole.requires_grad_(True)
    loss = whole(input_ids=ids_BL).logits.square().sum()
    expected = torch.autograd.grad(loss, [whole.get_parameter(name) for name in names])
    assert sum(values) == pytest.approx(loss.item(), rel=1e-4)
    for name, gradient in zip(names, expected, strict=True):
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm(), name
        assert gradient.norm() > 0


@pytest.mark.parametrize(
    "name",
    [
        "Ernie4_5_VLMoeForConditionalGeneration",
        "GlmMoeDsaForCausalLM",
        "JetMoeForCausalLM",
        "Llama4ForCausalLM",
        "NllbMoeForConditionalGeneration",
        "SwitchTransformersForConditionalGeneration",
    ],
)
def test_gradients_pass_whatever_layers_tell_each_other(name: str) -> None:
    source = LiveSource.of(zoo_model(name))
    names = routers.trainable_routers(source, source.specs)

    def experts(layer: int) -> dict[str, StandIn]:
        here = [spec for spec in source.specs if source.layers.of(spec.name) == layer]
        return {spec.name: stand_in(source, spec, source.dense(spec)) for spec in here}

    ids_BL, kept = tiny_ids(2, 9).remainder(90), Kept(None, None)
    model = StreamedModel(source, experts, {name: routers.stored(source, name).float() for name in names})
    (passed,) = model.forward([ids_BL], keep=kept)
    _, gradients = model.loss(ids_BL, passed, lambda logits, _: logits.square().sum(), train=True)
    found = model.backward([ids_BL], kept, [gradients])
    source.model.requires_grad_(True)
    out = source.model(**model_inputs(source.model, ids_BL))
    loss = (out.logits if "logits" in out else out[0]).square().sum()
    expected = torch.autograd.grad(loss, [source.model.get_parameter(name) for name in names])
    for name, gradient in zip(names, expected, strict=True):
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


def routers_in(folder: Path) -> set[str]:
    return {name for name in tensors_in(folder) if ".experts." not in name and ("gate." in name or "router." in name)}


def begin_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers start from disturbed ones, so that there is something to find whatever compression did."""
    real = routers.stored

    def disturbed(source: DiskSource | LiveSource, name: str) -> Tensor:
        found = real(source, name)
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(len(name)))
        return found + 0.6 * found.std() * noise

    monkeypatch.setattr(routers, "stored", disturbed)
    monkeypatch.setattr(routers, "_RATE", 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_routers_change_and_a_model_in_memory_gets_the_same(
    family: str, checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_elsewhere(monkeypatch)
    source = checkpoint(family)
    plain = molae.run(recipe_for(source, *PLAIN), tmp_path / "plain")
    report = molae.run(recipe_for(source, *HEAL), tmp_path / "healed")
    before, after = tensors_in(tmp_path / "plain"), tensors_in(tmp_path / "healed")
    changed = {name for name in before if bits(before[name]) != bits(after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert changed <= routers_in(tmp_path / "plain")
    assert plain.routers is None
    assert report.routers is not None
    assert len(report.routers["changed"]) == len(changed)
    assert report.routers["kl_after"] < 0.9 * report.routers["kl_before"]
    assert molae.verify(tmp_path / "healed").passed
    model = tiny_model(family)
    recipe = recipe_for(source, *HEAL)
    in_memory = molae.compress_(model, recipe, tokenizer=load_tokenizer(source))
    assert in_memory.routers is not None
    assert in_memory.routers["changed"] == report.routers["changed"]
    assert in_memory.routers["kl_after"] == pytest.approx(report.routers["kl_after"], rel=1e-3)
    healed = loaded(tmp_path / "healed")
    for name in report.routers["changed"]:
        assert torch.allclose(model.get_parameter(name), healed.get_parameter(name), rtol=1e-4, atol=1e-6), name


def test_a_huge_rate_gives_back_the_start(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("qwen3_moe")
    molae.run(recipe_for(source, *PLAIN), tmp_path / "plain")
    monkeypatch.setattr(routers, "_RATE", 1e6)
    report = molae.run(recipe_for(source, *HEAL), tmp_path / "healed")
    assert report.routers is not None
    assert report.routers["changed"] == []
    assert report.routers["kl_after"] == report.routers["kl_before"]
    before, after = tensors_in(tmp_path / "plain"), tensors_in(tmp_path / "healed")
    assert all(bits(before[name]) == bits(after[name]) for name in before)
    model, original = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    assert molae.compress_(model, recipe_for(source, *HEAL), data=windows()).routers["changed"] == []  # type: ignore[index]
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert bits(model.get_parameter(name).detach()) == bits(original.get_parameter(name).detach())


class Stop(Exception):
    """Ends a run in its middle."""


@pytest.mark.parametrize(("stage", "trains_again"), [("routers", True), ("write", False)])
def test_a_stopped_run_goes_on_without_solving_again(
    stage: str, trains_again: bool, checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_elsewhere(monkeypatch)
    recipe = recipe_for(checkpoint("deepseek_v3"), *HEAL, "heal.block_steps=3")
    calm = molae.run(recipe, tmp_path / "calm")
    assert calm.routers is not None
    assert calm.routers["changed"]
    out = tmp_path / "stopped"

    def stop(name: str, done: int, total: int) -> None:
        if name == stage and (done == total - 1 or stage == "write"):
            raise Stop

    with pytest.raises(Stop):
        molae.run(recipe, out, progress=stop, max_memory=0)
    stages: list[str] = []
    monkeypatch.setattr("molae_compress.compress.solve_layer", None)
    report = molae.run(recipe, out, max_memory=0, progress=lambda name, *_: stages.append(name))
    assert ("routers" in stages) == trains_again
    assert same_every_time(out) == same_every_time(tmp_path / "calm")
    assert report.resumed
    assert not out.with_name("stopped.work").exists()


def test_other_steps_of_routers_keep_the_solved_layers_of_a_run_and_are_no_part_of_a_finished_one(
    checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    source, out = checkpoint("mixtral"), tmp_path / "out"
    molae.run(recipe_for(source, *HEAL), out)
    with pytest.raises(ResumeError, match="router_steps"):
        molae.run(recipe_for(source, *HEAL, "heal.router_steps=17"), out)


def test_what_cannot_be_trained_is_refused_before_any_work(
    checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molae_compress.compress.solve_layer", None)
    recipe = recipe_for(checkpoint("qwen3_moe"), *HEAL)
    model = tiny_model("qwen3_moe")
    gate = model.get_submodule("model.layers.1.mlp.gate")
    gate.forward = torch.no_grad()(gate.forward)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"No gradient reaches .*model\.layers\.1\.mlp\.experts"):
        molae.compress_(model, recipe, data=windows())
    block = model.get_submodule("model.layers.1.mlp")
    rows = gate.weight.detach().clone()
    del gate.weight
    gate.register_buffer("weight", rows)
    with pytest.raises(ModelError, match=r"No router was found beside .*model\.layers\.1\.mlp\.experts"):
        molae.compress_(model, recipe, data=windows())
    assert not hasattr(block.experts, "encode")
    with pytest.raises(DataError, match="four calibration windows"):
        molae.compress_(tiny_model("qwen3_moe"), recipe, data=windows()[:2])
    with pytest.raises(RecipeError, match="router_steps"):
        recipe_for(checkpoint("qwen3_moe"), "heal.router_steps=1", calibrated=False)
