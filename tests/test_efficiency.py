"""What is claimed of operations and of memory in training, against what torch counts on tiny models of every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import molae_compress as molae
from molae_compress.efficiency import cost, paper_shapes
from molae_compress.layouts import describe_in
from molae_compress.modeling.bases import Basis
from molae_compress.modeling.latent import LatentExperts
from molae_compress.operations import backward_operations, kept_bytes, operations, sent_numbers
from molae_compress.tensors import AnyShape, BankedShape, ExpertsSpec, LatentShape
from tests.tiny import sizes

FORMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "layer": {"profile": "serving", "rank": 8},
    "grouped": {"rank": 8},
    "orthonormal": {"rank": 8, "storage": "orthonormal", "experts_per_input_group": 2},
    "shared": {"rank": 8, "experts_per_input_group": "all", "experts_per_output_group": "all"},
    "apart": {"rank": 8, "gate_up": "separate", "storage": "interpolative"},
    "paper": {"method": "paper", "rank": 8},
}
TOKENS = 64
forms = pytest.mark.parametrize("form", FORMS)


def experts(family: str, form: str) -> tuple[PreTrainedModel, nn.Module, ExpertsSpec, AnyShape | None]:
    asked = FORMS[form]
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes(family)))
    model = stock if asked is None else molae.from_config(family, molae=asked, seed=0, **sizes(family))
    name = next(name for name, _ in stock.named_modules() if name.endswith(".experts"))
    module = model.get_submodule(name)
    return model, module, describe_in(stock, name), module.shape if isinstance(module, LatentExperts) else None


def kept_by(module: nn.Module, spec: ExpertsSpec) -> int:
    """Bytes that autograd keeps of a forward pass, besides weights and vectors of indices, one a slot."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    weights |= {
        basis._rest_GC().data_ptr() for basis in module.modules() if isinstance(basis, Basis) and basis.pivots is not None
    }
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and (tensor.is_floating_point() or tensor.dim() > 1):
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(module, spec)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def call(module: nn.Module, spec: ExpertsSpec) -> Tensor:
    """The module on random tokens, each routed to different experts, all experts alike busy."""
    x_TH = torch.randn(TOKENS, spec.hidden, requires_grad=True) * 1.0
    index_TK = (torch.arange(TOKENS)[:, None] + torch.arange(spec.top_k) * 3) % spec.num_experts
    weight_TK = torch.rand(TOKENS, spec.top_k, requires_grad=True) * 1.0
    return module(x_TH, index_TK, weight_TK)


@forms
def test_operations_are_those_that_torch_counts(family: str, form: str) -> None:
    model, module, spec, shape = experts(family, form)
    model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as forward:
        y_TH = call(module, spec)
    with FlopCounterMode(display=False) as backward:
        y_TH.sum().backward()
    # output biases of latent experts are a product with the routing weights, which is left out of the figures
    biases = 2 * spec.num_experts * spec.hidden if spec.has_bias and shape is not None else 0
    assert forward.get_total_flops() == TOKENS * (operations(spec, shape) + biases)
    assert backward.get_total_flops() == TOKENS * (backward_operations(spec, shape) + 2 * biases)


@forms
def test_bytes_kept_for_the_backward_pass_are_those_that_autograd_keeps(family: str, form: str) -> None:
    model, module, spec, shape = experts(family, form)
    model.set_experts_implementation("grouped_mm")
    found = kept_by(module, spec)
    claimed = TOKENS * kept_bytes(spec, shape, torch.float32)
    if family == "gpt_oss":  # clamps, and biases by way of the routing weights
        assert claimed < found < 1.8 * claimed
    else:
        assert found == pytest.approx(claimed, rel=0.02)


