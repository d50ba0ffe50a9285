"""Fixtures shared by all tests: saved tiny checkpoints, written once per session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny import FAMILIES, save_checkpoint

CheckpointMaker = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ort-include", help="folder with the onnxruntime_c_api.h that the operators' own table is checked against"
    )
    parser.addoption("--moe-model", help="folder of a further Mixture-of-Experts model that exports are tried on")


@pytest.fixture
def ort_include(request: pytest.FixtureRequest) -> Path | None:
    """The folder of ONNX Runtime's C header, if one was given."""
    folder = request.config.getoption("--ort-include")
    return Path(folder) if folder else None


@pytest.fixture
def moe_model(request: pytest.FixtureRequest) -> Path | None:
    """The folder of a further model, if one was given."""
    folder = request.config.getoption("--moe-model")
    return Path(folder).resolve() if folder else None


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """`checkpoint(family, dtype=..., shards=...)`: a folder to read, never to write into."""
    made: dict[tuple[str, torch.dtype, bool], Path] = {}

    def make(family: str, *, dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
        key = (family, dtype, shards)
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp(family), family, dtype=dtype, shards=shards)
        return made[key]

    return make


@pytest.fixture(scope="session")
def sharded_checkpoint(checkpoint: CheckpointMaker) -> CheckpointMaker:
    """`sharded_checkpoint(family)`: the same in two or more shards with an index."""
    return lambda family, **options: checkpoint(family, shards=True, **options)


@pytest.fixture
def own_checkpoint(checkpoint: CheckpointMaker, tmp_path: Path) -> CheckpointMaker:
    """`own_checkpoint(family, ...)`: a copy for a test that damages it."""

    def make(family: str, **options: object) -> Path:
        return Path(shutil.copytree(checkpoint(family, **options), tmp_path / f"{family}-copy"))

    return make


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family in turn."""
    return str(request.param)
