"""The quality benchmark: results against what is shown of them, which cells are measured, and a trial of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from molae_compress import Recipe
from study import cells as study_cells
from study import plots, tables
from study.cells import STUDIES, Cell, Protocol, Study, cells, code_fingerprint, differences, known_rows, load, save
from study.marked import replaced
from study.methods import ABLATIONS, METHODS, OURS, TRAINED, changed
from study.results import Results, shown, significant
from study.texts import read

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = STUDIES["pocket-moe"]


def script(name: str) -> ModuleType:
    """A script of `benchmarks`, imported without running it."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results_of(name: str) -> Results:
    found = Results.load(name)
    assert found is not None
    return found


measured = [name for name in STUDIES if Results.load(name) is not None]
each_study = pytest.mark.parametrize("name", measured)


def made_row(cell: Cell, kl: float, texts: tuple[str, ...] = EXAMPLE.texts) -> dict[str, Any]:
    """A row as it would be measured."""
    figures = {"kl": kl, "perplexity": 20 + kl, "original_perplexity": 20.0, "top1": 0.9, "err_h": kl / 2}
    return {
        **vars(cell),
        "recipes": list(cell.recipes),
        "parameters": 10,
        "share": cell.keep - 0.001,
        "fit_seconds": 3.0,
        "texts": {name: figures for name in texts},
        "layers": [kl / 8] * 4,
        **({"flops": 1000, "dense_flops": 2000, "active_bytes": 900} if cell.recipes else {}),
    }


def made(study: Study, folder: Path, protocol: Protocol) -> Results:
    """Results of a whole study, made up: KL falls with what is kept and moves with the seed."""
    head = study_cells.identity(study, protocol, ROOT / "examples" / "pocket-moe", {"python-docs:heldout": "0" * 64})
    rows = [
        made_row(cell, (1.1 - cell.keep) * (1 + 0.1 * cell.seed) / 10, study.texts)
        for cell in cells(dataclasses.replace(study, model=study.model or "some-model"), protocol)
    ]
    save(study_cells.file_of(study, folder), {**head, "processes": 1}, rows)
    found = Results.load(study.name, folder)
    assert found is not None
    return found


def test_the_readme_and_its_picture_show_the_results() -> None:
    plot, results = script("plot"), results_of("pocket-moe")
    assert plot.table(results) in plot.README.read_text(encoding="utf-8"), "run `python benchmarks/plot.py`"
    assert plot.mark(results) in plot.PICTURE.read_text(encoding="utf-8"), "run `python benchmarks/plot.py`"


def test_the_page_and_its_pictures_show_the_results() -> None:
    page = script("page")
    assert page.page() == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), "run `python benchmarks/page.py`"
    for name, (_, mark) in page.pictures().items():
        assert mark in (ROOT / "docs" / "assets" / name).read_text(encoding="utf-8"), "run `python benchmarks/page.py`"