def test_banks_keep_no_more_than_their_slots() -> None:
    """Not rows of zeros for slots of other banks, nor the columns of a basis for every slot."""
    model, _, spec, _ = experts("qwen3_moe", "grouped")
    parts = [LatentShape("grouped", rank, rank, group, 1, storage="interpolative") for rank, group in ((8, 1), (16, 2))]
    shape = BankedShape(((0, 1, 2, 5), (3, 4, 6, 7)), tuple(parts))
    module = LatentExperts.from_stock(
        AutoModelForCausalLM.from_config(model.config).model.layers[-1].mlp.experts, spec, shape
    )
    for tensor in module.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    for basis in (one for one in module.modules() if isinstance(one, Basis)):
        assert basis.pivots is not None
        basis.pivots.copy_(torch.arange(basis.rank).repeat(basis.groups))
    claimed = TOKENS * kept_bytes(spec, shape, torch.float32)
    assert claimed < 1.2 * TOKENS * kept_bytes(spec, None, torch.float32)
    # besides, masks of the slots of each bank: a few bytes each
    assert claimed <= kept_by(module, spec) < 1.02 * claimed


def test_bytes_of_training_are_those_of_trainer(tmp_path: Any) -> None:
    """Weights, gradients and the moments of AdamW, number by number."""
    for form in ("layer", "grouped", "paper"):
        _, module, spec, shape = experts("qwen3_moe", form)
        optimizer = torch.optim.AdamW(module.parameters())
        call(module, spec).sum().backward()
        optimizer.step()
        tensors = [*module.state_dict().values(), *(parameter.grad for parameter in module.parameters())]
        moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
        assert all(parameter.grad is not None for parameter in module.parameters())
        found = sum(tensor.nbytes for tensor in (*tensors, *moments))
        assert cost("x", [spec], {spec.name: shape}, {spec.name: torch.float32}).training_bytes == found


def test_numbers_sent_between_devices() -> None:
    spec = ExpertsSpec("experts", 0, 8, 64, 32, top_k=2)

    def sent(shape: AnyShape | None) -> int:
        return sent_numbers(spec, shape)

    assert sent(None) == 2 * 2 * 64
    assert sent(LatentShape("layer", 16, 16, 8, 8)) == 2 * (16 + 16)
    assert sent(LatentShape("grouped", 16, 8, 1, 1)) == sent(None)  # every expert has bases of its own, which go with it
    assert sent(LatentShape("grouped", 16, 8, 8, 1)) == 2 * (16 + 64)
    assert sent(LatentShape("grouped", 16, 8, 8, 8, gate_up="separate")) == 2 * (2 * 16 + 8)
    assert sent(LatentShape("grouped", 48, None, 8, 1, gate_up="separate")) == 2 * (64 + 64)  # two rows would be longer
    part = LatentShape("grouped", 16, 8, 4, 1)
    assert sent(BankedShape((tuple(range(4)), tuple(range(4, 8))), (part, part))) == 2 * (16 + 64)


def test_the_paper_s_form_beside_a_plan_has_no_more_parameters() -> None:
    specs = [ExpertsSpec(f"layers.{n}.experts", n, 8, 64, 48, top_k=2) for n in range(2)]
    dense = sum(spec.dense_numel for spec in specs)
    for keep in (0.5, 0.7, 0.9):
        shapes = paper_shapes(specs, int(keep * dense))
        assert shapes is not None
        numbers = sum(shape.numel(spec) for spec in specs if (shape := shapes[spec.name]) is not None)
        assert 0.93 * keep * dense <= numbers <= keep * dense
        assert all(shape.rank_out is None and shape.gate_up == "separate" for shape in shapes.values())
    assert paper_shapes(specs, int(0.3 * dense)) is None  # its second projection alone is a third


def test_a_plan_shows_all_three(checkpoint: Any) -> None:
    recipe = {"molae": 1, "model": str(checkpoint("qwen3_moe")), "basis": {"profile": "serving"}, "budget": {"keep": 0.6}}
    plan = molae.plan(recipe)
    assert [found.form for found in plan.costs] == ["dense", "paper", "planned"]
    dense, paper, planned = plan.costs
    assert (dense.parameters, planned.parameters) == (plan.dense_parameters, plan.parameters)
    assert planned.forward_flops == plan.per_token()["flops"]
    assert planned.traffic_bytes < paper.traffic_bytes == dense.traffic_bytes
    shown = str(plan)
    assert "paper's form" in shown
    assert f"{dense.backward_flops:,}" in shown
    assert plan.to_dict()["costs"][2]["activation_bytes"] == planned.activation_bytes
