"""`compress_` on a model in memory: what it refuses before it starts, and what its report says once saved."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import molae_compress as molae
from molae_compress import inplace
from molae_compress.errors import DataError, ModelError, RecipeError, ResumeError
from tests.runs import same_every_time, tensors_in
from tests.tiny import tiny_ids, tiny_model
from tests.zoo import MODELS, NO_BASIS, zoo_model

DATA_FREE = {"molae": 1, "budget": {"rank": 8}}
CALIBRATED = {**DATA_FREE, "calibration": {"batch_size": 1}}


@pytest.mark.parametrize("obstacle", ["hooks", "meta", "quantised"])
def test_experts_that_cannot_be_replaced_are_refused_before_anything_is_solved(
    monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    monkeypatch.setattr(inplace.Run, "solve_layers", lambda *_: pytest.fail("solved"))
    model = tiny_model("mixtral")
    experts = model.get_submodule("model.layers.1.mlp.experts")
    match obstacle:
        case "hooks":
            experts._hf_hook = SimpleNamespace()  # type: ignore[assignment]
            says = "dispatched by accelerate"
        case "meta":
            experts.to("meta")
            says = "no weights in memory"
        case _:
            model.config.quantization_config = SimpleNamespace()
            says = "quantised already"
    with pytest.raises(ModelError, match=says):
        molae.compress_(model, CALIBRATED, data=tiny_ids())


def test_contradicting_arguments_are_refused() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(RecipeError, match="data-free"):
        molae.compress_(model, DATA_FREE, data=tiny_ids())
    with pytest.raises(RecipeError, match="folder on disk"):
        molae.compress_(model, {"molae": 1, "budget": {"target_size": "1MB"}})
    with pytest.raises(DataError, match="no calibration text"):
        molae.compress_(model, CALIBRATED)


def test_the_saved_report_vouches_for_what_save_pretrained_wrote(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    report = molae.compress_(model, CALIBRATED, data=tiny_ids())
    assert report.calibration is not None
    assert len(report.calibration.sha256) == 64
    other = molae.compress_(tiny_model("mixtral"), CALIBRATED, data=tiny_ids().flip(0))
    assert other.calibration is not None
    assert other.calibration.sha256 != report.calibration.sha256
    model.save_pretrained(tmp_path)
    report.save(tmp_path)
    assert molae.Report.load(tmp_path).files == same_every_time(tmp_path)
    assert molae.Recipe.load(tmp_path / "recipe.yaml").fingerprint() == report.recipe_fingerprint
    assert molae.verify(tmp_path).passed
    path = tmp_path / "molae_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": report.recipe | {"ignore": ["x"]}}))
    (first, *_) = molae.verify(tmp_path).checks
    assert not first.passed
    assert "recipe" in first.detail


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NO_BASIS])
def test_reported_bytes_are_those_of_the_saved_tensors(name: str, tmp_path: Path) -> None:
    model = zoo_model(name)
    model.save_pretrained(tmp_path / "dense")
    report = molae.compress_(model, {**DATA_FREE, "budget": {"rank": 4}})  # small also where experts were tied
    model.save_pretrained(tmp_path / "latent")
    report.save(tmp_path / "latent")
    for part, folder in ((report.source, "dense"), (report.artifact, "latent")):
        assert part["bytes"] == sum(tensor.nbytes for tensor in tensors_in(tmp_path / folder).values()), folder


def test_a_result_with_persistent_buffers_verifies(tmp_path: Path) -> None:
    model = zoo_model("MiniMaxForCausalLM")
    report = molae.compress_(model, DATA_FREE)
    model.save_pretrained(tmp_path)
    report.save(tmp_path)
    assert molae.verify(tmp_path).passed


def test_tied_experts_that_would_grow_are_refused_in_memory_as_on_disk(tmp_path: Path) -> None:
    model, recipe = zoo_model("DiffusionGemmaForBlockDiffusion"), {"molae": 1, "budget": {"keep": 0.6}}
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(RecipeError, match=r"would take .* more than the .* of the original") as in_memory:
        molae.compress_(model, recipe)
    with pytest.raises(RecipeError) as on_disk:
        molae.run({**recipe, "model": str(tmp_path / "dense")}, tmp_path / "out")
    assert str(in_memory.value) == str(on_disk.value)
    assert "shares weights" in in_memory.value.why


def test_a_killed_expansion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molae_compress import expansion

    model = tiny_model("mixtral")
    molae.compress_(model, DATA_FREE)
    model.save_pretrained(tmp_path / "latent")
    expand_layer, calls = expansion._expand_layer, []

    def spy(*args: object) -> None:
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        expand_layer(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(expansion, "_expand_layer", spy)
    with pytest.raises(KeyboardInterrupt):
        molae.expand(tmp_path / "latent", tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.expand-work", "latent"]
    molae.expand(tmp_path / "latent", tmp_path / "dense")
    assert calls == ["layer.0", "layer.1", "layer.1"]
    with pytest.raises(ResumeError, match="one inside the other"):
        molae.expand(tmp_path / "latent", tmp_path / "again", work_dir=tmp_path / "again" / "work")
    with pytest.raises(ResumeError, match="inside the model that is read"):
        molae.expand(tmp_path / "latent", tmp_path / "latent" / "dense")
    molae.expand(tmp_path / "latent", tmp_path / "again", work_dir=tmp_path / "elsewhere")
    assert same_every_time(tmp_path / "again") == same_every_time(tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "dense", "latent"]
