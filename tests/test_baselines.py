"""Baselines of the quality benchmark: each gives the model back at a full budget, and finds what it is known to find."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from baselines import BASELINES, Setting
from baselines.channels import curve, order, refitted
from baselines.common import Layer, observed, opened
from baselines.hc_smoe import clusters, hc_smoe
from baselines.mobe import Shape as MobeShape
from baselines.mobe import start as mobe_start
from baselines.reap import reap
from baselines.slbf import Shape as SlbfShape
from baselines.slbf import gauge_fixed
from baselines.slbf import start as slbf_start
from baselines.svd_llm import Matrix, pivoted, plain, shares_of
from tests.tiny import EXPERTS, HIDDEN, INTERMEDIATE, tiny_ids, tiny_model

WINDOWS_NL, HELD_OUT_NL = tiny_ids(batch=16, length=32), tiny_ids(batch=4, length=16, seed=1)
E, H, I = EXPERTS, HIDDEN, INTERMEDIATE
LAYERS = 2
DENSE = LAYERS * E * 3 * H * I
STACKS = ("gate_EIH", "up_EIH", "down_EHI")
EXACT = sorted(BASELINES.keys() - {"mobe", "mobe-even", "slbf"})


def setting(keep: float, steps: int = 30) -> Setting:
    return Setting(keep, torch.float32, steps=steps)


def edited(model: PreTrainedModel, method: str, chosen: Setting) -> tuple[PreTrainedModel, int]:
    out = copy.deepcopy(model)
    return out, BASELINES[method][1](out, WINDOWS_NL, chosen)


def change(model: PreTrainedModel, other: PreTrainedModel, ids: Tensor = HELD_OUT_NL) -> float:
    """Largest difference of logits, by default on windows that took part in no fit."""
    with torch.no_grad():
        return float((model(input_ids=ids).logits - other(input_ids=ids).logits).abs().max())


def put(model: PreTrainedModel, layers: list[Layer]) -> PreTrainedModel:
    for layer in layers:
        layer.write(model)
    return model


def distance(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Relative squared distance of all experts' weights."""
    pairs = [
        (getattr(a, name), getattr(b, name)) for a, b in zip(opened(model), opened(other), strict=True) for name in STACKS
    ]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def common_rows() -> PreTrainedModel:
    """Experts of a layer read the same I/2 directions of the input and write into I/2 other ones."""
    model, chance = tiny_model("qwen3_moe"), torch.Generator().manual_seed(0)
    layers = opened(model)
    for layer in layers:
        for name in STACKS:
            basis = torch.randn(I // 2, H, generator=chance) / H**0.5
            core = torch.randn(E, I, I // 2, generator=chance) / (I // 2) ** 0.5
            setattr(layer, name, (core @ basis).mT.clone() if name == "down_EHI" else core @ basis)
    return put(model, layers)


@pytest.mark.parametrize("method", EXACT)
def test_a_budget_for_everything_gives_the_model_back(model: PreTrainedModel, method: str) -> None:
    out, stored = edited(model, method, setting(1.5))
    assert stored >= DENSE
    assert change(model, out) < 1e-4


@pytest.mark.parametrize("method", ["mobe", "mobe-even", "slbf"])
def test_bases_behind_an_activation_come_near_the_model_at_a_full_budget(model: PreTrainedModel, method: str) -> None:
    out, _ = edited(model, method, setting(3.0, steps=200))
    assert distance(model, out) < 0.01


@pytest.mark.parametrize("keep", [0.5, 0.7])
@pytest.mark.parametrize("method", BASELINES)
def test_no_method_stores_more_than_it_may(model: PreTrainedModel, method: str, keep: float) -> None:
    out, stored = edited(model, method, setting(keep, steps=5))
    assert 0.85 * keep * DENSE < stored <= keep * DENSE
    assert change(model, out) > 1e-3


def ranks(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Rows, columns and numerical rank of every matrix of every expert."""
    matrices = [matrix for layer in opened(model) for name in STACKS for matrix in getattr(layer, name)]
    return [(*matrix.shape, int(torch.linalg.matrix_rank(matrix, rtol=1e-4))) for matrix in matrices]


def test_counts_are_those_of_what_was_written(model: PreTrainedModel) -> None:
    """Counted again from the written weights: ranks, channels, distinct experts."""
    plain_count = {r: min(r * (H + I), H * I) for r in range(I + 1)}
    pifa_count = {r: min(r * (H + I - r + 1), H * I) for r in range(I + 1)}
    for method, count in (("svd-llm", plain_count), ("pifa", pifa_count)):
        out, stored = edited(model, method, setting(0.5))
        assert stored == sum(count[rank] for _, _, rank in ranks(out))

    out, stored = edited(model, "channels", setting(0.5))
    alive = [layer.up_EIH.abs().sum(2) > 0 for layer in opened(out)]
    assert stored == sum(int(mask_EI.sum()) for mask_EI in alive) * 3 * H + LAYERS * E

    out, stored = edited(model, "hc-smoe", setting(0.5))
    distinct = sum(len({tuple(gate_IH.flatten().tolist()) for gate_IH in layer.gate_EIH}) for layer in opened(out))
    assert stored == distinct * 3 * H * I + LAYERS * E

    out, stored = edited(model, "reap", setting(0.5))
    assert stored == sum(len(layer.mlp.gate.weight) for layer in out.model.layers) * 3 * H * I


def test_bases_are_counted_as_they_are_stored() -> None:
    """The parameters that are fitted and the cores; for bases of low rank less the gauge, and with its indices."""
    w_NEPD = torch.randn(1, E, I, H, generator=torch.Generator().manual_seed(0))
    full = MobeShape(10, 3)
    fitted = mobe_start(w_NEPD, full, setting(0.5))
    assert full.numel(E, I, H) == sum(map(torch.numel, fitted.values())) + E * I * 10
    low = SlbfShape(12, 4, 5)
    fitted = slbf_start(w_NEPD, low, setting(0.5))
    assert low.numel(E, I, H) == sum(map(torch.numel, fitted.values())) + E * I * 12 + 4 * (5 - 5 * 5)
    products = fitted["u"] @ fitted["v"]
    torch.testing.assert_close(gauge_fixed(fitted["u"], fitted["v"], setting(0.5)), products)


def test_a_base_and_deltas_are_counted_and_found(model: PreTrainedModel) -> None:
    """Experts that differ by matrices of rank one are stored without loss, and their deltas are what was counted."""
    layers, chance = opened(model), torch.Generator().manual_seed(0)
    for layer in layers:
        for name in STACKS:
            mean_XY = getattr(layer, name)[0].clone()
            left_EX, right_Y = (
                torch.randn(E, len(mean_XY), generator=chance),
                torch.randn(mean_XY.shape[1], generator=chance),
            )
            setattr(layer, name, mean_XY + 0.1 * left_EX[:, :, None] * right_Y)
    near = put(copy.deepcopy(model), layers)
    keep = (H * I + E * (H + I)) / (E * H * I)
    out, stored = edited(near, "d2-moe", setting(keep))
    assert stored == round(keep * DENSE)
    assert change(near, out) < 1e-3


def test_whitened_factors_of_full_rank_are_the_matrix_and_fewer_are_optimal_where_inputs_are() -> None:
    chance = torch.Generator().manual_seed(0)
    w_XY, x_NY = torch.randn(I, H, generator=chance), torch.randn(400, H, generator=chance) * torch.linspace(0.05, 3, H)
    matrix = Matrix.whitened(w_XY, (x_NY.T @ x_NY).double())
    chosen = setting(1.0)
    for restored in (plain, pivoted):
        torch.testing.assert_close(restored(matrix, I, chosen), w_XY, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain(matrix, 7, chosen), pivoted(matrix, 7, chosen), rtol=1e-3, atol=1e-4)
    u_XR, s_R, vt_RY = torch.linalg.svd(w_XY, full_matrices=False)
    blind_XY = (u_XR[:, :7] * s_R[:7]) @ vt_RY[:7]

    def damage(found_XY: Tensor) -> float:
        return float((x_NY @ (found_XY - w_XY).T).square().sum())

    assert damage(plain(matrix, 7, chosen)) < 0.9 * damage(blind_XY)


def test_interpolative_storage_holds_more_rank_and_so_comes_nearer(model: PreTrainedModel) -> None:
    plain_model, pivoted_model = (edited(model, method, setting(0.6))[0] for method in ("svd-llm", "pifa"))
    assert sum(rank for *_, rank in ranks(pivoted_model)) > sum(rank for *_, rank in ranks(plain_model))
    assert distance(model, pivoted_model) < 0.8 * distance(model, plain_model)


def test_a_matrix_that_loses_more_keeps_more_and_the_mean_is_the_budget() -> None:
    """The allocation of SVD-LLM v2, within one type of matrices."""
    chance = torch.Generator().manual_seed(0)
    steep, flat = (torch.linalg.qr(torch.randn(I, I, generator=chance))[0] for _ in range(2))
    decay = 1000 * torch.logspace(0, -4, I)
    matrices = [Matrix.whitened(part, torch.eye(I).double()) for part in (steep * decay, 1000 * flat)]
    shares = shares_of(matrices, 0.6, I // 2)
    assert shares[0] < shares[1]
    assert sum(shares) / 2 == pytest.approx(0.6)


def test_mobe_leaves_the_second_projection_and_its_even_split_does_not(model: PreTrainedModel) -> None:
    for method, kept in (("mobe", True), ("mobe-even", False)):
        pairs = zip(opened(model), opened(edited(model, method, setting(0.6))[0]), strict=True)
        assert all(torch.equal(a.down_EHI, b.down_EHI) == kept and not torch.equal(a.up_EIH, b.up_EIH) for a, b in pairs)


def test_bases_mixed_behind_an_activation_are_found_where_the_experts_are_made_of_them(model: PreTrainedModel) -> None:
    """At the budget of what the experts were made of, and the nearer the more steps are taken; per-expert factors cannot."""
    chance, R, bases = torch.Generator().manual_seed(0), I // 2, 2
    layers = opened(model)
    for layer in layers:
        for name in STACKS:
            weights = torch.nn.functional.one_hot(torch.arange(E) * bases // E, bases) * 3 + torch.randn(
                E, bases, generator=chance
            )
            mixed = torch.tanh(torch.einsum("em,mrh->erh", weights.softmax(-1), torch.randn(bases, R, H, generator=chance)))
            stack = torch.randn(E, I, R, generator=chance) / R**0.5 @ mixed
            setattr(layer, name, stack.mT.clone() if name == "down_EHI" else stack)
    planted = put(copy.deepcopy(model), layers)
    keep = (E * I * R + bases * R * H + E * bases) / (E * I * H) + 0.005
    for method in ("mobe-even", "slbf"):
        few, many = (distance(planted, edited(planted, method, setting(keep, steps))[0]) for steps in (5, 300))
        assert many < 0.01, method
        assert many < few / 2, method
    assert distance(planted, edited(planted, "svd-llm", setting(keep))[0]) > 0.1


def test_a_rank_that_experts_share_is_found_by_shared_bases_and_not_by_per_expert_factors(
    common_rows: PreTrainedModel,
) -> None:
    """At a budget for one basis of rank I/2 and a core each, which is too little for factors of each matrix."""
    R = I // 2
    shared = (E * I * R + R * H + E) / (E * I * H)
    errors = {
        method: distance(common_rows, edited(common_rows, method, setting(shared, 300))[0])
        for method in ("mobe-even", "svd-llm")
    }
    errors["slbf"] = distance(common_rows, edited(common_rows, "slbf", setting(shared + 0.02, 300))[0])
    assert errors["mobe-even"] < 0.02
    assert errors["slbf"] < 0.03
    assert errors["svd-llm"] > 5 * max(errors["slbf"], errors["mobe-even"])


def test_duplicates_are_merged_without_loss(model: PreTrainedModel) -> None:
    layers = opened(model)
    for layer in layers:
        for name in STACKS:
            stack = getattr(layer, name)
            stack[1::2] = stack[::2]
    twins = put(copy.deepcopy(model), layers)
    out = copy.deepcopy(twins)
    assert hc_smoe(out, WINDOWS_NL, setting(0.51)) <= 0.51 * DENSE
    assert change(twins, out) < 1e-4


def test_average_linkage_joins_what_is_near() -> None:
    features_EH = torch.tensor([[0.0], [10.0], [0.1], [10.3], [4.0]])
    assert sorted(map(sorted, clusters(features_EH, 3))) == [[0, 2], [1, 3], [4]]
    assert sorted(map(sorted, clusters(features_EH, 2))) == [[0, 2, 4], [1, 3]]


def test_experts_that_are_never_routed_to_are_pruned_without_loss() -> None:
    lonely, gone = tiny_model("qwen3_moe", norm_topk_prob=True), [2, 5]
    with torch.no_grad():
        lonely.model.embed_tokens.weight[:, 0] = 5.0  # a direction that all tokens share, and only these rows read
        for layer in lonely.model.layers:
            layer.mlp.gate.weight[:, 0] = 0.0
            layer.mlp.gate.weight[gone, 0] = -100.0
    assert [int(layer.tokens.counts_E[gone].sum()) for layer in observed(lonely, WINDOWS_NL)] == [0] * LAYERS
    out = copy.deepcopy(lonely)
    assert reap(out, WINDOWS_NL, setting((E - 2) / E)) == DENSE * (E - 2) // E
    assert change(lonely, out, WINDOWS_NL) < 1e-4


def test_a_channel_that_is_always_zero_is_pruned_first(model: PreTrainedModel) -> None:
    layers = opened(model)
    for layer in layers:
        layer.up_EIH[:, 5] = 0
    quiet = put(copy.deepcopy(model), layers)
    for layer in observed(quiet, WINDOWS_NL):
        z_NI = layer.intermediate(0, layer.tokens.x_TH)
        assert int(order((z_NI.T @ z_NI).double())[-1]) == 5
    out, _ = edited(quiet, "channels", setting((I - 1) / I + LAYERS * E / DENSE))
    assert change(quiet, out) < 1e-3


def test_the_refitted_projection_leaves_the_error_that_was_predicted() -> None:
    chance = torch.Generator().manual_seed(0)
    w_HI, z_NI = torch.randn(H, I, generator=chance).double(), torch.randn(300, I, generator=chance).double()
    z_NI = z_NI @ torch.randn(I, I, generator=chance).double()
    c_II = z_NI.T @ z_NI
    order_I = order(c_II)
    predicted = curve(w_HI, c_II, order_I)
    assert predicted[-1] == 0
    for count in (1, I // 2, I):
        kept_S = order_I[:count]
        left = (z_NI @ w_HI.T - z_NI[:, kept_S] @ refitted(w_HI, c_II, kept_S).T).square().sum()
        best = torch.linalg.lstsq(z_NI[:, kept_S], z_NI @ w_HI.T).solution
        least = (z_NI @ w_HI.T - z_NI[:, kept_S] @ best).square().sum()
        torch.testing.assert_close(left, least, rtol=1e-4, atol=1e-6 * predicted[0])
        torch.testing.assert_close(float(left), predicted[count], rtol=1e-4, atol=1e-6 * predicted[0])


def test_what_calibration_saw_is_what_the_model_did(model: PreTrainedModel) -> None:
    layer = observed(model, WINDOWS_NL)[0]
    y_TH = torch.zeros_like(layer.tokens.x_TH)
    for expert in range(E):
        for tokens_N, x_NH, gate_N in layer.tokens.routed(expert):
            y_TH.index_add_(0, tokens_N, layer.output(expert, x_NH) * gate_N[:, None])
    with torch.no_grad():
        torch.testing.assert_close(model.model.layers[0].mlp(layer.tokens.x_TH[None])[0], y_TH, rtol=1e-4, atol=1e-5)
