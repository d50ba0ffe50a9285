"""The operators in ONNX Runtime: the same numbers as the torch module and as their definitions, in all types and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molae_compress.adapters import find_experts
from molae_compress.modeling import LatentExperts
from molae_compress.tensors import AnyShape, BankedShape, LatentShape
from tests.latent_nodes import (
    ACTIVATIONS,
    assert_near,
    latent_attributes,
    latent_feeds,
    naive_gemm,
    naive_latent,
    random_bank,
    random_routing,
    run_node,
)
from tests.tiny import EXPERTS, HIDDEN, TOP_K, tiny_model

TYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES: dict[str, AnyShape] = {
    "layer": LatentShape("layer", 16, 16, EXPERTS, EXPERTS),
    "interpolative": LatentShape("grouped", 12, 20, 2, 1, storage="interpolative"),
    "orthonormal": LatentShape("grouped", 20, 12, 4, 2),
    "one group a side": LatentShape("grouped", 12, 20, EXPERTS, EXPERTS, storage="interpolative"),
    "an expert a group": LatentShape("grouped", 7, 9, 1, 1),
    "separate": LatentShape("grouped", 12, 16, 2, EXPERTS, gate_up="separate"),
    "dense down": LatentShape("grouped", 16, None, 1, 1, gate_up="separate", storage="interpolative"),
    "all columns": LatentShape("grouped", HIDDEN, HIDDEN, 1, 1, storage="interpolative"),
    "banks": BankedShape(
        ((5, 0), (1, 3, 4, 7), (6, 2)),
        (
            LatentShape("grouped", 12, 20, 2, 1, storage="interpolative"),
            LatentShape("grouped", 20, None, 4, 1, gate_up="separate"),
            LatentShape("grouped", 7, 9, 1, 2),
        ),
    ),
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"activation": "silu"},
    # biased, interleaved, clamped low enough to matter
    "gpt_oss": {"activation": "silu", "alpha": 1.702, "limit": 1.0, "up_offset": 1.0},
}


def latent_module(model: str, shape: AnyShape, dtype: torch.dtype) -> LatentExperts:
    stock = tiny_model(model)
    spec = find_experts(stock)[0]
    latent = LatentExperts.from_stock(stock.get_submodule(spec.name), spec, shape)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for bank in shape.banks(spec):
        for name, tensor in random_bank_like(bank.spec, bank.shape, generator).items():
            tensors[f"{bank.prefix}{name}"] = tensor
    latent.load_latent_(tensors)
    return latent.to(dtype).eval()


def random_bank_like(spec: Any, shape: LatentShape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    fields = {name: getattr(spec, name) for name in ("has_gate", "has_bias", "is_transposed", "interleaved")}
    seed = int(torch.randint(1000, (), generator=generator))
    return random_bank(
        shape, hidden=spec.hidden, intermediate=spec.intermediate, experts=spec.num_experts, seed=seed, **fields
    )[1]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_node_computes_what_the_module_does(shape: AnyShape, model: str, dtype: torch.dtype) -> None:
    latent = latent_module(model, shape, dtype)
    tensors = latent.latent_tensors()
    banks = shape.banks(latent.spec)
    for tokens in (0, 1, 7, 200):
        x_TH, index_TK, weight_TK = random_routing(latent._banks[0], tokens, TOP_K, dtype=dtype)
        index_TK = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(3)).argsort(dim=1)[:, :TOP_K]
        y_TH = torch.zeros(tokens, HIDDEN)
        for bank, places in zip(banks, latent._place_lists, strict=True):
            feeds = latent_feeds(bank, tensors, x_TH, torch.tensor(places)[index_TK], weight_TK)
            y_TH += run_node("LatentExperts", feeds, **latent_attributes(bank, **MODELS[model])).float()
        with torch.no_grad():
            expected_TH = latent.to(torch.float32)(x_TH.float(), index_TK, weight_TK.float())
        assert_near(y_TH.to(dtype), expected_TH)
        latent.to(dtype)


@st.composite
def latent_nodes(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Feeds and attributes of any node that is right, and threads to run it with."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    experts = groups * per_group
    divisors = [size for size in range(1, experts + 1) if experts % size == 0]
    hidden, intermediate = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    gated = draw(st.booleans())
    shape = LatentShape(
        "grouped",
        draw(st.integers(1, hidden)),
        draw(st.none() | st.integers(1, hidden)),
        draw(st.sampled_from(divisors)),
        draw(st.sampled_from(divisors)),
        "separate" if gated and draw(st.booleans()) else "joint",
        draw(st.sampled_from(("orthonormal", "interpolative"))),
    )
    activation = {
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "limit": draw(st.sampled_from((0.0, 0.5))),
        "alpha": draw(st.sampled_from((1.0, 1.702))),
        "up_offset": draw(st.sampled_from((0.0, 1.0))),
    }
    dtype, seed = draw(st.sampled_from(TYPES)), draw(st.integers(0, 10**6))
    traits = {"has_gate": gated, "has_bias": draw(st.booleans()), "interleaved": gated and draw(st.booleans())}
    bank, tensors = random_bank(
        shape, hidden=hidden, intermediate=intermediate, experts=experts, dtype=dtype, seed=seed, **traits
    )
    tokens, top_k = draw(st.integers(0, 40)), draw(st.integers(1, experts))
    routed = random_routing(bank, tokens, top_k, dtype=dtype, seed=seed, strangers=draw(st.sampled_from((0.0, 0.3, 1.0))))
    return latent_feeds(bank, tensors, *routed), latent_attributes(bank, **activation), draw(st.integers(1, 2))


@settings(max_examples=60, deadline=None)
@given(latent_nodes())
def test_latent_experts_are_what_they_are_defined_as(case: tuple[dict[str, Any], dict[str, Any], int]) -> None:
    feeds, attributes, threads = case
    found = run_node("LatentExperts", feeds, threads=threads, **attributes)
    assert_near(found, naive_latent(feeds, attributes))


@st.composite
def gemm_nodes(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], int]:
    groups, width = draw(st.integers(0, 4)), draw(st.integers(0, 80))
    sizes = draw(st.lists(st.integers(0, 30) | st.integers(120, 300), min_size=groups, max_size=groups))
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0).to(torch.int32)
    rows, gated = sum(sizes) + draw(st.integers(0, 3)), draw(st.booleans())
    columns = draw(st.integers(0, 90)) * (1 + gated)
    dtype, generator = draw(st.sampled_from(TYPES)), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    transposed = draw(st.booleans())
    feeds = {
        "a": normal(rows, width),
        "b": normal(groups, *((width, columns) if transposed else (columns, width))),
        "ends": ends,
    }
    feeds["bias"] = normal(groups, columns) if draw(st.booleans()) else None
    feeds["row_weight"] = normal(rows) if draw(st.booleans()) else None
    attributes = {
        "transposed": int(transposed),
        "gated": int(gated),
        "interleaved": int(gated and draw(st.booleans())),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "limit": draw(st.sampled_from((0.0, 3.0))),
        "up_offset": draw(st.sampled_from((0.0, 1.0))),
    }
    return feeds, attributes, draw(st.integers(1, 2))


@settings(max_examples=60, deadline=None)
@given(gemm_nodes())
def test_a_grouped_gemm_is_what_it_is_defined_as(case: tuple[dict[str, Any], dict[str, Any], int]) -> None:
    feeds, attributes, threads = case
    assert_near(run_node("GroupedGemm", feeds, threads=threads, **attributes), naive_gemm(feeds, attributes))


@pytest.mark.parametrize("tokens", [1, 3, 150])
def test_large_matrices_are_shared_out_without_loss(tokens: int) -> None:
    """Wide enough for few rows to be split by inputs, and for several tiles of many."""
    shape = LatentShape("grouped", 150, 140, 2, 2, storage="interpolative")
    bank, tensors = random_bank(shape, hidden=700, intermediate=600, experts=4, has_bias=True)
    x_TH, index_TK, weight_TK = random_routing(bank, tokens, 2)
    feeds = latent_feeds(bank, tensors, x_TH, index_TK, weight_TK)
    attributes = latent_attributes(bank, activation="silu")
    once = run_node("LatentExperts", feeds, threads=2, **attributes)
    assert_near(once[:3], naive_latent(feeds | {"x": x_TH[:3], "index": index_TK[:3], "weight": weight_TK[:3]}, attributes))
    assert torch.equal(once, run_node("LatentExperts", feeds, threads=1, **attributes))


def test_an_expert_named_twice_counts_twice() -> None:
    bank, tensors = random_bank(LatentShape("grouped", 5, 6, 2, 2), hidden=12, intermediate=9, experts=4)
    x_TH, index_TK, weight_TK = random_routing(bank, 5, 3)
    index_TK[:, 2] = index_TK[:, 0]
    feeds, attributes = latent_feeds(bank, tensors, x_TH, index_TK, weight_TK), latent_attributes(bank, activation="silu")
    assert_near(run_node("LatentExperts", feeds, **attributes), naive_latent(feeds, attributes))


def test_extreme_numbers_stay_what_they_are() -> None:
    """Activations far outside of where their exponential fits; NaN stays in its own row."""
    x_SN = torch.tensor([[-1e4], [-90.0], [-20.0], [0.0], [20.0], [90.0], [1e4], [float("nan")]])
    for name, function in ACTIVATIONS.items():
        feeds = {"a": x_SN, "b": torch.ones(1, 1, 1), "ends": torch.tensor([8], dtype=torch.int32)}
        found = run_node("GroupedGemm", feeds, activation=name)
        torch.testing.assert_close(found, function(x_SN), equal_nan=True, atol=1e-6, rtol=1e-6)
