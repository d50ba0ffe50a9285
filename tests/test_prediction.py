"""Quality predicted before solving: how good it is, what it costs, and what `budget.max_kl` makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

import molae_compress as molae
from molae_compress import Plan, Recipe, compress, probes
from molae_compress.cli import main
from molae_compress.errors import DataError, RecipeError, ResumeError
from molae_compress.prediction import power_law
from tests.conftest import CheckpointMaker
from tests.runs import hashes, recipe_for, same_every_time
from tests.test_resume import Countdown, dies
from tests.tiny import tiny_ids, tiny_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "pocket-moe"
TEXT = {"data": "python-docs:calibration", "samples": 32, "sequence_length": 128}
LIMIT = 0.1


def example(*overrides: str) -> Recipe:
    """A recipe for the trained model that comes with the repository."""
    return Recipe.load({"molae": 1, "model": str(EXAMPLE), "calibration": TEXT}, overrides)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A measured plan of the trained model, and its work directory."""
    work = tmp_path_factory.mktemp("measured") / "work"
    return molae.plan(example(), measured=True, work_dir=work), work


@pytest.fixture
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "measure_spectra", lambda *_: pytest.fail("observed again"))
    monkeypatch.setattr(probes.Probing, "_visit", lambda *_: pytest.fail("probed again"))


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize("keep", [0.6, 0.4], ids=["between the probes", "beyond them"])
def test_what_is_predicted_is_what_is_measured(measured: tuple[Plan, Path], tmp_path: Path, keep: float) -> None:
    planned, work = measured
    evaluated = "evaluate={data: python-docs:heldout, samples: 16, sequence_length: 128}"
    report = molae.run(example(f"budget.keep={keep}", evaluated), tmp_path / "out", work_dir=work)
    (choice,) = (choice for choice in planned.choices if choice.keep == keep)
    assert report.prediction is not None
    assert report.evaluation is not None
    assert report.prediction["kl"] == choice.prediction.kl
    assert report.plan["parameters"] == choice.parameters
    assert report.artifact["bytes"] == choice.artifact_bytes
    for layer in report.layers:
        assert layer.err_h == pytest.approx(layer.err_h_predicted, rel=0.25), layer.name
    assert report.err_h == pytest.approx(report.prediction["err_h"], rel=0.1)
    assert abs(math.log(report.prediction["kl"] / report.evaluation["kl"])) < math.log(1.5)
    ratio = report.evaluation["perplexity"] / report.evaluation["original_perplexity"]
    assert abs(math.log(report.prediction["perplexity_ratio"]) - math.log(ratio)) < 0.6 * math.log(ratio)


@pytest.mark.usefixtures("nothing_is_measured")
def test_a_limit_on_kl_gives_the_smallest_model_that_satisfies_it(measured: tuple[Plan, Path]) -> None:
    planned, work = measured
    sizes = []
    for limit in (0.01, 0.03, LIMIT):
        found = molae.plan(example(f"budget.max_kl={limit}"), measured=True, work_dir=work)
        assert found.prediction is not None
        assert 0.9 * limit < found.prediction.kl <= limit
        assert found.measured
        sizes.append(found.parameters)
        for choice in planned.choices:
            assert (choice.prediction.kl <= limit) == (choice.parameters >= found.parameters)
    assert sizes[0] > sizes[1] > sizes[2]
    with pytest.raises(RecipeError, match=r"max_kl: 1e-09` cannot be met: at a share of 0\.99 .* is predicted"):
        molae.plan(example("budget.max_kl=1e-09"), measured=True, work_dir=work)


def test_a_limit_on_kl_works_in_memory_and_for_equal_shares(tmp_path: Path) -> None:
    small = ("calibration.samples=16", "calibration.sequence_length=64", "output.dtype=bfloat16")
    recipe = example(f"budget.max_kl={LIMIT}", "budget.allocate=uniform", *small)
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    in_memory = molae.compress_(model, recipe)
    on_disk = molae.run(recipe, tmp_path / "out")
    assert [layer.shape for layer in in_memory.layers] == [layer.shape for layer in on_disk.layers]
    assert in_memory.prediction is not None
    assert in_memory.prediction["kl"] <= LIMIT
    assert in_memory.err_h == pytest.approx(in_memory.prediction["err_h"], rel=0.1)
    assert "as predicted before solving" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        ["calibration.batch_size=4", "ignore=['re:.*1.*']"],
        ["basis.profile=serving"],
        ["refit.sequential=true"],
        ["basis.down=dense", "heal.block_steps=2"],
    ],
)
def test_every_form_can_be_predicted(checkpoint: CheckpointMaker, tmp_path: Path, overrides: list[str]) -> None:
    recipe = recipe_for(checkpoint("deepseek_v3"), "budget.max_kl=100", *overrides)
    report = molae.run(recipe, tmp_path / "out", max_memory=0)
    assert report.prediction is not None
    assert 0 < report.prediction["kl"] < 100
    assert all(layer.err_h_predicted > 0 for layer in report.layers if layer.shape)


