"""Routed experts are found by structure, described exactly, and refused loudly where the structure is unknown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from molae_compress.adapters import find_experts, layers_with_experts, unproven_experts
from molae_compress.errors import ModelError
from molae_compress.layouts import dense_experts, layout_of, weight_names
from molae_compress.tensors import ExpertsSpec
from tests.tiny import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, tiny_ids, tiny_model


def expected_specs(family: str) -> list[ExpertsSpec]:
    odd = {"has_bias": True, "is_transposed": True, "interleaved": True} if family == "gpt_oss" else {}
    layers = (1, 2) if family == "deepseek_v3" else (0, 1)
    return [
        ExpertsSpec(f"model.layers.{i}.mlp.experts", i, EXPERTS, HIDDEN, INTERMEDIATE, top_k=TOP_K, **odd) for i in layers
    ]


def on_meta(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_model(family).config)


def test_families_are_described_alike_live_and_on_meta(family: str) -> None:
    model = tiny_model(family)
    assert find_experts(model) == find_experts(on_meta(family)) == expected_specs(family)
    with torch.inference_mode():
        assert find_experts(model) == expected_specs(family)
    paths = layers_with_experts(model).paths
    assert paths == tuple(f"model.layers.{number}" for number in range(len(model.model.layers)))


def test_dense_weights_compute_what_the_module_computes(family: str) -> None:
    model = tiny_model(family)
    spec = find_experts(model)[0]
    experts = model.get_submodule(spec.name)
    dense = dense_experts(model, spec)
    assert dense.w_in_EJH.shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    assert dense.w_out_EHI.shape == (EXPERTS, HIDDEN, INTERMEDIATE)
    assert dense.w_in_EJH.data_ptr() == experts.gate_up_proj.data_ptr()  # a view
    x_TH = torch.randn(6, HIDDEN)
    for e in range(EXPERTS):
        with torch.no_grad():
            expected = experts(x_TH, torch.full((6, 1), e), torch.ones(6, 1))
        y_TH = dense.intermediate(e, x_TH) @ dense.w_out_EHI[e].T
        y_TH = y_TH if dense.bias_out_EH is None else y_TH + dense.bias_out_EH[e]
        torch.testing.assert_close(y_TH, expected)


def test_channel_of_row_is_what_the_activation_reads(family: str) -> None:
    model = tiny_model(family)
    spec = find_experts(model)[0]
    activate = dense_experts(model, spec).activate
    h_J = torch.full((spec.rows,), 0.1)
    for row, channel in enumerate(spec.channel_of_row().tolist()):
        moved_J = h_J.clone()
        moved_J[row] += 0.1
        assert (activate(moved_J[None]) - activate(h_J[None]))[0].nonzero().tolist() == [[channel]]


def test_weights_from_disk_serve_a_module_on_meta(family: str) -> None:
    model, skeleton = tiny_model(family), on_meta(family)
    spec = find_experts(skeleton)[0]
    live, empty = model.get_submodule(spec.name), skeleton.get_submodule(spec.name)
    weights = {name: parameter.detach() for name, parameter in live.named_parameters()}
    dense, reference = dense_experts(skeleton, spec, weights), dense_experts(model, spec)
    x_NH = torch.randn(3, HIDDEN)
    assert torch.equal(dense.intermediate(1, x_NH), reference.intermediate(1, x_NH))
    with pytest.raises(ModelError, match=r"experts\.down_proj' are not in memory"):
        dense_experts(skeleton, spec, {k: v for k, v in weights.items() if k != "down_proj"})
    with pytest.raises(ModelError, match="gate_up_proj' are not in memory"):
        dense_experts(skeleton, spec)
    with pytest.raises(ModelError, match=r"\(3, 4, 5\)"):
        dense_experts(skeleton, spec, weights | {"gate_up_proj": torch.zeros(3, 4, 5)})
    layout = layout_of(spec.name, empty)
    assert layout is not None
    layout.store_(empty, dense)
    assert {name: tuple(p.shape) for name, p in empty.named_parameters()} == {
        name: tuple(p.shape) for name, p in live.named_parameters()
    }
    assert all(torch.equal(getattr(empty, name), getattr(live, name)) for name in weights)


def test_the_activation_keeps_no_weights_alive(family: str) -> None:
    model = tiny_model(family)
    spec = find_experts(model)[0]
    owner: Any = dense_experts(model, spec).activate.__self__  # type: ignore[attr-defined]
    assert not list(owner.parameters())
    assert len(list(model.get_submodule(spec.name).parameters())) == len(weight_names(model, spec.name))


# ---------------------------------------------------------------- refusals


class OddExperts(nn.Module):
    """Fused experts that no decorator marks."""

    def __init__(self) -> None:
        super().__init__()
        self.w13 = nn.Parameter(torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN))
        self.w2 = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE))


class Mixture(nn.Module):
    """Stacked matrices under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(EXPERTS, 4, HIDDEN))
        self.b = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, 4))


