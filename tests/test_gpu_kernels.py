"""The GPU kernels, without a GPU: interpreted, launched at a fake driver, compiled ahead of time and taken apart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from molae_compress.adapters import find_experts
from molae_compress.errors import MolaeError
from molae_compress.kernels import gpu_build, gpu_experts, gpu_tiles
from molae_compress.kernels.activation import Activation, find_activation
from molae_compress.kernels.gpu_tiles import ACTIVATIONS
from molae_compress.modeling import LatentExperts
from molae_compress.tensors import LatentShape
from tests.test_modeling import attach_all_, logits, some_routing
from tests.tiny import EXPERTS, tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What Triton compiles is kept for the tests of this file, and nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("name", ["interpreted", "launched", "operators"])
def test_in_a_process_of_its_own(name: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/gpu/{name}.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


KNOWN = [Activation(kind) for kind in ACTIVATIONS] + [
    Activation("silu", 1.702, 7.0, 1.0),
    Activation("silu", 1.0, 10.0),
    Activation("gelu_tanh", 1.0, 0.5),
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("wanted", KNOWN, ids=str)
def test_gated_activations_are_recognised(wanted: Activation, interleaved: bool) -> None:
    def activate(h_NJ: Tensor) -> Tensor:
        return wanted(h_NJ[..., ::2], h_NJ[..., 1::2]) if interleaved else wanted(*h_NJ.chunk(2, dim=-1))

    assert find_activation(activate, gated=True, interleaved=interleaved) == wanted


@pytest.mark.parametrize("wanted", [Activation(kind) for kind in ACTIVATIONS], ids=str)
def test_activations_without_a_gate_are_recognised(wanted: Activation) -> None:
    assert find_activation(wanted, gated=False, interleaved=False) == wanted


@pytest.mark.parametrize("activate", [torch.tanh, torch.sigmoid, nn.Softplus(), torch.zeros_like])
def test_other_activations_are_not(activate: nn.Module) -> None:
    assert find_activation(activate, gated=False, interleaved=False) is None


def test_a_swapped_gate_is_not_recognised() -> None:
    def activate(h_NJ: Tensor) -> Tensor:
        up_NI, gate_NI = h_NJ.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate_NI) * up_NI

    assert find_activation(activate, gated=True, interleaved=False) is None


def test_transformers_knows_the_implementation() -> None:
    assert ALL_EXPERTS_FUNCTIONS["molae"] is gpu_experts.experts_forward


def test_the_kernels_are_asked_where_they_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent and stock experts both reach them, and gradients keep away from them."""
    shape = LatentShape("grouped", 12, 20, 2, 1)
    latent_model, stock_model = attach_all_(tiny_model("qwen3_moe"), shape), tiny_model("qwen3_moe")
    asked: list[str] = []
    monkeypatch.setattr(gpu_experts, "can_run", lambda *_: True)
    monkeypatch.setattr(gpu_experts, "bank_problem", lambda *_: asked.append("latent"))
    monkeypatch.setattr(gpu_experts, "stock_experts", lambda *_: asked.append("stock"))
    for model in (latent_model, stock_model):
        model.set_experts_implementation("molae")
        logits(model)
    assert asked == ["latent"] * 2 + ["stock"] * 2


def test_what_the_kernels_cannot_take_is_left_to_others() -> None:
    model = attach_all_(tiny_model("qwen3_moe"), LatentShape("grouped", 12, 20, 2, 1))
    latent = model.get_submodule(find_experts(tiny_model("qwen3_moe"))[-1].name)
    assert isinstance(latent, LatentExperts)
    x_TH, _, weight_TK = some_routing()
    assert not gpu_experts.can_run(x_TH, latent.parameters(), EXPERTS, weight_TK)  # on a CPU


@pytest.mark.parametrize(
    ("rows", "groups", "tile"),
    [(1, 128, "small"), (64, 128, "small"), (16 * 128, 128, "small"), (24 * 128, 128, "medium"), (4096, 1, "large")],
)
def test_tiles_follow_the_rows_of_a_group(rows: int, groups: int, tile: str) -> None:
    assert gpu_tiles.tile_for(rows, groups).name == tile


def test_every_variant_has_a_name_of_its_own() -> None:
    names = [variant.name for variant in gpu_build.variants()]
    assert len(names) == len(set(names))


def test_a_kernel_compiles_without_a_gpu() -> None:
    pytest.importorskip("triton")
    variant = next(variant for variant in gpu_build.variants() if variant.name == "tiles")
    for architecture in gpu_build.ARCHITECTURES:
        image, ptx = gpu_build.compile_variant(variant, architecture, "fp16")
        assert image.code[:4] == b"\x7fELF"
        assert (image.entry, image.arguments, image.warps) == ("tiles_kernel", 5, 4)
        assert ".entry tiles_kernel" in ptx


def test_arguments_that_changed_are_refused() -> None:
    ptx = ".visible .entry kernel(\n.param .u64 .ptr .global .align 1 a,\n.param .u32 b,\n.param .u64 c\n)\n{ }"
    with pytest.raises(MolaeError, match="takes the arguments"):
        gpu_build.check_arguments(ptx, ["*fp16", "i32"])
    gpu_build.check_arguments(ptx.replace("\n)", ",\n.param .u64 d\n)"), ["*fp16", "i32"])


@pytest.mark.slow
@pytest.mark.parametrize("element", gpu_build.TYPES)
@pytest.mark.parametrize("architecture", gpu_build.ARCHITECTURES)
def test_what_the_compiled_products_are_made_of(architecture: int, element: str) -> None:
    pytest.importorskip("triton")
    from molae_compress.kernels import gpu_facts

    names = [variant.name for variant in gpu_build.variants() if variant.name.startswith(("gemm.", "few"))]
    facts = gpu_facts.collect(names, (architecture,), element)
    assert len(facts) == len(names)
    for found in facts:
        assert found.spills == found.stack == 0, found
        assert found.shared <= gpu_facts.SHARED_LIMITS[architecture], found
        assert found.wide_loads > 0, found
        if found.name.startswith("gemm."):
            small = ".small" in found.name  # 16 rows are too few for the instructions of Hopper and Blackwell
            assert found.instructions == {"HMMA" if small else gpu_facts.MATRIX[architecture]}, found
        if "gemm.nt.large" in found.name:
            assert found.wide_stores > 0, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemm.nt.small", "gemm.nn_gate_1.small", "gemm.nt_columns.gathered"])
def test_what_only_torch_asks_for_compiles_too(name: str) -> None:
    """Products in fp32, and sums by atomic additions."""
    pytest.importorskip("triton")
    from molae_compress.kernels import gpu_facts

    variant = next(variant for variant in gpu_build.variants() if variant.name == name)
    exact = gpu_tiles.EXACT
    changed = {"BM": exact.rows, "BN": exact.columns, "BK": exact.depth, "GROUPS": 16, "ATOMIC": True, "PRECISION": "ieee"}
    constants = tuple((dict(variant.constants) | changed).items())
    image, _ = gpu_build.compile_variant(replace(variant, name="gemm.exact", constants=constants), 80, "fp32")
    facts = gpu_facts.facts_of(image)
    assert facts.spills == facts.matrix == 0, facts


@pytest.mark.slow
def test_the_embedded_kernels_are_small(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    images = gpu_build.compile_all()
    binary, _ = gpu_build.write_table(images, tmp_path)
    assert binary.stat().st_size < 4.5e6
