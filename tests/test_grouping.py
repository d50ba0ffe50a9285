"""Which experts share a basis, and in which layers they do."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import molae_compress as molae
from molae_compress.errors import ResumeError
from molae_compress.ranks import Module, tries_pairs
from molae_compress.recipe import Recipe
from molae_compress.solver.grouping import alike, grouped
from molae_compress.solver.layer import layer_error, solve_layer
from molae_compress.solver.population import Population, Uninformed
from molae_compress.solver.spectra import Fit, LayerSpectra, measure_spectra
from molae_compress.spectral import by_spectrum
from molae_compress.tensors import BankedShape, DenseExperts, ExpertsSpec, LatentShape
from tests.conftest import CheckpointMaker
from tests.runs import is_expert, recipe_for
from tests.test_solver import H, layer, normal, tokens
from tests.test_solver import grouped as groups_of

SPEC = ExpertsSpec("experts", 0, 6, H, 6, top_k=2)
FAMILIES = ({0, 3}, {1, 5}, {2, 4})


def families(sets: tuple[set[int], ...] = FAMILIES) -> DenseExperts:
    """Six experts, those of a set the same but for a little noise."""
    dense, alone = layer(SPEC), 0.02 * normal(6, SPEC.rows, H, seed=5)
    w_in_EJH = dense.w_in_EJH.clone()
    for members in sets:
        for expert in members:
            w_in_EJH[expert] = dense.w_in_EJH[min(members)] + alone[expert]
    return replace(dense, w_in_EJH=w_in_EJH)


def sets_of(order: tuple[int, ...], size: int) -> set[frozenset[int]]:
    assert sorted(order) == list(range(len(order)))
    return {frozenset(order[start : start + size]) for start in range(0, len(order), size)}


@pytest.mark.parametrize("population", [tokens(200, spec=SPEC), Uninformed(6, H)], ids=["calibrated", "without data"])
@pytest.mark.parametrize("sets", [FAMILIES, ({0, 2, 5}, {1, 3, 4})])
def test_experts_that_read_alike_are_found(population: Population, sets: tuple[set[int], ...]) -> None:
    size = len(sets[0])
    assert sets_of(alike(families(sets), population, size, 0.01), size) == {frozenset(members) for members in sets}


def test_groups_start_with_the_pair_most_alike_and_take_whoever_fits_best() -> None:
    likeness_EE = torch.zeros(6, 6)
    for a, b, value in ((0, 4, 0.9), (0, 2, 0.3), (4, 5, 0.5), (2, 5, 0.8), (1, 3, 0.1)):
        likeness_EE[a, b] = likeness_EE[b, a] = value
    assert sets_of(grouped(likeness_EE, 2), 2) == {frozenset({0, 4}), frozenset({2, 5}), frozenset({1, 3})}
    assert sets_of(grouped(likeness_EE, 3), 3) == {frozenset({0, 4, 5}), frozenset({1, 2, 3})}


def test_spectra_of_pairs_are_those_of_the_experts_put_into_that_order() -> None:
    dense, samples, shape, fit = families(), tokens(200, spec=SPEC), groups_of(1, 1, 1, 1), Fit()
    found = measure_spectra(dense, samples, shape, fit, cluster=True, pairs=True, output_pairs=True)
    alone = measure_spectra(dense, samples, shape, fit)
    torch.testing.assert_close(found.input_GM, alone.input_GM)
    assert found.paired_E is not None
    assert sets_of(tuple(found.paired_E.tolist()), 2) == {frozenset(members) for members in FAMILIES}
    place_E = found.paired_E.argsort()
    moved = replace(dense, w_in_EJH=dense.w_in_EJH[found.paired_E], w_out_EHI=dense.w_out_EHI[found.paired_E])
    there = replace(samples, index_TK=place_E[samples.index_TK])
    assert found.groups == (1, 1)
    for inputs, outputs in ((True, False), (False, True), (True, True)):
        sizes = (1 + inputs, 1 + outputs)
        expected, pairs = measure_spectra(moved, there, groups_of(1, 1, *sizes), fit), found.in_pairs(inputs, outputs)
        torch.testing.assert_close(pairs.input_GM, expected.input_GM)
        torch.testing.assert_close(pairs.output_GM, expected.output_GM)
        assert pairs.groups == sizes


def test_spectra_survive_the_work_directory() -> None:
    shape, wanted = groups_of(1, 1, 1, 1), {"cluster": True, "pairs": True, "output_pairs": True}
    found = measure_spectra(families(), tokens(60, spec=SPEC), shape, Fit(), **wanted)
    again = LayerSpectra.of_tensors(found.tensors())
    assert again.paired_E is not None
    torch.testing.assert_close(again.paired_output_GM, found.paired_output_GM)
    torch.testing.assert_close([*again.input_GM, *again.paired_GM], [*found.input_GM, *found.paired_GM])
    torch.testing.assert_close(
        [again.output_GM, again.order_E, again.paired_E], [found.output_GM, found.order_E, found.paired_E]
    )


def chosen(
    dense: DenseExperts, banks: int | str = "auto", **basis: object
) -> tuple[LatentShape | BankedShape | None, Recipe]:
    """The shape of a module at half of its size."""
    budget = {"keep": 0.5, "align": 1, "banks": banks}
    recipe = Recipe.load({"molae": 1, "calibration": {"data": "python-docs:calibration"}, "budget": budget, "basis": basis})
    samples, module = tokens(200, spec=dense.spec), Module.of(recipe, dense.spec, None)
    cluster, (pairs, outputs) = recipe.basis.cluster, tries_pairs(recipe, dense.spec)
    spectra = measure_spectra(dense, samples, module.shape, Fit(), cluster=cluster, pairs=pairs, output_pairs=outputs)
    found = by_spectrum(recipe, [module], [spectra], dense.spec.dense_numel // 2)
    assert found is not None
    return found[0], recipe


def error(dense: DenseExperts, shape: LatentShape | BankedShape | None) -> float:
    assert shape is not None
    samples = tokens(200, spec=SPEC)
    tensors = solve_layer(dense, samples, shape, Fit(newton=5), torch.float64)
    return layer_error(dense, tensors, shape, tokens(200, seed=9, spec=SPEC)).relative


def test_experts_share_a_basis_where_that_loses_less() -> None:
    shape, _ = chosen(families())
    assert shape is not None
    assert {bank.shape.input_group for bank in shape.banks(SPEC)} == {2}
    pairs = {pair for bank in shape.banks(SPEC) for pair in sets_of_bank(bank.experts)}
    assert pairs == {frozenset(members) for members in FAMILIES}
    others = [
        chosen(families(), experts_per_input_group=1)[0],
        chosen(families(), cluster=False, experts_per_input_group=2)[0],
    ]
    assert all(error(families(), shape) < 0.85 * error(families(), other) for other in others)


def test_experts_of_one_rank_share_output_bases_too_where_that_loses_less() -> None:
    dense = families()
    w_out_EHI = dense.w_out_EHI.clone()
    for members in FAMILIES:
        w_out_EHI[max(members)] = w_out_EHI[min(members)] @ normal(6, 6, seed=max(members)).to(w_out_EHI)
    alike_in_both = replace(dense, w_out_EHI=w_out_EHI)
    groups = {}
    for banks in (1, "auto"):
        shape, _ = chosen(alike_in_both, banks=banks)
        assert shape is not None
        groups[banks] = {(bank.shape.input_group, bank.shape.output_group) for bank in shape.banks(SPEC)}
    assert groups == {1: {(2, 2)}, "auto": {(2, 1)}}
    fixed, _ = chosen(alike_in_both, banks=1, experts_per_output_group=1)
    assert fixed is not None
    assert {bank.shape.output_group for bank in fixed.banks(SPEC)} == {1}


@pytest.mark.parametrize(("calibrated", "share"), [(True, 0.6), (False, 0.75)])
def test_no_bank_is_far_below_the_rank_its_layer_would_have_in_one_piece(calibrated: bool, share: float) -> None:
    spec = ExpertsSpec("experts", 0, 6, 64, 64, top_k=2)
    fall_EM = torch.tensor([0.5, 0.9, 0.95, 0.95, 0.95, 0.95], dtype=torch.float64)[:, None] ** torch.arange(64)
    ranks = {}
    calibration = {"data": "python-docs:calibration"} if calibrated else None
    for banks in (1, 6):
        budget = {"keep": 0.5, "align": 1, "banks": banks}
        recipe = Recipe.load({"molae": 1, "calibration": calibration, "budget": budget})
        spectra = LayerSpectra((fall_EM,), 0.95 * fall_EM[3:4].expand(6, -1), torch.arange(6))
        found = by_spectrum(recipe, [Module.of(recipe, spec, None)], [spectra], spec.dense_numel // 2)
        assert found is not None
        assert found[0] is not None
        ranks[banks] = [bank.shape.rank_in for e in range(6) for bank in found[0].banks(spec) if e in bank.experts]
    assert len(set(ranks[1])) == 1
    assert ranks[6][0] == min(ranks[6]) == math.ceil(share * ranks[1][0])
    assert max(ranks[6]) > ranks[1][0]


def test_layers_have_banks_without_calibration_text_too() -> None:
    spec = ExpertsSpec("experts", 0, 6, 64, 64, top_k=2)
    recipe = Recipe.load({"molae": 1, "budget": {"keep": 0.5, "align": 1}})
    fall_EM = torch.linspace(0.5, 0.97, 6, dtype=torch.float64)[:, None] ** torch.arange(64)
    spectra = LayerSpectra((fall_EM,), fall_EM, torch.arange(6))
    found = by_spectrum(recipe, [Module.of(recipe, spec, None)], [spectra], spec.dense_numel // 2)
    assert found is not None
    assert found[0] is not None
    assert len(list(found[0].banks(spec))) == 4


def sets_of_bank(experts: tuple[int, ...]) -> set[frozenset[int]]:
    return {frozenset(experts[start : start + 2]) for start in range(0, len(experts), 2)}


def test_experts_of_their_own_keep_a_basis_of_their_own() -> None:
    spec = replace(SPEC, hidden=24, intermediate=24)
    shape, _ = chosen(layer(spec), banks=1)  # with a handful of ranks to choose from, banks lose too much to their steps
    assert shape is not None
    assert {(bank.shape.input_group, bank.shape.output_group) for bank in shape.banks(spec)} == {(1, 1)}


def test_neighbours_share_where_clusters_are_not_wanted() -> None:
    shape, _ = chosen(families(), cluster=False, experts_per_input_group=3)
    assert shape is not None
    groups = [bank.experts[start : start + 3] for bank in shape.banks(SPEC) for start in range(0, len(bank.experts), 3)]
    assert sorted(groups) == [(0, 1, 2), (3, 4, 5)]


def test_a_run_pairs_the_experts_of_the_layer_that_gains_by_it(own_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    source = own_checkpoint("mixtral")
    tensors = load_file(source / "model.safetensors")
    twins = {5: 0, 7: 1, 4: 2, 6: 3}
    for key, tensor in tensors.items():
        if is_expert(key) and "layers.0." in key and (expert := int(key.split(".experts.")[1].split(".")[0])) in twins:
            tensor.copy_(tensors[key.replace(f".experts.{expert}.", f".experts.{twins[expert]}.")])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    settings = ("budget.keep=0.5", "budget.align=1", "calibration.samples=48")
    report = molae.run(recipe_for(source, *settings), tmp_path / "pairs")
    first = report.layers[0].shape
    assert first is not None
    assert {bank["input_group"] for bank in first["banks"]} == {2}
    pairs = {pair for bank in first["banks"] for pair in sets_of_bank(tuple(bank["experts"]))}
    assert pairs == {frozenset(pair) for pair in twins.items()}
    apart = molae.run(recipe_for(source, *settings, "basis.experts_per_input_group=1"), tmp_path / "apart")
    assert report.err_h is not None
    assert apart.err_h is not None
    assert report.err_h < 1.05 * apart.err_h
    assert molae.verify(tmp_path / "pairs").passed


@pytest.mark.parametrize("clustered", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        ("calibration=null", "basis.experts_per_input_group=2"),
        ("budget.banks=1", "basis.experts_per_input_group=2"),
        ("basis.output=combined", "basis.experts_per_input_group=2", "basis.experts_per_output_group=all"),
        ("basis.experts_per_input_group=2", "basis.experts_per_output_group=4"),
        ("basis.experts_per_input_group=1", "basis.experts_per_output_group=2", "basis.gate_up=separate"),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_a_module_in_another_order_computes_what_it_stands_for(
    checkpoint: CheckpointMaker, tmp_path: Path, settings: tuple[str, ...], clustered: bool
) -> None:
    recipe = recipe_for(checkpoint("qwen3_moe"), *settings, f"basis.cluster={str(clustered).lower()}", "budget.keep=0.6")
    molae.run(recipe, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(24)[None] % model.config.vocab_size
    with torch.no_grad():
        latent = model(input_ids=ids).logits
        dense = molae.expand_(model)(input_ids=ids).logits
    torch.testing.assert_close(latent, dense, rtol=1e-3, atol=1e-3 * float(dense.abs().max()))
    assert molae.verify(tmp_path / "out").passed


def test_a_work_directory_serves_every_budget(own_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    source = own_checkpoint("mixtral")
    fresh = molae.run(recipe_for(source, "budget.keep=0.5"), tmp_path / "fresh")
    molae.plan(recipe_for(source, "budget.rank=8"), measured=True, work_dir=tmp_path / "work")
    again = molae.run(recipe_for(source, "budget.keep=0.5"), tmp_path / "again", work_dir=tmp_path / "work")
    assert [layer.shape for layer in again.layers] == [layer.shape for layer in fresh.layers]
    uniform = recipe_for(source, "budget.keep=0.5", "budget.allocate=uniform")
    with pytest.raises(ResumeError, match="allocate"):
        molae.plan(uniform, measured=True, work_dir=tmp_path / "work")
    with pytest.raises(ResumeError, match="banks: 1"):
        molae.plan(recipe_for(source, "budget.banks=1"), measured=True, work_dir=tmp_path / "work")


def test_spectra_of_another_device_end_on_the_cpu() -> None:
    found = measure_spectra(families(), tokens(60, spec=SPEC), groups_of(1, 1, 1, 1), Fit(), cluster=True, pairs=True)
    moved = LayerSpectra.of_tensors({name: part.to("meta") for name, part in found.tensors().items()})
    with pytest.raises(NotImplementedError, match="meta"):  # it tries to copy them
        moved.on_cpu()
    assert found.on_cpu().output_GM.device.type == "cpu"