class SharedStack(nn.Module):
    """Shared experts kept as stacks, one matrix each for gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Parameter(torch.zeros(2, HIDDEN, HIDDEN)) for _ in range(3))


def test_a_dense_model_is_refused_with_what_was_looked_at() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="No routed experts were found in LlamaForCausalLM") as refusal:
        find_experts(model)
    assert "named after experts: none" in str(refusal.value)
    model.model.expert_gate = nn.Linear(4, 4)
    with pytest.raises(ModelError, match=r"'model\.expert_gate' \(Linear\)"):
        layers_with_experts(model)


@pytest.mark.parametrize(
    ("attribute", "stranger"),
    [("experts", nn.ModuleList([nn.Linear(4, 4)])), ("ffn", OddExperts()), ("ffn", Mixture())],
    ids=["a list of experts", "named by its class", "stacked matrices"],
)
def test_experts_beside_those_understood_are_never_skipped(attribute: str, stranger: nn.Module) -> None:
    model = tiny_model("olmoe")
    model.model.layers[1].add_module(attribute, stranger)
    with pytest.raises(ModelError, match=rf"'model\.layers\.1\.{attribute}' \({type(stranger).__name__}\)"):
        find_experts(model)


def test_shared_experts_are_left_alone() -> None:
    model = tiny_model("olmoe")
    model.model.layers[0].add_module("shared_experts", OddExperts())
    model.model.layers[1].add_module("ffn", SharedStack())
    assert find_experts(model) == expected_specs("olmoe")


class MLP(nn.Module):
    """A plain MLP; beside a norm, where it has one, it is no such thing."""

    def __init__(self, width: int = 8, norm: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN)
        if norm:
            self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class TokenRouter(nn.Module):
    """Holds a bare matrix."""

    def __init__(self, choices: int) -> None:
        super().__init__()
        self.centroids = nn.Parameter(torch.zeros(choices, HIDDEN))


def with_block(**modules: nn.Module | nn.Parameter) -> PreTrainedModel:
    """The second layer's block holds these modules instead."""
    model = tiny_model("olmoe")
    model.model.layers[1].mlp = block = nn.Module()
    for name, module in modules.items():
        setattr(block, name, module)
    return model


def mlps(count: int = 3, **options: Any) -> nn.ModuleList:
    return nn.ModuleList([MLP(**options) for _ in range(count)])


@pytest.mark.parametrize(
    "router",
    [
        {"gate": nn.Linear(HIDDEN, 3)},
        {"wg": nn.Linear(HIDDEN, 3, bias=False)},
        {"gate": nn.Sequential(nn.Linear(HIDDEN, 8), nn.Linear(8, 3))},
        {"chooses": TokenRouter(3)},
        {"gate": nn.Identity()},
        {"centroids": nn.Parameter(torch.zeros(3, HIDDEN))},
    ],
)
def test_alike_mlps_beside_a_router_are_experts_whatever_they_are_called(router: dict[str, Any]) -> None:
    for experts in (mlps(), nn.ModuleDict({f"e{number}": MLP() for number in range(3)})):
        model = with_block(**router, blocks=experts, experts=mlps())
        assert [spec.name.removeprefix("model.layers.") for spec in find_experts(model)] == [
            "0.mlp.experts",
            "1.mlp.blocks",
            "1.mlp.experts",
        ]
        assert unproven_experts(model) == ()


