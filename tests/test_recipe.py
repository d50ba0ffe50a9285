"""Recipes: what they accept, what they refuse and in which words, and that they stay comparable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from molae_compress.errors import MolaeError, RecipeError
from molae_compress.recipe import Recipe, bundled_recipes, format_size, parse_size
from molae_compress.recipe.sections import SECTIONS
from molae_compress.report.schema_page import recipe_reference

ROOT = Path(__file__).resolve().parents[1]


def load(content: dict[str, Any] | None = None, *overrides: str) -> Recipe:
    return Recipe.load({"molae": 1, **(content or {})}, overrides)


def refusal(content: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(content, *overrides)
    return str(caught.value)


# What a recipe is


def test_defaults_are_the_documented_ones() -> None:
    recipe = load()
    assert (recipe.budget.keep, recipe.budget.rank, recipe.budget.target_size) == (0.6, None, None)
    assert recipe.calibration is None
    assert recipe.output.max_shard_size == 5_000_000_000
    with pytest.raises(Exception, match="frozen"):
        recipe.budget.keep = 0.5
    assert hash(recipe) == hash(load())


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"method": "paper", "budget": {"rank": "full"}},
        # Texts that YAML would read as numbers or truth values if they were written without quotes.
        {"model": "on", "revision": "1e5", "calibration": {"data": ["a: b", "ü.txt"], "column": "null"}},
        {"budget": {"target_size": "1.5GiB", "align": 8}, "refit": {"shrinkage": 1e-5}, "ignore": [r"re:.*\.0\..*"]},
        {"basis": {"profile": "serving", "output": "combined"}, "evaluate": {"data": "x"}, "gate": {"max_kl": 0.1}},
    ],
)
def test_a_dump_is_complete_and_reads_back_equal(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = load(content)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.dump(), encoding="utf-8")
    again = Recipe.load(path)
    assert again == recipe
    assert again.dump() == recipe.dump()
    assert again.fingerprint() == recipe.fingerprint()
    assert Recipe.load(recipe) == recipe
    written = yaml.safe_load(recipe.dump())
    assert list(written) == list(Recipe.model_fields)
    for place, section in SECTIONS.items():
        assert written[place] is None or list(written[place]) == list(section.model_fields)


def test_the_fingerprint_follows_the_meaning_not_the_writing() -> None:
    one = load({"budget": {"target_size": "24GB"}, "calibration": {"data": "a.txt"}})
    same = load({"calibration": {"data": ["a.txt"], "seed": 0}, "budget": {"target_size": 24 * 10**9, "keep": None}})
    assert one.fingerprint() == same.fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", one.fingerprint())
    changes = ["budget.keep=0.5", "calibration.seed=1", "ignore=[x]", "output.dtype=float32", "revision=main"]
    assert len({Recipe.load(one, [change]).fingerprint() for change in changes} | {one.fingerprint()}) == 6


def test_differences_name_each_key() -> None:
    one = load({"calibration": {"data": "a"}})
    other = Recipe.load(one, ["budget.keep=0.5", "calibration.data=b", "basis.profile=serving"])
    assert one.differences(other) == [
        'calibration.data: ["a"] -> ["b"]',
        "basis.profile: quality -> serving",
        "budget.keep: 0.6 -> 0.5",
    ]
    assert one.differences(one) == []
    assert [line.partition(":")[0] for line in one.differences(load())] == ["calibration"]


def test_the_schema_describes_every_key() -> None:
    schema = Recipe.schema()
    definitions = {name: schema["$defs"][name] for name in ("Calibration", "Basis", "Budget", "Evaluate", "Output")}
    for name, definition in {"Recipe": schema, **definitions}.items():
        assert definition["additionalProperties"] is False
        assert definition["description"], name
        for key, entry in definition["properties"].items():
            assert "description" in entry or key in SECTIONS, f"{name}.{key}"
    assert schema["required"] == ["molae"]


def test_the_reference_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8") == recipe_reference(), (
        "run: python -m molae_compress.report.schema_page docs/recipe-reference.md"
    )


# Sizes


@given(st.integers(1, 2**60))
def test_sizes_round_trip(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("5 gib", 5 * 2**30), ("1.5MB", 1_500_000), ("7B", 7), (12, 12), ("2TiB", 2 * 2**40)],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "5", "GB", "5 gigs", "-5GB", "0GB", 0, -1, True, "1e3MB", 2.5, None])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(RecipeError, match="size"):
        parse_size(text)


# Refusals


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"budget": {"kep": 0.5}}, ["`budget.kep`", "keep, rank, target_size", "Did you mean `budget.keep`?"]),
        ({"keep": 0.5}, ["`keep`", "Did you mean `budget.keep`?"]),
        ({"calibratoin": {}}, ["`calibratoin`", "Did you mean `calibration`?"]),
        ({"budget": {"samples": 4}}, ["`budget.samples`", "`calibration.samples` or `finetune.samples` or `evaluate"]),
        ({"evaluate": {"daat": "x"}}, ["`evaluate.daat`", "Did you mean `evaluate.data`?"]),
        ({3: 4}, ["`3` is not a key"]),
        ({"evaluate": {"samples": 4}}, ["`evaluate.data` is missing"]),
        ({"budget": 0.6}, ["`budget` is `0.6`", "keep, rank"]),
        ({"basis": None}, ["`basis` is `null`", "remove it"]),
        ({"budget": {"keep": 1.5}}, ["`budget.keep`", "1.5", "above 0 up to 1"]),
        ({"budget": {"keep": 0}}, ["`budget.keep`", "above 0 up to 1"]),
        ({"budget": {"keep": float("nan")}}, ["`budget.keep`", "NaN"]),
        ({"refit": {"shrinkage": float("inf")}}, ["`refit.shrinkage`", "Infinity"]),
        ({"budget": {"keep": "0.6"}}, ["`budget.keep`", "a number"]),
        ({"budget": {"rank": "ful"}}, ["`budget.rank`", "ful", "whole number", "Did you mean `full`?"]),
        ({"budget": {"target_size": "24 gigs"}}, ["`budget.target_size`", "24 gigs", "GiB"]),
        (
            {"basis": {"profile": "servng"}},
            ["`basis.profile`", "servng", "quality, serving", "Did you mean `serving`?"],
        ),
        ({"basis": {"experts_per_input_group": True}}, ["`basis.experts_per_input_group`", "true", "auto, all"]),
        ({"basis": {"experts_per_output_group": 0}}, ["`basis.experts_per_output_group`", "at least 1"]),
        ({"refit": {"cores": "yes"}}, ["`refit.cores`", "true, false"]),
        ({"revision": 1234567}, ["`revision`", "1234567", "quotes"]),
        ({"calibration": {"data": []}}, ["`calibration.data`", "no source"]),
        ({"calibration": {"data": ["a.txt", 3]}}, ["`calibration.data`", "3", "list of texts"]),
        ({"ignore": ["re:("]}, ["`ignore`", "re:(", "regular expression"]),
        ({"molae": 2, "newer": 1}, ["schema version 2", "version 1"]),
        ({"molae": True}, ["schema version True"]),
    ],
)
def test_a_wrong_key_or_value_is_said_in_one_sentence(content: dict[str, Any], words: list[str]) -> None:
    message = refusal(content)
    assert [word for word in words if word not in message] == [], message
    assert "pydantic" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"budget": {"keep": 0.5, "rank": 8}}, ["`budget.keep: 0.5`, `budget.rank: 8`"]),
        ({"basis": {"profile": "serving", "storage": "interpolative"}}, ["serving", "`basis.storage: interpolative`"]),
        ({"basis": {"profile": "serving", "gate_up": "separate"}}, ["serving", "`basis.gate_up: separate`"]),
        ({"basis": {"profile": "serving", "down": "dense"}}, ["serving", "`basis.down: dense`"]),
        ({"basis": {"profile": "serving", "experts_per_input_group": 4}}, ["`basis.experts_per_input_group: 4`"]),
        ({"basis": {"output": "combined"}}, ["`basis.output: combined`", "experts_per_output_group: all"]),
        ({"basis": {"down": "dense", "output": "combined"}}, ["`basis.down: dense`", "`basis.output: combined`"]),
        ({"basis": {"down": "dense", "experts_per_output_group": 1}}, ["experts_per_output_group: 1"]),
        ({"gate": {"max_kl": 0.1}}, ["`gate.max_kl: 0.1`", "evaluate"]),
        ({"refit": {"sequential": True}}, ["`refit.sequential: true`", "calibration"]),
        ({"refit": {"newton": 3, "cores": False}}, ["`refit.newton: 3`", "`refit.cores: false`"]),
        ({"refit": {"newton": 3}, "basis": {"metric": "input"}}, ["`refit.newton: 3`", "`basis.metric: input`"]),
        ({"method": "paper", "calibration": {"data": "x"}}, ["`method: paper`", "`calibration`", "data-free"]),
        ({"method": "paper", "basis": {"gate_up": "joint"}}, ["`basis.gate_up: joint`", "paper", "separate"]),
        ({"method": "paper", "basis": {"down": "latent"}}, ["`basis.down: latent`", "dense"]),
        ({"method": "paper", "basis": {"profile": "serving"}}, ["`basis.profile: serving`", "quality"]),
        ({"method": "paper", "refit": {"cores": True}}, ["`refit.cores: true`", "false"]),
    ],
)
def test_contradictions_are_refused(content: dict[str, Any], words: list[str]) -> None:
    message = refusal(content)
    assert [word for word in words if word not in message] == [], message


def test_what_is_close_to_a_contradiction_is_allowed() -> None:
    assert load({"budget": {"allocate": "spectrum"}}).calibration is None
    assert load({"basis": {"output": "combined", "experts_per_output_group": "all"}})
    assert load({"basis": {"profile": "serving", "output": "combined", "experts_per_input_group": "all"}})
    assert load({"gate": {"max_kl": None}})
    assert load({"refit": {"sequential": True}, "calibration": {}}).calibration.data is None  # type: ignore[union-attr]


def test_paper_is_the_published_procedure() -> None:
    recipe = load({"method": "paper", "basis": {"experts_per_input_group": 8}})
    basis, refit = recipe.basis, recipe.refit
    assert (basis.gate_up, basis.down, basis.metric, basis.storage) == ("separate", "dense", "input", "orthonormal")
    assert basis.experts_per_input_group == 8
    assert (refit.cores, refit.down, recipe.budget.allocate) == (False, False, "uniform")
    assert Recipe.load({"molae": 1}, ["method=paper"]).basis.gate_up == "separate"
    assert Recipe.load({"molae": 1, "method": "paper"}, ["method=latent"]).basis.gate_up == "joint"


# Overrides


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        (["budget.rank=8"], {"rank": 8}),
        (["budget.rank=full"], {"rank": "full"}),
        (["budget.target_size=500MB"], {"target_size": 500_000_000}),
        (["budget.rank=8", "budget.keep=0.3"], {"keep": 0.3}),
        (["budget.allocate=uniform"], {"keep": 0.5}),
        (["budget.keep=null"], {"keep": 0.6}),
    ],
)
def test_a_budget_replaces_the_budget_of_the_file(overrides: list[str], kept: dict[str, Any]) -> None:
    for source in ({"molae": 1, "budget": {"keep": 0.5}}, load({"budget": {"keep": 0.5}})):
        budget = Recipe.load(source, overrides).budget
        assert budget.model_dump(include={"keep", "rank", "target_size"}, exclude_none=True) == kept


def test_overrides_read_yaml_and_leave_the_source_alone() -> None:
    source = {"molae": 1, "calibration": {"data": "a.txt", "seed": 3}}
    overrides = ["calibration.data=[b.txt, c.txt]", "refit.shrinkage=1e-3", "model=org/name"]
    recipe = Recipe.load(source, overrides)
    assert recipe.calibration is not None
    assert recipe.calibration.data == ("b.txt", "c.txt")
    assert (recipe.calibration.seed, recipe.refit.shrinkage, recipe.model) == (3, 0.001, "org/name")
    assert source == {"molae": 1, "calibration": {"data": "a.txt", "seed": 3}}
    assert Recipe.load(source, ["calibration=null"]).calibration is None
    assert load({}, "calibration.samples=4").calibration.samples == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("budget.kep=0.5", ["`budget.kep`", "Did you mean `budget.keep`?"]),
        ("bugdet.keep=0.5", ["`bugdet`", "Did you mean `budget`?"]),
        ("budget.keep", ["no '='", "budget.keep=0.6"]),
        ("budget.keep=2", ["`budget.keep`", "2"]),
        ("model.name=x", ["`model.name`", "no keys below"]),
        ("calibration.data=[a", ["`calibration.data`", "not valid YAML"]),
    ],
)
def test_wrong_overrides(override: str, words: list[str]) -> None:
    message = refusal({}, override)
    assert [word for word in words if word not in message] == [], message


# Files


def test_a_missing_file_is_never_read_as_yaml(tmp_path: Path) -> None:
    (tmp_path / "mixed_run.yaml").write_text("molae: 1")
    with pytest.raises(RecipeError, match=r"no recipe .*Did you mean '.*mixed_run\.yaml'.*quickstart"):
        Recipe.load(tmp_path / "mixd_run.yaml")
    with pytest.raises(RecipeError, match="Did you mean 'quickstart'"):
        Recipe.load("quickstrat")
    with pytest.raises(RecipeError, match=r"folder 'nowhere' does not exist.*Did you mean 'qwen_moe'"):
        Recipe.load("nowhere/qwen-moe.yaml")
    with pytest.raises(RecipeError, match="no recipe 'molae: 1'"):
        Recipe.load("molae: 1")
    with pytest.raises(RecipeError, match="is a folder"):
        Recipe.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment", "is empty"),
        (b"- molae: 1", "not keys and values"),
        (b"quickstart", "not keys and values"),
        (b"molae: 1\nbudget:\n  keep: 0.5\n  keep: 0.6", r"line 4.*'keep' is there twice"),
        (b"molae: 1\nmodel: [x", "not valid YAML at line 2"),
        (b"molae: 1\nmodel: !!python/object:os.system x", "not valid YAML at line 2"),
        (b"molae: 1\n# caf\xe9", r"not UTF-8 \(byte 14\)"),
        (b"model: x", "`molae` is missing.*first line"),
        (b"molae: 1\ncalibration:\nbudget:\n  keep: 0.5", r"nothing below `calibration:` \(line 2.*data-free run"),
        (b"molae: 1\nevaluate: # later", "nothing below `evaluate:`"),
    ],
)
def test_unusable_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(MolaeError, match=message):
        Recipe.load(path)


def test_bundled_recipes_load_by_name_and_explain_themselves() -> None:
    bundled = bundled_recipes()
    assert list(bundled) == ["deepseek", "gpt_oss", "mixtral", "olmoe", "quickstart", "qwen_moe", "scratch"]
    for name, path in bundled.items():
        recipe = Recipe.load(name)
        assert recipe == Recipe.load(path)
        if recipe.init is not None:
            assert f"molae-compress init recipes/{name}.yaml" in path.read_text(encoding="utf-8")
            continue
        assert recipe.model
        assert recipe.calibration is not None
        assert recipe.evaluate is not None
        assert set(recipe.calibration.data or ()).isdisjoint(recipe.evaluate.data), "evaluated on its own calibration text"
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert f"molae-compress apply recipes/{name}.yaml" in text
        assert max(map(len, text.splitlines())) <= 120
