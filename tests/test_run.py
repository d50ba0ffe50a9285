"""A recipe applied to a checkpoint of every family, and everything that is promised about the folder it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

import molae_compress as molae
from molae_compress import Recipe, Report, evaluation
from molae_compress.calibration.text import read_texts, token_windows
from molae_compress.calibration.walk import LayerArguments
from molae_compress.modeling.latent import LatentExperts
from tests.conftest import CheckpointMaker
from tests.runs import (
    LENGTH,
    SLOTS,
    WINDOWS,
    distance,
    edit_json,
    hashes,
    is_expert,
    loaded,
    logits,
    recipe_for,
    same_every_time,
    tensors_in,
)
from tests.tiny import EXPERTS, FAMILIES, tiny_ids, tiny_tokenizer


@dataclass(frozen=True)
class Made:
    """One run, and the same recipe applied to the live model."""

    source: Path
    folder: Path
    recipe: Recipe
    report: Report
    live: PreTrainedModel
    source_before: dict[str, str]


@pytest.fixture(scope="module")
def made(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """`made(family)`: run once a session."""
    runs: dict[str, Made] = {}

    def make(family: str) -> Made:
        if family not in runs:
            source, folder = checkpoint(family), tmp_path_factory.mktemp("run") / family
            before, recipe = hashes(source), recipe_for(source)
            report = molae.run(recipe, folder)
            live = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
            molae.compress_(live, recipe)
            runs[family] = Made(source, folder, recipe, report, live, before)
        return runs[family]

    return make


def test_the_folder_loads_as_what_compress_makes_in_memory(made: Callable[[str], Made], family: str) -> None:
    run = made(family)
    model = loaded(run.folder)
    latent = [module for module in model.modules() if isinstance(module, LatentExperts)]
    assert len(latent) == len(run.report.layers) == 2
    assert distance(logits(model), logits(run.live)) < 1e-5
    assert distance(logits(model), logits(loaded(run.source))) > 1e-3  # and is not the original


def test_everything_but_the_experts_is_copied_bit_for_bit(made: Callable[[str], Made], family: str) -> None:
    run = made(family)
    before, after = tensors_in(run.source), tensors_in(run.folder)
    kept = {key for key in before if not is_expert(key)}
    assert kept == {key for key in after if not is_expert(key)}
    assert any("gate.weight" in key or "router" in key for key in kept)
    for key in kept:
        assert before[key].dtype == after[key].dtype
        assert torch.equal(before[key], after[key]), key
    assert hashes(run.source) == run.source_before


def test_sizes_are_exact(made: Callable[[str], Made], family: str) -> None:
    run = made(family)
    stored = sum(tensor.nbytes for tensor in tensors_in(run.folder).values())
    assert run.report.artifact["bytes"] == run.report.plan["artifact_bytes"] == stored
    assert run.report.source["bytes"] == sum(tensor.nbytes for tensor in tensors_in(run.source).values())
    parameters = sum(tensor.numel() for key, tensor in tensors_in(run.folder).items() if is_expert(key))
    dense = sum(tensor.numel() for key, tensor in tensors_in(run.source).items() if is_expert(key))
    assert (run.report.plan["parameters"], run.report.plan["dense_parameters"]) == (parameters, dense)
    assert 0.55 * dense < parameters <= 0.6 * dense  # the budget is spent, and kept


def test_config_recipe_and_report_say_what_was_done(made: Callable[[str], Made], family: str) -> None:
    run = made(family)
    config = json.loads((run.folder / "config.json").read_text())
    source_config = json.loads((run.source / "config.json").read_text())
    entry = config.pop("quantization_config")
    assert config == source_config
    assert (entry["quant_method"], entry["format"]) == ("molae", 1)
    assert entry["modules"] == {layer.name: layer.shape for layer in run.report.layers}
    assert Recipe.load(run.folder / "recipe.yaml").fingerprint() == run.recipe.fingerprint()
    planned = molae.plan(run.recipe)
    assert planned.artifact_bytes <= planned.limit_bytes
    assert run.report.artifact["bytes"] <= planned.limit_bytes

    report = Report.load(run.folder)
    assert report.to_dict() == run.report.to_dict()
    assert report.files == same_every_time(run.folder)
    assert report.calibration is not None
    assert (report.calibration.tokens, report.calibration.windows) == (WINDOWS * LENGTH, WINDOWS)
    for layer in report.layers:
        assert layer.err_h is not None
        assert 0 < layer.err_h < 1
        assert layer.relative_error is not None
        assert 0 < layer.relative_error < 1
        assert layer.tokens_measured == LENGTH
        assert len(layer.tokens_per_expert) == EXPERTS
        assert sum(layer.tokens_per_expert) == SLOTS
    assert report.err_h == pytest.approx(sum(layer.err_h or 0 for layer in report.layers))


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [((), True), (("method=paper", "budget.keep=0.7"), False), (("budget.rank=full",), False)],
)
def test_a_data_free_result_says_so(
    checkpoint: CheckpointMaker, tmp_path: Path, overrides: tuple[str, ...], warned: bool
) -> None:
    report = molae.run(recipe_for(checkpoint("qwen3_moe"), *overrides, calibrated=False), tmp_path / "out")
    assert any("No calibration text" in warning for warning in report.warnings) == warned


def test_the_card_has_front_matter(made: Callable[[str], Made], family: str) -> None:
    card = (made(family).folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "import molae_compress" in body
    assert "molae-compress verify" in body


def test_verify_passes(made: Callable[[str], Made], family: str) -> None:
    found = molae.verify(made(family).folder)
    assert found.passed, found
    assert [check.name for check in found.checks] == ["report", "files", "tensors", "forward", "loading"]
    assert "skipped" not in found.checks[-1].detail


def test_saving_the_loaded_model_again_changes_nothing(made: Callable[[str], Made], family: str, tmp_path: Path) -> None:
    first = loaded(made(family).folder)
    first.save_pretrained(tmp_path)
    assert distance(logits(loaded(tmp_path)), logits(first)) <= 1e-6  # products round by the alignment of mapped files
    again, before = tensors_in(tmp_path), tensors_in(made(family).folder)
    assert {key: tensor.shape for key, tensor in again.items()} == {key: tensor.shape for key, tensor in before.items()}
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_evaluate_agrees_with_the_models_themselves(
    made: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_POSITIONS", 12)  # neither a whole window nor a part of one
    run = made("gpt_oss")  # sliding and full attention layers, and a window shorter than the text
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 4)
    found = molae.evaluate(
        run.folder, data=[str(tmp_path / "text.txt")], against=str(run.source), samples=3, sequence_length=32, batch_size=2
    )
    texts = read_texts([str(tmp_path / "text.txt")], "text")
    ids_NL = token_windows(texts, tiny_tokenizer(), samples=3, sequence_length=32, seed=None)
    with torch.no_grad():
        ours, theirs = (
            loaded(folder)(input_ids=ids_NL).logits[:, :-1].double().log_softmax(-1) for folder in (run.folder, run.source)
        )
    nll, original_nll = (-logp.gather(-1, ids_NL[:, 1:, None]).mean() for logp in (ours, theirs))
    assert found.tokens == 3 * 31
    assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-4)
    assert found.original_perplexity == pytest.approx(float(original_nll.exp()), rel=1e-4)
    assert found.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))


def test_evaluate_makes_logits_of_one_window_at_a_time(
    made: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, shapes, real = made("qwen3_moe"), [], LayerArguments.logits

    def watched(*args: Any) -> torch.Tensor:
        out_BLV = real(*args)
        shapes.append(tuple(out_BLV.shape[:2]))
        return out_BLV

    monkeypatch.setattr(LayerArguments, "logits", watched)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 4)
    data = [str(tmp_path / "text.txt")]
    together = molae.evaluate(run.folder, data=data, samples=5, sequence_length=32, batch_size=4)
    assert shapes == [(1, 32)] * 5
    alone = molae.evaluate(run.folder, data=data, samples=5, sequence_length=32, batch_size=1)
    assert together.perplexity == pytest.approx(alone.perplexity, rel=1e-5)


# Damage


def flip_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def first_bank(shape: dict[str, Any]) -> dict[str, Any]:
    """Where the ranks of a module are written, or those of its first bank."""
    return next(iter(shape.get("banks", [shape])))


def change_a_rank(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    first_bank(next(iter(config["quantization_config"]["modules"].values())))["rank_in"] += 1
    (folder / "config.json").write_text(json.dumps(config))


def forget_a_module(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    del modules[next(iter(modules))]
    (folder / "config.json").write_text(json.dumps(config))


def change_a_hash_in_the_report(folder: Path) -> None:
    edit_json(folder / "molae_report.json", files={"model.safetensors": "0" * 64})


def vouch_for_nothing(folder: Path) -> None:
    edit_json(folder / "molae_report.json", files={})


def change_the_size_in_the_report(folder: Path) -> None:
    edit_json(folder / "molae_report.json", artifact={"bytes": 1})


def change_a_rank_in_the_report(folder: Path) -> None:
    content = json.loads((folder / "molae_report.json").read_text())
    first_bank(content["layers"][1]["shape"])["rank_out"] += 1
    edit_json(folder / "molae_report.json", layers=content["layers"])


def cut_the_report(folder: Path) -> None:
    path = folder / "molae_report.json"
    path.write_text(path.read_text()[:-200])


def break_the_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("a: [")


def change_the_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", rms_norm_eps=0.5)


@pytest.mark.parametrize(
    ("damage", "failing"),
    [
        (flip_a_weight, "files"),
        (change_a_rank, "tensors"),
        (forget_a_module, "tensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "files"),
        (lambda folder: (folder / "config.json").unlink(), "tensors"),
        (change_the_architecture, "files"),
        (change_a_hash_in_the_report, "files"),
        (vouch_for_nothing, "files"),
        (change_the_size_in_the_report, "tensors"),
        (change_a_rank_in_the_report, "tensors"),
        (cut_the_report, "report"),
        (lambda folder: (folder / "molae_report.json").unlink(), "report"),
    ],
)
def test_verify_finds_damage(
    made: Callable[[str], Made], damage: Callable[[Path], None], failing: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made("qwen3_moe").folder, tmp_path / "damaged"))
    damage(folder)
    found = molae.verify(folder)
    assert not found.passed
    assert failing in [check.name for check in found.checks if not check.passed], found


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (break_the_recipe, "not valid YAML"),
        (lambda folder: edit_json(folder / "molae_report.json", files=7), "`files` is 7, not a mapping"),
        (lambda folder: edit_json(folder / "molae_report.json", artifact={}), "`artifact` holds no number of `bytes`"),
    ],
)
def test_verify_says_what_is_wrong_with_a_report(
    made: Callable[[str], Made], damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(made("qwen3_moe").folder, tmp_path / "damaged"))
    damage(folder)
    (first, *_) = molae.verify(folder).checks
    assert (first.name, first.passed) == ("report", False)
    assert says in first.detail


def test_whatever_loading_raises_is_a_failed_check(made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("in somebody else's code")

    monkeypatch.setattr("molae_compress.verification.probe", fails)
    last = molae.verify(made("qwen3_moe").folder).checks[-1]
    assert (last.name, last.passed, last.detail) == ("forward", False, "ZeroDivisionError: in somebody else's code")


# Back to dense

_WITHOUT_US = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
ids, answers = torch.load(sys.argv[1]), {}
for folder in map(Path, sys.argv[3:]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        answers[folder.name] = model.eval()(input_ids=ids).logits
assert not any(name.startswith("molae") for name in sys.modules)
torch.save(answers, sys.argv[2])
"""