@pytest.mark.parametrize(
    "modules",
    [
        {"blocks": mlps()},
        {"gate": nn.Linear(HIDDEN, 4), "blocks": mlps()},
        {"gate_proj": nn.Linear(HIDDEN, HIDDEN), "blocks": mlps()},
        {"gate": nn.Linear(HIDDEN, 3), "blocks": nn.ModuleList([nn.Sequential(MLP()) for _ in range(3)])},
        {"chooses": TokenRouter(3), "blocks": nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(3)])},
    ],
)
def test_what_may_be_experts_is_named(modules: dict[str, nn.Module]) -> None:
    model = with_block(**modules)
    assert [spec.layer for spec in find_experts(model)] == [0]
    assert unproven_experts(model) == ("model.layers.1.mlp.blocks",)


@pytest.mark.parametrize(
    "modules",
    [
        {"gate": nn.Linear(HIDDEN, 3), "shared_mlps": mlps()},
        {"norms": nn.ModuleList([nn.LayerNorm(HIDDEN) for _ in range(3)])},
        {"blocks": mlps(norm=True)},
        {"blocks": nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(3)])},
        {"blocks": mlps(1)},
    ],
)
def test_other_lists_are_neither_experts_nor_named(modules: dict[str, nn.Module]) -> None:
    model = with_block(**modules)
    assert [spec.layer for spec in find_experts(model)] == [0]
    assert unproven_experts(model) == ()


def test_beside_a_router_a_list_of_more_than_mlps_is_refused() -> None:
    for blocks in (mlps(norm=True), nn.ModuleList([MLP(8), MLP(8), MLP(9)])):
        with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.blocks'.* holds experts of"):
            find_experts(with_block(gate=nn.Linear(HIDDEN, 3), blocks=blocks))


def test_a_known_flag_with_an_unknown_structure_is_refused() -> None:
    def refused(message: str, **changes: object) -> None:
        model = tiny_model("olmoe")
        experts = model.model.layers[1].mlp.experts
        for name, value in changes.items():
            setattr(experts, name, value)
        with pytest.raises(ModelError, match=rf"model\.layers\.1\.mlp\.experts.*{message}"):
            find_experts(model)

    refused("normalises the output", has_post_expert_norm=True)
    refused("split over several devices", _is_expert_parallel=True)
    refused("'extra'", extra=nn.Parameter(torch.zeros(1)))
    refused("down_proj_bias", has_bias=True)
    refused("do not fit together", is_transposed=True)
    refused("rows as they alternate", is_concatenated=False)
    refused("where stacks of matrices", down_proj=nn.Parameter(torch.zeros(4, 4)))


def test_experts_per_token_come_from_the_router_or_the_configuration() -> None:
    model = tiny_model("qwen3_moe")
    for layer in model.model.layers:
        del layer.mlp.gate.top_k
    model.config.num_experts_per_tok = 3
    assert {spec.top_k for spec in find_experts(model)} == {3}
    model.model.layers[1].mlp.experts.config = SimpleNamespace()
    with pytest.raises(ModelError, match="num_experts_per_tok"):
        find_experts(model)


def test_the_layers_of_an_encoder_come_first() -> None:
    model = tiny_model("olmoe")
    model.encoder = nn.ModuleList([tiny_model("olmoe").model.layers[0]])
    assert layers_with_experts(model).paths == ("encoder.0", "model.layers.0", "model.layers.1")


def test_saved_tiny_models_are_complete(family: str, checkpoint: Any, sharded_checkpoint: Any) -> None:
    folders: list[Path] = [checkpoint(family), sharded_checkpoint(family)]
    assert [len(list(folder.glob("*.safetensors"))) > 1 for folder in folders] == [False, True]
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            torch.testing.assert_close(model(tiny_ids()).logits, tiny_model(family)(tiny_ids()).logits)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer("Any text: äß\n").input_ids) == "Any text: äß\n"
