"""Calibration windows that the model writes itself: what is drawn, how many, and where they go."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

import molae_compress as molae
from molae_compress import generation
from molae_compress.compress import Run
from molae_compress.errors import DataError, ModelError, ResumeError
from molae_compress.generation import begin_windows, wanted, write_windows
from molae_compress.recipe import Recipe
from molae_compress.recipe.sections import Calibration
from molae_compress.source import DiskSource, LiveSource
from tests.conftest import CheckpointMaker
from tests.runs import LENGTH, TEXT, WINDOWS, recipe_for, same_every_time, text_beside
from tests.test_resume import dies
from tests.tiny import VOCABULARY, tiny_ids, tiny_model
from tests.zoo import zoo_model

FAMILY = "qwen3_moe"


def section(**values: Any) -> dict[str, Any]:
    return {"molae": 1, "calibration": {"sequence_length": LENGTH, "batch_size": 2, **values}}


def begun(model: PreTrainedModel, text_NL: Tensor | None, **values: Any) -> Run:
    run = Run(Recipe.load(section(**values)), LiveSource.of(model), None)
    assert run.recipe.calibration is not None
    begin_windows(run, text_NL, run.recipe.calibration.samples)
    return run


def windows_of(run: Run) -> Tensor:
    assert run.windows_NL is not None
    return run.windows_NL


@pytest.mark.parametrize(
    ("asked", "text", "number", "expected"),
    [
        (256, 256, "auto", (0, 32)),
        (256, 8, "auto", (248, 32)),
        (256, 8, 300, (248, 52)),
        (256, 8, 100, (100, 0)),
        (256, 256, 0, (0, 0)),
        (256, 8, 0, (0, 0)),
        (6, 6, "auto", (0, 0)),
        (256, 0, "auto", (0, 0)),  # without text the recipe has to ask for it
        (256, 0, 40, (0, 40)),
    ],
)
def test_how_many_windows_the_model_writes(asked: int, text: int, number: int | str, expected: tuple[int, int]) -> None:
    given = Calibration.model_validate({"data": "a.txt", "self_generated": number})
    assert wanted(given, text, asked) == expected


def test_windows_start_as_random_tokens_and_as_the_text_and_stand_before_it() -> None:
    text_NL = tiny_ids(2, LENGTH)
    run = begun(tiny_model(FAMILY), text_NL, samples=5, self_generated=7)
    windows_NL = windows_of(run)
    assert run.generated == 7
    assert torch.equal(windows_NL[:3], text_NL[[0, 0, 0]]), "the second window only measures"
    assert torch.equal(windows_NL[7:], text_NL)
    assert len(windows_NL[3:7].unique()) > LENGTH
    assert torch.equal(windows_of(begun(tiny_model(FAMILY), text_NL, samples=5, self_generated=7)), windows_NL)
    other = windows_of(begun(tiny_model(FAMILY), text_NL, samples=5, self_generated=7, seed=1))
    assert not torch.equal(other[3:7], windows_NL[3:7])


def reference_round(model: PreTrainedModel, ids_NL: Tensor, seed: int, allowed: list[int]) -> Tensor:
    """One round by the whole model's own forward and the definition of a draw."""
    chance = torch.Generator().manual_seed(seed)
    drawn_NL = ids_NL.clone()
    with torch.no_grad():
        logits_NLV = model(input_ids=ids_NL).logits.float()
    for window in range(len(ids_NL)):
        uniform = torch.rand(ids_NL.shape[1] - 1, generator=chance)
        for place in range(ids_NL.shape[1] - 1):
            probabilities = logits_NLV[window, place, allowed].softmax(-1)
            below = probabilities.cumsum(-1) <= uniform[place] * probabilities.sum()
            drawn_NL[window, place + 1] = allowed[int(below.sum())]
    return drawn_NL


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_rounds_draw_what_the_whole_model_predicts(family: str, checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Streamed from disk, layer by layer, spilled to disk, against plain forwards of the model in memory."""
    folder = checkpoint(family)
    source = DiskSource.open(str(folder), device=torch.device("cpu"))
    recipe = Recipe.load(section(self_generated=5, samples=5) | {"model": str(folder)})
    run = Run(recipe, source, None)
    begin_windows(run, None, 5)
    expected_NL = windows_of(run)
    model = tiny_model(family)
    allowed = [token for token in range(VOCABULARY) if token != 257]
    for number in (1, 2):
        expected_NL = reference_round(model, expected_NL, number, allowed)
    write_windows(run)
    assert torch.equal(windows_of(run), expected_NL)
    assert not run.unwritten


def test_special_tokens_are_neither_started_with_nor_drawn() -> None:
    model = tiny_model(FAMILY)
    assert model.config.pad_token_id == 257
    model.config.image_token_id = 3
    model.config.stop_token_ids = [4, 5]
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = model.get_input_embeddings().weight.abs().sum(0)
    run = begun(model, None, self_generated=12)
    assert not torch.isin(windows_of(run), torch.tensor([3, 4, 5, 257])).any()
    write_windows(run)
    assert not torch.isin(windows_of(run), torch.tensor([3, 4, 5, 257])).any()


def test_draws_follow_the_distribution() -> None:
    """Of three allowed tokens out of four, many draws each; the bound is five standard errors."""
    logits_V = torch.tensor([5.0, 0.0, 1.0, 2.0])
    count = 20_000
    uniform_P = torch.rand(count, generator=torch.Generator().manual_seed(0))
    drawn_P = generation._draw(logits_V.repeat(count, 1), uniform_P, torch.tensor([1, 2, 3]))
    expected = logits_V[1:].softmax(-1)
    found = torch.bincount(drawn_P, minlength=4) / count
    assert found[0] == 0
    assert ((found[1:] - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all()
    edges = generation._draw(torch.tensor([[0.0, -torch.inf, 0.0]] * 2), torch.tensor([0.0, 1 - 2**-24]), torch.arange(3))
    assert edges.tolist() == [0, 2]  # never what has no probability


def test_only_text_is_held_out_if_there_is_any() -> None:
    model = tiny_model(FAMILY)
    text_NL = tiny_ids(2, LENGTH)
    run = begun(model, text_NL, samples=2, self_generated=62)
    assert torch.equal(run.held_out_NL, text_NL[1:])
    run = begun(model, None, self_generated=32)
    assert len(run.held_out_NL) == 2
    run = begun(model, text_NL[:1], samples=17, self_generated=16)
    assert len(run.held_out_NL) == 1
    assert torch.equal(run.fitted_NL[:1], text_NL[:1]), "a single window is fitted on"
    assert not torch.equal(run.held_out_NL, text_NL[:1]) or run.unwritten


def test_a_recipe_without_text_has_the_model_write_it(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """No source of text: far better than no calibration, on text that no fit has seen."""
    folder = checkpoint(FAMILY)
    recipe = Recipe.load(section(self_generated=12) | {"model": str(folder), "budget": {"keep": 0.5}})
    report = molae.run(recipe, tmp_path / "out")
    assert report.calibration is not None
    assert (report.calibration.windows, report.calibration.self_generated) == (12, 12)
    assert report.calibration.tokens == 12 * LENGTH
    assert not any("No calibration text" in warning for warning in report.warnings)
    assert any("The model wrote all calibration text itself" in warning for warning in report.warnings)
    assert "the model wrote itself" in (tmp_path / "out" / "README.md").read_text()
    planned = molae.plan(recipe)
    assert (planned.tokens, planned.self_generated) == (12 * LENGTH, 12)
    assert "on text that the model wrote itself" in str(molae.plan(recipe, measured=True))
    blind = molae.run(Recipe.load({"molae": 1, "model": str(folder), "budget": {"keep": 0.5}}), tmp_path / "blind")
    assert blind.calibration is None
    text = text_beside(folder)
    kl = [molae.evaluate(tmp_path / name, data=[str(text)], against=str(folder)).kl for name in ("out", "blind")]
    assert kl[0] is not None
    assert kl[1] is not None
    assert kl[0] < 0.8 * kl[1]


def test_short_text_is_filled_up_and_the_report_says_so(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    folder = checkpoint(FAMILY)
    short = tmp_path / "short.txt"
    short.write_text(TEXT[: 8 * LENGTH])
    recipe = recipe_for(folder, f"calibration.data={short}", "calibration.samples=16")
    report = molae.run(recipe, tmp_path / "out")
    assert report.calibration is not None
    text = report.calibration.windows - report.calibration.self_generated
    assert 2 <= text < 16
    assert report.calibration.windows == 16 + 16 // 8
    assert any(f"gave {text} windows, fewer than the 16" in warning for warning in report.warnings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{text} from `{short}` and {18 - text} that the model wrote itself" in card


KILLS = [("text", 1), ("text", 2), ("text", 3), ("text", 4), ("observe", 1), ("solve", 0), ("solve", 1)]


@pytest.mark.parametrize(("stage", "done"), KILLS)
@pytest.mark.parametrize("max_memory", [None, 0])
def test_a_killed_run_goes_on_where_it_was(
    stage: str,
    done: int,
    max_memory: int | None,
    checkpoint: CheckpointMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether while windows are written or after, no layer before the place of the kill is passed again."""
    monkeypatch.setattr("molae_compress.stream.CHECKPOINT_SECONDS", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = recipe_for(checkpoint(FAMILY), "calibration.self_generated=6")

    def progress(*event: Any) -> None:
        if event[:2] == (stage, done):
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        assert dies(lambda: molae.run(recipe, tmp_path / "out", progress=progress, max_memory=max_memory))
        passed: list[tuple[str, int]] = []
        record = DiskSource.layer

        def layer(source: DiskSource, index: int) -> Any:
            passed.append((events[-1][0] if events else "", index))
            return record(source, index)

        events: list[tuple[Any, ...]] = []
        monkeypatch.setattr(DiskSource, "layer", layer)
        molae.run(recipe, tmp_path / "out", progress=lambda *event: events.append(event), max_memory=max_memory)
    finally:
        torch.set_num_threads(threads)
    of_stage = [index for name, index in passed if name == stage]
    if stage == "text":
        assert len(of_stage) == 4 - done, passed
    else:
        assert min(of_stage) == done, passed
        assert not [index for name, index in passed if name == "text"], "windows were written again"
    monkeypatch.undo()
    molae.run(recipe, tmp_path / "undisturbed")
    assert same_every_time(tmp_path / "out") == same_every_time(tmp_path / "undisturbed")


def test_the_same_call_finds_its_finished_artifact(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    recipe = recipe_for(checkpoint(FAMILY), "calibration.self_generated=6")
    first = molae.run(recipe, tmp_path / "out")
    assert molae.run(recipe, tmp_path / "out").files == first.files
    with pytest.raises(ResumeError, match="self_generated"):
        molae.run(recipe_for(checkpoint(FAMILY), "calibration.self_generated=5"), tmp_path / "out")


def test_a_measured_plan_and_other_budgets_share_what_was_written(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, options = checkpoint(FAMILY), {"work_dir": tmp_path / "work"}
    recipe = recipe_for(folder, "calibration.self_generated=6", "budget.keep=0.6")
    assert "6 windows of them are written by the model first" in str(molae.plan(recipe, measured=True, **options))

    def again(*_: Any) -> None:
        pytest.fail("windows were written again")

    monkeypatch.setattr(generation, "_round", again)
    report = molae.run(recipe, tmp_path / "out", **options)
    assert report.calibration is not None
    assert report.calibration.windows == WINDOWS + 6
    molae.run(recipe_for(folder, "calibration.self_generated=6", "budget.keep=0.5"), tmp_path / "out", fresh=True, **options)
    linear = recipe_for(folder, "calibration.self_generated=6", "calibration.weighting=linear")
    molae.run(linear, tmp_path / "out", fresh=True, **options)  # what is measured of them is made anew


def test_one_layer_at_a_time_and_few_logits(checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a layer is alive when the next is read, and not the logits of all positions of a window."""
    folder = checkpoint(FAMILY)
    source = DiskSource.open(str(folder), device=torch.device("cpu"))
    run = Run(Recipe.load(section(self_generated=4)), source, None)
    begin_windows(run, None, 0)
    read, drawn, dense, draw = [], [], DiskSource.dense, generation._draw

    def reading(*args: Any) -> Any:
        gc.collect()
        assert not [experts for experts in read if experts() is not None]
        found = dense(*args)
        read.append(weakref.ref(found))
        return found

    def drawing(logits_PV: Tensor, *args: Any) -> Tensor:
        assert not [logits for logits in drawn if logits() is not None]
        assert len(logits_PV) <= 5
        drawn.append(weakref.ref(logits_PV))
        return draw(logits_PV, *args)

    monkeypatch.setattr(DiskSource, "dense", reading)
    monkeypatch.setattr(generation, "_draw", drawing)
    monkeypatch.setattr(generation, "_POSITIONS", 5)
    begun_NL = windows_of(run)
    write_windows(run)
    assert len(read) == 4
    assert len(drawn) == 2 * 4 * -(-(LENGTH - 1) // 5)
    whole = Run(Recipe.load(section(self_generated=4)), DiskSource.open(str(folder), device=torch.device("cpu")), None)
    whole.windows_NL, whole.written, whole.unwritten = begun_NL, range(4), True
    monkeypatch.undo()
    write_windows(whole)
    assert torch.equal(windows_of(run), windows_of(whole))


def headless() -> PreTrainedModel:
    found = AutoModel.from_config(tiny_model(FAMILY).config).eval()
    assert isinstance(found, PreTrainedModel)
    return found


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("", "names no head"),
        ("DiffusionGemmaForBlockDiffusion", "predicts no next token"),
        ("SwitchTransformersForConditionalGeneration", "reads a text beside"),
    ],
)
def test_a_model_that_predicts_no_next_token_writes_nothing_unless_asked(model: str, reason: str) -> None:
    made = zoo_model(model) if model else headless()
    text_NL = tiny_ids(4, LENGTH)
    run = begun(made, text_NL, samples=16)
    assert run.generated == 0
    assert torch.equal(windows_of(run), text_NL)
    assert reason in run.notes[0]
    with pytest.raises(ModelError, match=reason):
        begun(made, text_NL, samples=16, self_generated=2)


def test_why_a_model_wrote_nothing_stands_in_the_report() -> None:
    report = molae.compress_(headless(), section(), data=tiny_ids(16, LENGTH))
    assert report.calibration is not None
    assert (report.calibration.windows, report.calibration.self_generated) == (16, 0)
    assert any("names no head" in warning for warning in report.warnings)


def test_only_tokens_that_are_read_and_predicted_are_drawn() -> None:
    model = tiny_model(FAMILY, tie_word_embeddings=False)
    model.lm_head = nn.Linear(model.config.hidden_size, 200, bias=False)
    run = begun(model, None, self_generated=6)
    assert int(windows_of(run).max()) < 200
    write_windows(run)
    assert int(windows_of(run).max()) < 200


def test_neither_text_nor_a_number_is_refused() -> None:
    with pytest.raises(DataError, match="no calibration text") as caught:
        begun(tiny_model(FAMILY), None)
    assert "self_generated" in (caught.value.remedy or "")


def test_a_model_that_predicts_nan_is_refused() -> None:
    model = tiny_model(FAMILY, tie_word_embeddings=False)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight[7] = torch.nan
    with pytest.raises(ModelError, match="predicts NaN"):
        write_windows(begun(model, None, self_generated=2))


@pytest.mark.parametrize(("number", "windows"), [("auto", 18), (0, 16), (5, 21)])
def test_in_memory_token_ids_are_as_many_as_were_wanted(number: str | int, windows: int) -> None:
    report = molae.compress_(tiny_model(FAMILY), section(samples=16, self_generated=number), data=tiny_ids(16, LENGTH))
    assert report.calibration is not None
    assert (report.calibration.windows, report.calibration.self_generated) == (windows, windows - 16)


def test_in_memory_without_data() -> None:
    report = molae.compress_(tiny_model(FAMILY), section(self_generated=5))
    assert report.calibration is not None
    assert (report.calibration.windows, report.calibration.self_generated) == (5, 5)


def test_nothing_reads_windows_that_are_not_written() -> None:
    run = begun(tiny_model(FAMILY), None, self_generated=4)
    with pytest.raises(AssertionError):
        run.observe_layers()
