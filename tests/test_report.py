"""The report and the model card: complete, plain, the same from run to run, and honest about what was not measured."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from molae_compress.errors import CheckpointError
from molae_compress.planning import make_plan
from molae_compress.recipe import Recipe
from molae_compress.report import CalibrationReport, LayerReport, Report, model_card, warnings_for
from molae_compress.tensors import ExpertsSpec, LatentShape

SPECS = [ExpertsSpec(f"model.layers.{i}.mlp.experts", i, 4, 32, 24, top_k=2) for i in range(2)]
SHAPE = LatentShape("grouped", 16, 8, 2, 1, storage="interpolative")
EVALUATION = {"tokens": 4096, "perplexity": 21.5, "original_perplexity": 20.25, "kl": 0.0625, "top1_agreement": 0.875}


def made_report(**changes: Any) -> Report:
    """A report as a run writes it: one compressed and one dense module."""
    recipe = Recipe.load("quickstart", [f"model={json.dumps(changes.get('model') or 'org/Base-MoE')}"])
    plan = make_plan(
        str(recipe.model),
        SPECS,
        {SPECS[0].name: SHAPE, SPECS[1].name: None},
        model_type="qwen3_moe",
        dense_bytes={spec.name: 4 * spec.dense_numel for spec in SPECS},
        dtypes={spec.name: torch.float32 for spec in SPECS},
        source_bytes=2_000_000,
        largest_layer_bytes=1000,
        tokens=512,
        measured=True,
    )
    layers = (
        LayerReport(SPECS[0].name, SHAPE.to_dict(), 0.01, 0.2, 64, (100, 0, 20, 5), 1.5),
        LayerReport(SPECS[1].name),
    )
    report = Report(
        model=recipe.model,
        recipe=yaml.safe_load(recipe.dump()),
        recipe_fingerprint=recipe.fingerprint(),
        plan=plan.to_dict(),
        layers=layers,
        calibration=CalibrationReport(512, 2, "c0ffee", ("a.txt", "b.txt")),
        evaluation=EVALUATION,
        warnings=("Look out.",),
        versions={"molae_compress": "0.1.0", "python": "3.11.9"},
        timings={"solve": 3.5},
        resumed=0,
        inputs={},
        files={"model.safetensors": "abc"},
        source={"fingerprint": "f00", "bytes": plan.source_bytes},
        artifact={"bytes": plan.artifact_bytes},
    )
    return replace(report, **changes)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    report = made_report()
    path = report.save(tmp_path)
    loaded = Report.load(tmp_path)
    assert loaded.to_dict() == report.to_dict() == json.loads(path.read_text())
    assert loaded.layers == report.layers
    assert loaded.calibration == report.calibration
    assert Report.from_dict(made_report(calibration=None, evaluation=None).to_dict()).calibration is None


def test_it_adds_up_what_follows_from_its_layers() -> None:
    content = made_report().to_dict()
    assert content["err_h"] == 0.01
    assert [layer["unseen_experts"] for layer in content["layers"]] == [1, 0]
    assert made_report(layers=made_report().layers[1:]).err_h is None, "nothing measured is not an error of zero"


def test_figures_that_json_cannot_say_are_null(tmp_path: Path) -> None:
    path = made_report(evaluation={**EVALUATION, "perplexity": math.inf}).save(tmp_path)
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["evaluation"]["perplexity"] is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no molae_report.json"),
        ("{", "cannot be read"),
        ("[]", "does not hold a report"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "layers": []}', "model"),
    ],
)
def test_a_report_that_is_not_ours_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "molae_report.json").write_text(text)
    with pytest.raises(CheckpointError, match=says) as caught:
        Report.load(tmp_path)
    assert caught.value.remedy


@pytest.mark.parametrize(("key", "value"), [("files", 7), ("recipe", []), ("artifact", {}), ("layers", None)])
def test_a_report_with_an_entry_of_another_kind_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match="The report cannot be read"):
        Report.from_dict({**made_report().to_dict(), key: value})


def test_a_report_with_an_unknown_entry_in_a_layer_is_refused() -> None:
    content = made_report().to_dict()
    content["layers"][0]["erh_h"] = 1.0
    with pytest.raises(CheckpointError, match="erh_h"):
        Report.from_dict(content)


def test_warnings_name_what_a_reader_must_know() -> None:
    fine = (LayerReport("a", {}, 0.02, 0.1, 8, (4, 4)), LayerReport("b", {}, 0.02, 0.1, 8, (4, 4)))
    text = CalibrationReport(64, 8, "x", ("a.txt", "b.txt"))
    assert warnings_for(fine, text, samples=8) == ()
    assert warnings_for([LayerReport("a", {})], None, samples=None) == (), "data-free, nothing was measured"

    (unseen,) = warnings_for((fine[0], replace(fine[1], tokens_per_expert=(0, 8))), text, samples=8)
    assert unseen.startswith("1 experts in 1 of 2 layers saw no calibration token")
    (high,) = warnings_for((fine[0], replace(fine[1], err_h=0.05)), text, samples=8)
    assert "0.070" in high
    assert "0.14 nats" in high
    (narrow,) = warnings_for(fine, replace(text, sources=("a.txt",)), samples=8)
    assert "one source, 'a.txt'" in narrow
    (few,) = warnings_for(fine, text, samples=9)
    assert "8 windows, fewer than the 9" in few


def front_matter(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


def test_the_card_is_the_same_whatever_the_clock_says() -> None:
    report = made_report()
    layers = (replace(report.layers[0], seconds=99.0), report.layers[1])
    slower = replace(report, timings={"solve": 99.0}, layers=layers)
    assert model_card(report, None) == model_card(slower, None)


def test_the_front_matter_tells_the_hub_where_the_model_comes_from() -> None:
    base = "\ufeff---\nlicense: other\nlicense_name: its-own\nlanguage:\n- en\ntags: [theirs]\n---\n# Base\n"
    base = base.replace("\n", "\r\n")
    found = front_matter(model_card(made_report(), base))
    assert found == {
        "license": "other",
        "license_name": "its-own",
        "language": ["en"],
        "library_name": "transformers",
        "base_model": "org/Base-MoE",
        "base_model_relation": "quantized",
        "tags": ["molae", "mixture-of-experts", "latent-experts", "compression"],
    }


@pytest.mark.parametrize(
    "readme", [None, "", "# No front matter\n---\nlicense: mit\n---\n", "---\n: [\n---\n", "---\ntext\n---\n"]
)
def test_a_base_card_without_front_matter_leaves_nothing_out_of_place(readme: str | None) -> None:
    assert list(front_matter(model_card(made_report(), readme))) == [
        "library_name",
        "base_model",
        "base_model_relation",
        "tags",
    ]


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in ("models/mine", str(tmp_path / "models" / "mine")):
        card = model_card(made_report(model=model, recipe={}), None)
        assert "base_model" not in front_matter(card)
        assert "# mine, latent experts" in card
    assert "# Model, latent experts" in model_card(replace(made_report(), model=None), None)


def test_the_card_shows_what_was_measured_and_nothing_else() -> None:
    card = model_card(made_report(), None)
    table = {row.split(" | ")[0]: row for row in card.splitlines() if row.startswith("| ")}
    assert "| 20.250 | 21.500 |" in table["| perplexity"]
    assert "0.0625" in table["| KL divergence from the original (nats per token)"]
    assert "87.5%" in table["| same most likely token as the original"]
    assert "4,096 tokens of `python-docs:heldout`" in card
    assert f"`{SPECS[0].name}` | grouped | 2/1 | 16/8 |" in card
    assert f"`{SPECS[1].name}` | dense |  |  | 100.0% |  |  |  |" in card

    alone = model_card(made_report(evaluation={"tokens": 4096, "perplexity": 21.5, "kl": None}), None)
    assert "| perplexity |  | 21.500 |" in alone
    assert "KL divergence" not in alone.split("## How to load it")[0]
    silent = model_card(made_report(evaluation=None, calibration=None, warnings=()), None)
    assert "| perplexity" not in silent
    assert "data-free" in silent
    assert "Warnings" not in silent


def test_every_module_of_the_plan_is_in_the_table_of_layers() -> None:
    card = model_card(made_report(), None)
    table = [line for line in card.split("<details>")[1].splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(SPECS)
    assert len({row.count("|") for row in table}) == 1


def test_the_recipe_in_the_card_makes_the_same_run() -> None:
    report = made_report()
    card = model_card(report, None)
    block = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert block is not None
    assert Recipe.load(yaml.safe_load(block[1])).fingerprint() == report.recipe_fingerprint
    assert report.recipe_fingerprint in card
    assert "c0ffee" in card


def test_the_card_says_to_import_the_package_first() -> None:
    snippet = re.search(r"```python\n(.*?)```", model_card(made_report(), None), re.DOTALL)
    assert snippet is not None
    assert snippet[1].startswith("import molae_compress")
    compile(snippet[1], "card", "exec")
    assert "molae-compress verify" in model_card(made_report(), None)
