"""Distillation of one experts module: never worse, the same every time, and nothing moves that no token speaks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molae_compress as molae
from molae_compress.errors import RecipeError
from molae_compress.solver import distill
from molae_compress.solver.distill import distil
from molae_compress.solver.layer import layer_error, solve_layer
from molae_compress.solver.packing import Packed
from molae_compress.solver.population import Calibrated
from molae_compress.solver.spectra import Fit
from molae_compress.tensors import AnyShape, BankedShape, DenseExperts, ExpertsSpec, LatentShape
from tests.conftest import CheckpointMaker
from tests.runs import bits, recipe_for, same_every_time, tensors_in
from tests.test_solver import OSS, PLAIN, UNGATED, E, grouped, layer, tokens

STEPS, TOKENS = 60, 6000
LAYER = LatentShape("layer", 8, 8, E, E)
BANKED = BankedShape(
    ((0, 3), (1, 2)), (grouped(6, 6, 1, 2, storage="interpolative"), grouped(9, None, 2, 2, gate_up="separate"))
)
CASES: dict[str, tuple[ExpertsSpec, AnyShape]] = {
    "layer": (PLAIN, LAYER),
    "layer, biased and transposed": (OSS, LAYER),
    "grouped": (PLAIN, grouped(6, 5, 2, 1, storage="interpolative")),
    "separate": (PLAIN, grouped(5, 6, 2, 4, gate_up="separate")),
    "interleaved and separate": (OSS, grouped(5, 6, 1, 2, gate_up="separate", storage="interpolative")),
    "dense down": (UNGATED, grouped(4, None, 1, 1)),
    "banks": (PLAIN, BANKED),
}


def case(name: str, **changes: object) -> tuple[DenseExperts, Calibrated, AnyShape, dict[str, Tensor]]:
    """A layer with correlated experts, tokens, and the closed form."""
    spec, shape = CASES[name]
    dense = dataclasses.replace(layer(spec), **changes)  # type: ignore[arg-type]
    seen = tokens(TOKENS, spec=spec)
    return dense, seen, shape, solve_layer(dense, seen, shape, Fit(), torch.float64)


def set_aside(seen: Calibrated) -> Calibrated:
    """The tokens that only measure."""
    return distill._part(seen, slice(-(TOKENS // distill._ASIDE), None))


def moved(dense: DenseExperts, shape: AnyShape, one: dict[str, Tensor], other: dict[str, Tensor]) -> set[int]:
    """Experts of which a core differs."""
    pairs = zip(*(sorted(Packed.all_of(dense.spec, shape, tensors).items()) for tensors in (one, other)), strict=True)
    return {
        expert
        for (expert, a), (_, b) in pairs
        for stem in (*(core for _, core in a.shape.branches()), "down")
        if not torch.equal(a.core(stem, expert), b.core(stem, expert))
    }


@pytest.mark.parametrize("name", CASES)
def test_every_shape_gets_better_on_tokens_that_did_not_train(name: str) -> None:
    dense, seen, shape, start = case(name)
    before = {key: tensor.clone() for key, tensor in start.items()}
    found = distil(dense, seen, shape, start, STEPS)
    assert {key: bits(tensor) for key, tensor in start.items()} == {key: bits(tensor) for key, tensor in before.items()}
    assert {key: (t.shape, t.dtype) for key, t in found.tensors.items()} == {
        key: (t.shape, t.dtype) for key, t in start.items()
    }
    aside = set_aside(seen)
    errors = [layer_error(dense, tensors, shape, aside).err_h for tensors in (start, found.tensors)]
    assert found.after / found.before == pytest.approx(errors[1] / errors[0])
    assert found.after < found.before
    assert moved(dense, shape, start, found.tensors) == set(range(E))
    for key in start:
        if key.endswith(("pivots", "bias")):
            assert torch.equal(start[key], found.tensors[key])


def test_what_follows_an_expert_takes_part() -> None:
    dense, seen, shape, start = case("grouped", after=lambda y_NH: y_NH / (1e-3 + y_NH.norm(dim=1, keepdim=True)))
    found = distil(dense, seen, shape, start, STEPS)
    aside = set_aside(seen)
    assert layer_error(dense, found.tensors, shape, aside).err_h < layer_error(dense, start, shape, aside).err_h


@pytest.mark.parametrize("name", ["layer", "banks"])
def test_it_is_the_same_every_time_and_rounded_before_it_is_compared(name: str) -> None:
    dense, seen, shape, wide = case(name)
    start = {key: t.to(torch.bfloat16) if t.is_floating_point() else t for key, t in wide.items()}
    one, other = (distil(dense, seen, shape, start, STEPS) for _ in range(2))
    assert {key: bits(t) for key, t in one.tensors.items()} == {key: bits(t) for key, t in other.tensors.items()}
    assert one.tensors["bank_0.core.down" if name == "banks" else "core.down_proj"].dtype == torch.bfloat16
    aside = set_aside(seen)
    errors = [layer_error(dense, tensors, shape, aside).err_h for tensors in (start, one.tensors)]
    assert one.after / one.before == pytest.approx(errors[1] / errors[0])


@pytest.mark.parametrize("rate", [1e4, float("nan")])
def test_it_is_never_worse_than_the_start(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "_RATE", rate)
    dense, seen, shape, start = case("grouped")
    found = distil(dense, seen, shape, start, STEPS)
    assert found.after == found.before
    assert {key: bits(t) for key, t in found.tensors.items()} == {key: bits(t) for key, t in start.items()}


@pytest.mark.parametrize("name", CASES)
def test_an_expert_without_tokens_stays_as_it_is(name: str) -> None:
    dense, seen, shape, _ = case(name)
    unseen = 1
    index_TK = seen.index_TK.masked_fill(seen.index_TK == unseen, E)
    index_TK[-5:, 0] = unseen  # tokens that only measure do not count
    seen = dataclasses.replace(seen, index_TK=index_TK)
    start = solve_layer(dense, seen, shape, Fit(cores=False, down=False), torch.float64)  # so that there is much to find
    found = distil(dense, seen, shape, start, STEPS).tensors
    assert moved(dense, shape, start, found) == set(range(E)) - {unseen}
    x_NH = tokens(20, seed=9, spec=dense.spec).x_TH
    outputs = []
    for tensors in (start, found):
        packed = Packed.all_of(dense.spec, shape, tensors)[unseen]
        outputs.append(packed.output(unseen, dense.activate(packed.intermediate(unseen, x_NH, None))))
    assert torch.equal(*outputs)


def test_nothing_to_train_on_gives_back_the_start() -> None:
    dense, _, shape, start = case("layer")
    for few in (tokens(distill._ASIDE - 1), dataclasses.replace(tokens(64), index_TK=torch.full((64, 2), E))):
        assert distil(dense, few, shape, start, STEPS).tensors == start


def test_a_run_heals_what_it_solves_and_says_so(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(*args: Any) -> dict[str, Tensor]:
        return {name: 1.3 * tensor if name.endswith("core.down") else tensor for name, tensor in solve_layer(*args).items()}

    monkeypatch.setattr("molae_compress.compress.solve_layer", disturbed)
    source = checkpoint("qwen3_moe")
    plain = molae.run(recipe_for(source, "budget.keep=0.5"), tmp_path / "plain")
    report = molae.run(recipe_for(source, "budget.keep=0.5", "heal.block_steps=30"), tmp_path / "healed")
    assert molae.verify(tmp_path / "healed").passed
    for before, after in zip(plain.layers, report.layers, strict=True):
        assert before.err_h_unhealed is None
        assert after.err_h_unhealed == before.err_h
        assert after.err_h is not None
        assert before.err_h is not None
        assert after.err_h < before.err_h
        assert before.shape == after.shape
    latent = [name for name in tensors_in(tmp_path / "plain") if ".experts." in name]
    one, other = tensors_in(tmp_path / "plain"), tensors_in(tmp_path / "healed")
    changed = {name for name in one if bits(one[name]) != bits(other[name])}
    assert changed
    assert changed <= set(latent)


def test_no_steps_change_nothing(checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molae_compress.compress.distil", None)
    source = checkpoint("qwen3_moe")
    molae.run(recipe_for(source), tmp_path / "one")
    molae.run(recipe_for(source, "heal={block_steps: 0, router_steps: 0}"), tmp_path / "other")
    assert same_every_time(tmp_path / "one") == same_every_time(tmp_path / "other")


def test_healing_needs_text(checkpoint: CheckpointMaker) -> None:
    for key in ("block_steps", "router_steps"):
        with pytest.raises(RecipeError, match=f"`heal.{key}: 3` needs calibration text"):
            recipe_for(checkpoint("mixtral"), f"heal.{key}=3", calibrated=False)
        with pytest.raises(RecipeError, match="`method: paper` and `heal"):
            recipe_for(checkpoint("mixtral"), f"heal.{key}=3", "method=paper", calibrated=False)


def test_what_follows_an_expert_gets_no_gradient() -> None:
    norm = torch.nn.RMSNorm(PLAIN.hidden, dtype=torch.float64)
    dense, seen, shape, start = case("grouped", after=norm)
    distil(dense, seen, shape, start, 3)
    assert norm.weight.grad is None