def test_expanded_folders_load_without_this_package(made: Callable[[str], Made], tmp_path: Path) -> None:
    pairs = {family: (made(family).source, made(family).folder) for family in FAMILIES}
    layer_form = tmp_path / "latent" / "layer form"
    molae.run(recipe_for(pairs["mixtral"][0], "basis.profile=serving"), layer_form)
    pairs["layer form"] = pairs["mixtral"][0], layer_form
    dense = [tmp_path / name for name in pairs]
    for (source, folder), out in zip(pairs.values(), dense, strict=True):
        molae.expand(folder, out)
        assert sorted(tmp_path.glob("*.expand-work")) == []
        before, after = tensors_in(source), tensors_in(out)
        assert {key: tensor.shape for key, tensor in before.items()} == {key: tensor.shape for key, tensor in after.items()}
        assert all(torch.equal(before[key], after[key]) for key in before if not is_expert(key))
    torch.save(tiny_ids(), tmp_path / "ids.pt")
    command: list[Any] = [sys.executable, "-c", _WITHOUT_US, tmp_path / "ids.pt", tmp_path / "answers.pt", *dense]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    answers = torch.load(tmp_path / "answers.pt")
    for name, (_, folder) in pairs.items():
        assert distance(answers[name], logits(loaded(folder))) < 1e-5, name
