"""The command line: what goes where, how it ends, and that `--help` does not wait for torch."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

import molae_compress
from molae_compress.cli import main
from molae_compress.cli.progress import Bars, Clock, Lines, _bars, duration
from molae_compress.errors import CheckpointError, QualityGateError
from molae_compress.recipe import Recipe, bundled_recipes
from tests.conftest import CheckpointMaker
from tests.test_report import EVALUATION, made_report
from tests.tiny import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K

ROOT = Path(molae_compress.__file__).parents[1]
Fake = Callable[..., dict[str, Any]]


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """`fake("run", result)`: replaces a public function by one that returns or raises; the dict gets its arguments."""

    def replace(name: str, outcome: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            seen.update(kwargs, args=args)
            if callable(kwargs.get("progress")):
                kwargs["progress"]("solve", 1, 2)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setitem(vars(molae_compress), name, stand_in)
        return seen

    return replace


# Exit codes and errors


@pytest.mark.parametrize(
    ("outcome", "code", "says"),
    [
        (CheckpointError("The shard is gone.", why="It was moved.", remedy="Bring it back."), 1, "Bring it back."),
        (KeyError("x"), 1, "Unexpected KeyError: 'x'\nRun again with -v"),
        (KeyboardInterrupt(), 130, "goes on after the last finished layer"),
    ],
)
def test_an_error_ends_with_its_message_and_code(fake: Fake, outcome: BaseException, code: int, says: str) -> None:
    fake("run", outcome)
    result = call("apply", "quickstart", "--output", "out")
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("args", [("-v", "apply"), ("apply", "--verbose")])
def test_verbose_shows_where_an_error_comes_from(fake: Fake, args: tuple[str, ...]) -> None:
    fake("run", CheckpointError("The shard is gone."))
    result = call(*args, "quickstart", "--output", "out")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "stand_in" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("nonsense",),
        ("apply", "quickstart"),
        ("apply", "quickstart", "--output", "out", "--max-memory", "16"),
        ("apply", "quickstart", "--output", "out", "--device", "abacus"),
        ("evaluate", "nowhere"),
    ],
)
def test_wrong_usage_ends_with_2(args: tuple[str, ...]) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_a_failed_gate_ends_with_3_and_still_shows_the_result(fake: Fake, tmp_path: Path) -> None:
    made_report().save(tmp_path)
    fake("run", QualityGateError("The KL is 0.0625.", remedy="Raise the budget."))
    result = call("apply", "quickstart", "--output", tmp_path, "--json", "--quiet")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == made_report().to_dict()
    assert "Raise the budget." in result.stderr


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("passed", [True, False])
def test_verify_ends_with_1_if_a_check_fails(fake: Fake, passed: bool, as_json: bool) -> None:
    checks = (SimpleNamespace(name="hashes", passed=passed, detail="2 files"),)
    found = SimpleNamespace(checks=checks, passed=passed, to_dict=lambda: {"passed": passed})
    fake("verify", found)
    result = call("verify", "out", *(["--json"] if as_json else []))
    assert result.exit_code == (0 if passed else 1)
    if as_json:
        assert json.loads(result.stdout) == {"passed": passed}
    else:
        assert result.stdout.split()[:2] == ["ok" if passed else "FAILED", "hashes"]
    assert ("'out' failed: hashes." in result.stderr) is not passed


# What is passed on, and what is written where


def test_apply_hands_over_where_and_how(fake: Fake, tmp_path: Path) -> None:
    seen = fake("run", made_report())
    flags = ["--max-memory", "16GB", "--work-dir", tmp_path, "--fresh", "--trust-remote-code", "--device", "cpu"]
    result = call("apply", "quickstart", "--set", "budget.keep=0.5", "--model", "1e5", "--output", "out", *flags)
    recipe, output = seen.pop("args")
    assert (recipe.budget.keep, recipe.model, output) == (0.5, "1e5", Path("out"))
    assert seen.pop("progress")
    assert seen == {
        "max_memory": 16 * 10**9,
        "work_dir": tmp_path,
        "fresh": True,
        "trust_remote_code": True,
        "device": "cpu",
    }
    assert result.exit_code == 0
    assert "solve 1/2" in result.stderr
    assert "Warning: Look out." in result.stderr
    assert "perplexity" in result.stdout
    assert "solve" not in result.stdout


def test_quiet_and_json_leave_only_json(fake: Fake) -> None:
    fake("run", made_report())
    result = call("apply", "quickstart", "--output", "out", "--quiet", "--json")
    assert json.loads(result.stdout) == made_report().to_dict()
    assert result.stderr == ""


def test_evaluate_takes_the_text_of_the_recipe_unless_told(fake: Fake, tmp_path: Path) -> None:
    made_report().save(tmp_path)
    seen = fake("evaluate", molae_compress.Evaluation(**EVALUATION))
    assert call("evaluate", tmp_path, "--samples", "3").exit_code == 0
    assert seen["data"] == ["python-docs:heldout"]
    assert (seen["samples"], seen["sequence_length"], seen["against"]) == (3, 256, None)

    seen.clear()
    result = call("evaluate", tmp_path, "--data", "a.txt", "--data", "b.txt", "--against", "base", "--json")
    assert seen["data"] == ("a.txt", "b.txt")
    assert "sequence_length" not in seen, "the sizes of the recipe belong to its own text"
    assert seen["against"] == "base"
    assert json.loads(result.stdout) == EVALUATION


def test_evaluate_shows_only_what_was_measured(fake: Fake) -> None:
    fake("evaluate", molae_compress.Evaluation(tokens=1000, perplexity=12.5))
    assert call("evaluate", "out", "--data", "a.txt").stdout.split() == ["tokens", "1,000", "perplexity", "12.500"]


# Recipes


def test_every_bundled_recipe_is_listed_and_makes_a_new_one(tmp_path: Path) -> None:
    listed = [line.split()[0] for line in call("recipe", "list").stdout.splitlines()]
    assert listed == list(bundled_recipes())
    for name in listed:
        assert call("recipe", "new", name, "--output", tmp_path / name).exit_code == 0
        assert Recipe.load(tmp_path / name) == Recipe.load(name)
        assert yaml.safe_load(call("recipe", "new", name).stdout)["molae"] == 1


def test_a_new_recipe_overwrites_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "my.yaml"
    mine.write_text("precious")
    result = call("recipe", "new", "--output", mine)
    assert result.exit_code == 1
    assert "is there already" in result.stderr
    assert mine.read_text() == "precious"


def test_an_unknown_recipe_is_guessed_at() -> None:
    result = call("recipe", "new", "mixtrall")
    assert result.exit_code == 1
    assert "Did you mean 'mixtral'?" in result.stderr


def test_the_schema_is_json() -> None:
    assert json.loads(call("recipe", "schema").stdout) == Recipe.schema()


# Progress


@pytest.fixture
def clock() -> Clock:
    times = iter((0.0, 60.0, 60.1, 60.2, 180.0, 200.0, 200.1, 200.2, 300.0))
    return lambda: next(times)


def test_lines_tell_the_time_left_and_never_repeat(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines(clock)
    # Resumed with one of four done: the time left follows from the two that this run did.
    for done in (1, 2, 2, 3, 4):
        lines("observe", done, 4)
    for done in (1, 2, 3, 3):
        lines("write", done, 3)
    assert capsys.readouterr().err.splitlines() == [
        "observe 1/4",
        "observe 2/4, eta 2m00s",
        "observe 4/4",
        "write 1/3",
        "write 3/3",
    ]


def test_bars_show_each_stage(clock: Clock) -> None:
    screen = io.StringIO()
    with _bars() as rich_bars:
        rich_bars.console.file, rich_bars.console.width = screen, 80
        bars = Bars(rich_bars, clock)
        for done in (1, 2):
            bars("observe", done, 4)
        bars("solve", 1, 3)
        rich_bars.console.print(rich_bars.get_renderable())
    shown = screen.getvalue()
    assert "2/4" in shown
    assert "eta 2m00s" in shown
    assert "solve" in shown


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.4, 80, 7500)] == ["0s", "59s", "1m20s", "2h05m"]


# The whole


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    # In a bare package of the same name, since `import molae_compress` registers the format with transformers.
    program = f"""
