"""Where the artifacts lie, and what vLLM reads from its environment, which has to be there before it is first imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB
    VLLM_CPU_OMP_THREADS_BIND="0|1",  # two workers on a machine of one socket cannot find their cores themselves
)


@pytest.fixture(scope="session")
def made() -> Path:
    """The folder of artifacts that `tests/serving/made.py` wrote."""
    folder = Path(__file__).parents[2] / "build/serving"
    assert (folder / "mixed/expected.json").exists(), "run `make test-serving`, which makes the artifacts first"
    return folder