@each_study
def test_results_name_no_path_and_keep_to_the_budget(name: str) -> None:
    text = (study_cells.RESULTS / f"quality-{name}.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert '"/' not in text
    assert content["rows"]
    assert len(known_rows(content)) == len(content["rows"]), "rows of methods that are gone, or have another recipe"
    assert all("impossible" in row or row["share"] <= row["keep"] for row in content["rows"])


@each_study
def test_results_are_of_one_run_and_whole_where_anybody_can_repeat_it(name: str) -> None:
    results = results_of(name)
    found = [Cell.from_row(row) for row in results.content["rows"]]
    study = dataclasses.replace(STUDIES[name], model=results.content["model"])
    missing = set(cells(study, Protocol())) - set(found)
    assert set(found) <= set(cells(study, Protocol())), "run `make bench-quality`"
    assert study.needs_data or not missing, "run `make bench-quality`"
    assert results.content["code_sha256"]


@each_study
def test_kl_is_what_how_it_works_says_of_err_h(name: str) -> None:
    results = results_of(name)
    for row in results.content["rows"]:
        if name == "pocket-moe" and row["method"] in OURS and "texts" in row:
            ratio = results.values([row], "kl")[0] / results.values([row], "err_h")[0]
            assert 1 <= ratio <= 3.5, row


@each_study
def test_published_orders_hold(name: str) -> None:
    """Where their authors and third parties agree on an order, ours of their methods have it."""
    results = results_of(name)
    for better, worse in (("slbf", "mobe-even"), ("mobe-even", "paper"), ("pifa", "svd-llm"), ("svd-llm", "d2-moe")):
        for keep in results.keeps:
            first, second = results.mean(results.of(better, keep), "kl"), results.mean(results.of(worse, keep), "kl")
            assert first is None or second is None or first < second, (better, worse, keep)


def test_every_method_has_a_recipe_that_the_package_takes() -> None:
    for name, method in METHODS.items():
        for recipe in method.recipes:
            loaded = Recipe.load({"molae": 1, "calibration": {"samples": 1}}, overrides=recipe.split())
            written = loaded.calibration is not None and loaded.calibration.self_generated == 256
            assert (loaded.calibration is None or written) == (not method.reads_text), name
            assert (
                recipe == ""
                or loaded.fingerprint() != Recipe.load({"molae": 1, "calibration": {"samples": 1}}).fingerprint()
            )
    assert METHODS.keys() >= {changed(change) for change in ABLATIONS}


def test_a_cell_is_measured_once_though_several_tables_show_it() -> None:
    found = cells(EXAMPLE, Protocol())
    assert len(set(found)) == len(found)
    assert [cell.seed for cell in found if (cell.method, cell.keep) == ("data-free", 0.5)] == [0]
    assert {cell.seed for cell in found if cell.method == "slbf"} == {0, 1, 2}
    assert {cell.calibration for cell in found if cell.method == "quality"} == set(EXAMPLE.calibrations)
    assert {cell.samples for cell in found if cell.method == "quality"} == {8, 256}
    assert {cell.steps for cell in found if cell.method == "slbf"} == {600, 8000}


def test_text_of_other_kinds_is_there_and_enough() -> None:
    """A token is less than eight characters: 16,384 of them for evaluation, and 65,536 for calibration."""
    texts = {name: read(name) for name in ("licences", "graph-theory:calibration", "graph-theory:heldout")}
    sizes = {name: sum(map(len, found)) for name, found in texts.items()}
    assert sizes["licences"] > 50_000
    assert sizes["graph-theory:heldout"] > 80_000
    assert sizes["graph-theory:calibration"] > 300_000
    assert not set(texts["graph-theory:calibration"]) & set(texts["graph-theory:heldout"])


def test_the_fingerprint_of_the_code_follows_the_code_and_not_its_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_cells, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "study").mkdir(parents=True)
    for name in ("measure", "texts"):
        (tmp_path / "benchmarks" / "study" / f"{name}.py").write_text("")
    (tmp_path / "molae_compress" / "cli").mkdir(parents=True)
    (tmp_path / "molae_compress" / "cli" / "verbs.py").write_text("x = 1\n")
    file = tmp_path / "molae_compress" / "solve.py"
    file.write_text("def f():\n    return 1\n")
    first = code_fingerprint()
    file.write_text('"""Text."""\n\n\ndef f():\n    """More."""\n    return 1  # one\n')
    (tmp_path / "molae_compress" / "cli" / "verbs.py").write_text("x = 2\n")
    assert code_fingerprint() == first
    file.write_text("def f():\n    return 2\n")
    assert code_fingerprint() != first


def test_differences_are_named() -> None:
    old = {"code": "a", "versions": {"torch": "2", "python": "3"}}
    assert differences(old, old) == []
    assert differences(old, {"code": "b", "versions": {"torch": "3", "python": "3"}}) == ["code", "versions.torch"]


