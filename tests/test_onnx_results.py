"""What the benchmarks of the ONNX export found, against the pages that state it and the goals that were set."""

from __future__ import annotations

from typing import Any

import pytest

import onnx_results

RESULTS = onnx_results.load()


def rows(part: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = RESULTS[part]["rows"]
    return found


def test_the_pages_show_the_results() -> None:
    for path, text in onnx_results.pages(RESULTS).items():
        assert path.read_text(encoding="utf-8") == text, "run `python benchmarks/onnx_results.py`"
    assert RESULTS.keys() == onnx_results.TABLES.keys()


@pytest.mark.parametrize("how", ["molae", "ort-moe"])
def test_compressed_models_decode_faster_than_the_original(how: str) -> None:
    found = {row["model"]: row["to_same_form"] for row in rows("decode") if row["experts"] == how}
    assert all(ratio > 1 for model, ratio in found.items() if model != "dense"), found
    assert len(found) > 1


def test_an_export_takes_little_more_than_the_weights() -> None:
    """What is beyond them grows with the number of layers, not with their size."""
    for row in rows("export"):
        assert row["peak"] < row["weights"] + 1.5e7 * row["layers"] + 2e8
        assert row["nodes"] < 100 * (row["layers"] + 1)


def test_the_operator_is_no_slower_than_others_of_the_same_form() -> None:
    found = [row["ratio"] for row in rows("operators") if row["other"] in ("ort-moe", "torch")]
    assert min(found) > 0.9
    assert sorted(found)[len(found) // 2] > 1


def test_the_library_is_small_and_loads_at_once() -> None:
    assert RESULTS["operators"]["library_bytes"] < 5_000_000
    assert RESULTS["operators"]["load_seconds"] < 0.05
