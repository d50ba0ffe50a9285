"""The benchmark of whole models: what the page on serving shows of its results, and a trial at tiny sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import inference
from study.marked import replaced


def test_the_page_on_serving_shows_the_results() -> None:
    results = json.loads(inference.RESULTS.read_text(encoding="utf-8"))
    page = inference.PAGE.read_text(encoding="utf-8")
    assert replaced(page, "inference", "inference.py", inference.table(results)) == page, (
        "run `python benchmarks/inference.py --page`"
    )
    assert '"/' not in json.dumps(results)


def test_every_type_is_measured_in_every_form_with_every_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rates of this machine are made up: to measure them takes a gigabyte."""
    monkeypatch.setattr(inference, "rates", lambda dtype: (1e9, 1e10))
    monkeypatch.setattr(inference, "STEPS", 1)
    sizes = "--layers 1 --experts 4 --top-k 2 --hidden 128 --intermediate 32 --rounds 1"
    path = tmp_path / "found.json"
    words = [*sizes.split(), "--dtypes", "float32", "bfloat16", "--no-vllm", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["inference.py", *words, "--results", str(path)])
    before = inference.PAGE.read_text(encoding="utf-8")
    inference.main()
    assert inference.PAGE.read_text(encoding="utf-8") == before
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    cases = [inference.title(case) for case in inference.CASES]
    assert list(results["types"]) == results["asked"]["dtypes"] == ["float32", "bfloat16"]
    for found in results["types"].values():
        rows = found["engines"]["transformers"]
        assert list(rows) == list(inference.MODELS)
        for row in (rows[name][case] for name in rows for case in cases):
            assert {"eager", "grouped_mm", "molae"} <= row["tried_ms"].keys()
            assert row["tried_ms"][row["backend"]] == min(row["tried_ms"].values())
            assert row["tokens_per_second"] > 0
        assert all(row["load_seconds"] > 0 for row in rows.values())
        assert [rows["dense"][case]["ratio"] for case in cases] == [1.0] * len(cases)
    speed, loading = inference.table(results).split("\n\n")
    assert speed.count("| transformers | ") == 2 * len(cases) * len(inference.MODELS)
    assert loading.count("| transformers | ") == 2 * len(inference.MODELS)
    assert "| transformers | bfloat16 | prefill 512 | layer form (`" in speed
    assert speed in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["found.json"]
    halves = [results["types"][dtype]["bounds_ms"]["dense"]["decode 1"] for dtype in results["types"]]
    assert halves[1] == pytest.approx(halves[0] / 2)


def test_a_bound_is_of_what_is_read_and_computed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "PROMPT", 10)
    asked = type("Asked", (), {"top_k": 2, "experts": 4})
    about = {"experts": 1000, "shared": 200, "rest": 50}
    read = (250 + 800 * 0.5) * 4  # one token hits half of the experts
    assert inference.bound(about, ("decode", 1), asked, 4, (1e3, 1e12)) == pytest.approx(read / 1e3)
    computed = 2 * 10 * (250 + 800 * 0.5)
    assert inference.bound(about, ("prefill", 1), asked, 4, (1e12, 1e3)) == pytest.approx(computed / 1e3)