import sys, types
package = types.ModuleType("molae_compress")
package.__path__ = [{str(ROOT / "molae_compress")!r}]
sys.modules["molae_compress"] = package
from molae_compress.cli import main
for verb in main.commands:
    main([verb, "--help"], standalone_mode=False)
main(["recipe", "list"], standalone_mode=False)
heavy = {{"torch", "transformers", "rich", "huggingface_hub"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_verb_has_an_example_that_uses_its_options() -> None:
    commands: dict[str, click.Command] = {}
    for name, command in main.commands.items():
        inside = command.commands if isinstance(command, click.Group) else {}
        commands |= {f"{name} {child}": one for child, one in inside.items()} or {name: command}
    for name, command in commands.items():
        example = command.example.split()  # type: ignore[attr-defined]
        assert example[0] == "molae-compress"
        assert " ".join(example[1:]).startswith(name)
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in example if word.startswith("--")} <= known


def test_version() -> None:
    assert call("--version").stdout == f"molae-compress {molae_compress.__version__}\n"


def test_inspect_finds_the_experts_and_leaves_nothing_out(checkpoint: CheckpointMaker, family: str) -> None:
    folder = checkpoint(family)
    found = json.loads(call("inspect", folder, "--json").stdout)
    for experts in found["experts"]:
        sizes = [experts[key] for key in ("num_experts", "hidden", "intermediate", "top_k")]
        assert sizes == [EXPERTS, HIDDEN, INTERMEDIATE, TOP_K]
        assert experts["class"].endswith("Experts")
    left = sum(part["parameters"] for part in found["left_alone"])
    assert found["expert_parameters"] + left == found["parameters"]
    assert found["parameters"] * 4 == found["bytes"], "float32, nothing unknown: every byte is accounted for"
    assert 0 < found["expert_bytes"] < found["bytes"]
    names = [part["name"] for part in found["left_alone"]]
    assert not any("experts" in name and "shared" not in name for name in names)
    assert any("embed" in name for name in names)

    table = call("inspect", folder)
    assert f"x{len(found['experts'])}" in table.stdout
    assert f"{found['expert_parameters']:,} of {found['parameters']:,}" in table.stdout


def test_inspect_refuses_what_is_no_model(tmp_path: Path) -> None:
    result = call("inspect", tmp_path)
    assert result.exit_code == 1
    assert "config.json" in result.stderr


# The whole, on a tiny model


@pytest.fixture(scope="module")
def folder(checkpoint: CheckpointMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its text, and the result of `apply`."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    text = {"data": str(place / "text.txt"), "samples": 4, "sequence_length": 32}
    content = {"molae": 1, "model": str(checkpoint("qwen3_moe")), "calibration": text, "evaluate": text}
    (place / "my.yaml").write_text(yaml.safe_dump(content))
    result = call("apply", place / "my.yaml", "--output", place / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((place / "out" / "molae_report.json").read_text())
    assert "solve 2/2" in result.stderr
    return place


def test_the_plan_says_what_apply_writes(folder: Path) -> None:
    result = call("plan", folder / "my.yaml", "--set", "budget.rank=16", "--json")
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    made = call("apply", folder / "my.yaml", "--set", "budget.rank=16", "--output", folder / "rank", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["artifact"]["bytes"] == planned["artifact_bytes"]
    assert planned["warnings"] == []
    table = call("plan", folder / "my.yaml").stdout
    assert "routed experts" in table
    assert "calibration will move them" in table
    assert "the weights will move them" in call("plan", folder / "my.yaml", "--set", "calibration=null").stdout


def test_a_result_that_is_already_there_is_not_said_to_be_written(folder: Path) -> None:
    result = call("apply", folder / "my.yaml", "--output", folder / "out")
    assert result.stdout.endswith(f"\n{folder / 'out'} is already there\n")


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "molae_compress", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: molae-compress")


def test_what_apply_wrote_is_verified_evaluated_and_expanded(folder: Path) -> None:
    checked = call("verify", folder / "out")
    assert checked.exit_code == 0, checked.output
    assert {line.split()[0] for line in checked.stdout.splitlines()} == {"ok"}

    original = json.loads((folder / "out" / "molae_report.json").read_text())["model"]
    found = call("evaluate", folder / "out", "--against", original, "--json", "-q")
    assert json.loads(found.stdout) == json.loads((folder / "out" / "molae_report.json").read_text())["evaluation"]

    assert call("expand", folder / "out", folder / "dense", "-q").stdout == f"Wrote {folder / 'dense'}\n"
    assert call("inspect", folder / "dense").exit_code == 0


def test_verify_finds_a_changed_byte(folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder / "out", tmp_path / "damaged"))
    (weights,) = damaged.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = call("verify", damaged, "--json")
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["passed"]


def test_a_gate_that_fails_leaves_a_complete_result(folder: Path) -> None:
    gate = ["--set", "gate.max_kl=1e-9"]
    result = call("apply", folder / "my.yaml", *gate, "--output", folder / "gated", "-q")
    assert result.exit_code == 3, result.output
    assert "KL divergence" in result.stdout
    assert "gate.max_kl" in result.stderr
    assert call("verify", folder / "gated").exit_code == 0


def test_a_mistake_in_the_recipe_is_one_message(folder: Path) -> None:
    result = call("apply", folder / "my.yaml", "--set", "budget.keeep=0.5", "--output", folder / "never")
    assert result.exit_code == 1
    assert "Did you mean `budget.keep`?" in result.stderr
    assert not (folder / "never").exists()


def test_the_card_of_a_result_tells_its_own_figures(folder: Path) -> None:
    report = molae_compress.Report.load(folder / "out")
    card = (folder / "out" / "README.md").read_text()
    assert report.evaluation is not None
    assert f"{report.evaluation['kl']:.4g}" in card
    for layer in report.layers:
        assert f"`{layer.name}`" in card
        assert sum(layer.tokens_per_expert) > 0