def test_killed_at_any_progress_it_ends_with_the_same_plan(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    recipe = recipe_for(checkpoint("deepseek_v3"))
    events: list[tuple[Any, ...]] = []
    calm = tmp_path / "calm"
    expected = molae.plan(recipe, measured=True, work_dir=calm, progress=lambda *event: events.append(event))
    assert {stage for stage, _, _ in events} == {"observe", "probe"}
    for moment in range(1, len(events) + 1):
        work = tmp_path / f"killed-{moment}"
        assert dies(lambda: molae.plan(recipe, measured=True, work_dir=work, progress=Countdown(moment)))  # noqa: B023
        again: list[tuple[Any, ...]] = []
        found = molae.plan(recipe, measured=True, work_dir=work, progress=lambda *event: again.append(event))  # noqa: B023
        assert found == expected
        assert hashes(work / "probe") == hashes(calm / "probe")
        assert again[0][1] >= max([0, *(done - 1 for stage, done, _ in events[:moment] if stage == "observe")])
    assert sorted(path.name for path in (calm / "probe").iterdir()) == [
        "end.safetensors",
        "layer-0001.safetensors",
        "layer-0002.safetensors",
    ]


def test_killed_before_any_write_it_ends_with_the_same_probes(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    """Killed between the windows of a layer, and between these and its errors."""
    recipe = recipe_for(checkpoint("qwen3_moe"))
    expected = molae.plan(recipe, measured=True, work_dir=tmp_path / "calm")
    for writes in range(1, 30, 3):
        work = tmp_path / f"killed-{writes}"
        if not dies(lambda: _plan_until_write(recipe, work, writes)):  # noqa: B023
            break
        assert molae.plan(recipe, measured=True, work_dir=work) == expected
        assert hashes(work / "probe") == hashes(tmp_path / "calm" / "probe")
    else:
        pytest.fail("there are more writes than were tried")


def _plan_until_write(recipe: Recipe, work: Path, writes: int) -> None:
    countdown, commit = Countdown(writes), compress.WorkDirectory.commit

    def counted(self: Any, stage: str, *args: Any) -> None:
        commit(self, stage, *args)
        if stage == probes.STAGE:
            countdown()

    compress.WorkDirectory.commit = counted  # type: ignore[method-assign]
    molae.plan(recipe, measured=True, work_dir=work)


def test_a_plain_run_does_not_pay_for_probes(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    source, work = checkpoint("qwen3_moe"), tmp_path / "work"
    plain = molae.run(recipe_for(source), tmp_path / "plain", work_dir=work)
    assert plain.prediction is None
    assert not (work / "probe").exists()
    molae.plan(recipe_for(source, "budget.keep=0.8"), measured=True, work_dir=work)
    told = molae.run(recipe_for(source), tmp_path / "told", work_dir=work)
    assert told.prediction is not None
    weights = [{n: h for n, h in same_every_time(tmp_path / f).items() if n != "README.md"} for f in ("plain", "told")]
    assert weights[0] == weights[1]
    with pytest.raises(ResumeError, match=r"observe: calibration\.weighting"):
        molae.plan(recipe_for(source, "calibration.weighting=none"), measured=True, work_dir=work)


def test_what_cannot_be_predicted_is_said(checkpoint: CheckpointMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint("qwen3_moe")
    with pytest.raises(RecipeError, match=r"max_kl: 0\.1` needs calibration text"):
        recipe_for(source, "budget.max_kl=0.1", calibrated=False)
    one = "calibration.samples=1"
    found = molae.plan(recipe_for(source, one), measured=True)
    assert found.prediction is None
    assert "one calibration window" in str(found)
    neighbours = recipe_for(source, "budget.rank=8", "basis.experts_per_input_group=2")
    assert "neighbouring experts" in str(molae.plan(neighbours, measured=True))
    data_free = molae.plan(recipe_for(source, calibrated=False), measured=True)
    assert data_free.measured
    assert data_free.unpredictable is not None
    monkeypatch.setattr(compress, "measure_spectra", lambda *_: pytest.fail("observed what cannot be predicted"))
    with pytest.raises(DataError, match=r"max_kl: 0\.1` cannot be met\. There is one calibration window"):
        molae.plan(recipe_for(source, "budget.max_kl=0.1", one), measured=True)
    with pytest.raises(DataError, match="one calibration window"):
        molae.compress_(tiny_model("mixtral"), recipe_for(source, "budget.max_kl=0.1", one), data=tiny_ids()[:1])
    with pytest.raises(ResumeError, match="inside the model"):
        molae.plan(recipe_for(source), measured=True, work_dir=source / "work")


def test_the_command_shows_it(checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(recipe_for(checkpoint("qwen3_moe"), "budget.max_kl=100").dump())

    def call(*args: str) -> Any:
        return CliRunner().invoke(main, ["plan", str(path), *args])

    unmeasured = call()
    assert "ranks shown are the largest" in unmeasured.output
    assert "--measured" in unmeasured.output
    shown = call("--measured", "--work-dir", str(tmp_path / "work"), "--quiet")
    assert shown.exit_code == 0, shown.output
    assert "predicted       err_h" in shown.output
    content = json.loads(call("--measured", "--work-dir", str(tmp_path / "work"), "--quiet", "--json").stdout)
    assert content["prediction"]["kl"] <= 100
    assert content["choices"][0]["prediction"]["layers"].keys() == content["prediction"]["layers"].keys()
    assert call("--work-dir", str(tmp_path / "work")).exit_code == 2


def test_lines_in_logarithms() -> None:
    points = [(4.0, 8.0), (1.0, 1.0)]
    assert [power_law(points, x) for x in (0.25, 1.0, 2.0, 4.0, 16.0)] == pytest.approx([0.125, 1.0, 2**1.5, 8.0, 64.0])
    assert power_law(points, 0.0) == 0.0
    assert power_law([(2.0, 3.0), (1.0, 0.0)], 4.0) == 6.0
    assert power_law([(2.0, 3.0), (2.0, 3.0)], 1.0) == 1.5
    assert power_law([(0.0, 0.0)], 1.0) == 0.0
    assert torch.tensor(power_law([*points, (16.0, 16.0)], 8.0)) == pytest.approx(2**3.5)