def test_the_whole_page_is_made_from_results_alone(tmp_path: Path) -> None:
    protocol = Protocol(seeds=(0, 1), keeps=(0.6, 0.5))
    found = {name: made(study, tmp_path, protocol) for name, study in STUDIES.items()}
    text = script("page").page(tmp_path)
    assert "impossible" not in text
    for results in found.values():
        shown_tables = [tables.robust(results)]
        if "main" in results.study.tables:
            shown_tables += [tables.main(results, 0.6), tables.sharing(results), tables.parts(results)]
            shown_tables.append(tables.inference(results, 2))
        if "trained" in results.study.tables:
            shown_tables.append(tables.trained(results))
        assert all(table and table.strip() in text for table in shown_tables)
        assert all(
            len({line.count(" | ") for line in table.splitlines() if "--" not in line}) == 1 for table in shown_tables
        )
    example = found["pocket-moe"]
    assert shown(example.values(example.of("quality", 0.5), "kl"), 1000) == "63.0 ± 4.2"
    assert "| `basis.metric: input` | errors measured right after the first projection | 50.0 | 1.00 | 1.00 |" in text
    assert "| the original | 2 | 2 | 100% | 2 | 2 | 100% |" in text


def test_fit_times_at_a_width_stand_on_the_page(tmp_path: Path) -> None:
    row = script("fit_time").measured(64, samples=4, sequence_length=32)
    assert {method: row[method]["steps"] for method in TRAINED} == TRAINED
    assert all(set(row[method]) == {"steps", "step_seconds", "ratio"} for method in TRAINED)
    head = {"keep": 0.5, "tokens": 128, "rows": [{**row, "fit_seconds": 12.3, "slbf": {**row["slbf"], "ratio": 41.5}}]}
    (tmp_path / "fit-time.json").write_text(json.dumps(head))
    text = script("page").page(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| 64, 24 |"))
    assert "| 12.3 |" in line
    assert line.endswith("| 42 |")


def test_pictures_follow_their_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = made(EXAMPLE, tmp_path, Protocol(seeds=(0, 1), keeps=(0.6, 0.5)))
    plots.draw_quality(results, tmp_path / "a.svg", ("quality", "slbf"), 4.0)
    plots.draw_quality(results, tmp_path / "b.svg", ("quality", "slbf"), 4.0)
    plots.draw_layers(results, tmp_path / "layers.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    mark = plots.fingerprint(plots.quality_data(results, ("quality", "slbf")))
    assert mark in (tmp_path / "a.svg").read_text(encoding="utf-8")
    results.content["rows"][0]["texts"]["python-docs:heldout"]["kl"] += 1
    assert plots.fingerprint(plots.quality_data(results, tuple(METHODS))) != mark


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(8.923, 3, "8.92"), (0.0123456, 3, "0.0123"), (2011.9, 3, "2012"), (9.996, 3, "10.0"), (0, 3, "0"), (0.4, 2, "0.40")],
)
def test_numbers_are_shown_with_their_significant_digits(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text


def run_quality(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    sizes = "--samples 2 --sequence-length 16 --evaluation-samples 1 --steps 2 --processes 1 --keep 0.5 --seeds 0"
    words = [*sizes.split(), "--results", str(folder), "--studies", "pocket-moe", "--tables", "main", *more]
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "quality.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_refuses_to_mix(tmp_path: Path) -> None:
    done = run_quality(tmp_path, "--methods", "data-free,channels")
    assert "0 cells are known, 2 to be measured" in done.stdout, done.stderr
    path = tmp_path / "quality-pocket-moe.json"
    before = load(path)
    assert before is not None
    assert all(set(row["texts"]) == set(EXAMPLE.texts) and len(row["layers"]) == 4 for row in before["rows"])
    done = run_quality(tmp_path, "--methods", "data-free,channels,reap")
    assert "2 cells are known, 1 to be measured" in done.stdout, done.stderr
    after = load(path)
    assert after is not None
    assert [row for row in after["rows"] if row["method"] != "reap"] == before["rows"]
    path.write_text(json.dumps({**after, "code_sha256": "of other code"}), encoding="utf-8")
    done = run_quality(tmp_path, "--methods", "data-free")
    assert done.returncode != 0
    assert "code_sha256" in done.stderr
    done = run_quality(tmp_path, "--methods", "data-free,channels,reap", "--package")
    assert "2 cells are known, 1 to be measured" in done.stdout, done.stderr
    mixed = load(path)
    assert mixed is not None
    assert {row["method"]: row.get("code_sha256") for row in mixed["rows"]} == {
        "data-free": None,
        "channels": "of other code",
        "reap": "of other code",
    }
    assert mixed["code_sha256"] == before["code_sha256"]
    assert run_quality(tmp_path, "--methods", "data-free", "--fresh").returncode == 0
    assert [row["method"] for row in (load(path) or {})["rows"]] == ["data-free"]


@pytest.mark.slow
def test_the_results_are_those_of_the_code() -> None:
    from study.measure import Bench, text_fingerprints

    results = results_of("pocket-moe")
    now = text_fingerprints(EXAMPLE, None)
    if any(now[name] != digest for name, digest in results.content["text_sha256"].items()):
        pytest.skip("this Python or these libraries carry other texts than those measured on")
    bench = Bench(EXAMPLE, Protocol())
    for method in ("paper", "quality", "channels"):
        [row, *_] = results.of(method, 0.6)
        found = bench.row(Cell.from_row(row))
        kl = results.values([found], "kl")[0]
        assert kl == pytest.approx(results.values([row], "kl")[0], rel=0.05), "run `make bench-quality`"


def test_the_page_on_fine_tuning_shows_the_results() -> None:
    finetune = script("finetune")
    page, found = finetune.PAGE.read_text(encoding="utf-8"), finetune.section(finetune.studies_in(finetune.RESULTS))
    assert replaced(page, "finetune", "finetune.py", found) == page, "run `python benchmarks/finetune.py --page`"


def test_a_table_goes_between_its_marks_and_nowhere_else() -> None:
    marks = "<!-- a: written by benchmarks/a.py -->\n", "<!-- end of a -->\n"
    page = replaced(f"before\n{marks[0]}old\n{marks[1]}after\n", "a", "a.py", "| new |\n")
    assert page == f"before\n{marks[0]}\n| new |\n\n{marks[1]}after\n"
    assert replaced(page, "a", "a.py", "| new |\n") == page
    for mark in marks:
        with pytest.raises(ValueError, match="lost the marks of the table a"):
            replaced(page.replace(mark, ""), "a", "a.py", "| new |\n")


def test_what_is_shown_of_a_fine_tuning_is_what_was_measured() -> None:
    finetune = script("finetune")
    before = {"perplexity": 24.0, "original_perplexity": 20.0, "kl": 0.2}
    after = {"perplexity": 21.0, "kl": 0.05, "recovered": 0.75, "kl_recovered": 0.75}
    row = {"way": "router", "tokens": 1000, "seconds": 3.2, "trained_parameters": 64, "texts": {"some:text": after}}
    asked = {"train": ["other:text"], "sequence_length": 16, "batch_size": 2, "epochs": 1}
    head = {"study": "pocket-moe", "parameters": 99, "asked": asked, "threads": 2}
    found = {**head, "before": {"some:text": before}, "rows": [row]}
    assert "| routers | 1,000 | 3 | 64 | 21.00 (75%) | 50 (75%) |" in finetune.section([found])
    assert "memory" not in finetune.section([found])
    assert "1.20 times the memory" in finetune.section([found | {"memory": {"peak": 12e6, "accounted": 10e6}}])


@pytest.mark.slow
def test_the_benchmark_of_fine_tuning_runs(tmp_path: Path) -> None:
    texts = [f"{name}.txt" for name in ("train", "other")]
    for number, name in enumerate(texts):
        (tmp_path / name).write_text("".join(f"{i * 7 % 31} apples {number} fell from tree {i % 13}.\n" for i in range(400)))
    sizes = ("--samples", "8", "--calibration-samples", "8", "--evaluation-samples", "4", "--sequence-length", "32")
    model = ("--data", tmp_path, "--model", ROOT / "examples" / "pocket-moe")
    command = [
        sys.executable,
        ROOT / "benchmarks" / "finetune.py",
        *model,
        "--train",
        texts[0],
        "--evaluate",
        texts[1],
        *sizes,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [*command, "--results", tmp_path, "--rows", "router", "text"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert "| routers |" in done.stdout, done.stderr
    content = json.loads((tmp_path / "finetune-development.json").read_text())
    assert [row["way"] for row in content["rows"]] == ["router", "text"]
    assert str(tmp_path) not in json.dumps(content)
