"""Latent experts in every family and form: the same function on all backends, through saving, loading and expanding."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel
from transformers.utils import logging as transformers_logging

from molae_compress.adapters import find_experts
from molae_compress.errors import ModelError
from molae_compress.layouts import dense_experts
from molae_compress.modeling import LatentExperts, MolaeConfig, attach_, bases, expand_, to_dense
from molae_compress.modeling.bases import Basis
from molae_compress.modeling.quantizer import register
from molae_compress.modeling.routed import make_route
from molae_compress.tensors import (
    PIVOT_DTYPE,
    AnyShape,
    BankedShape,
    DenseExperts,
    ExpertsSpec,
    LatentShape,
    shape_from_dict,
)
from tests.tiny import EXPERTS, FAMILIES, HIDDEN, TOP_K, tiny_ids, tiny_model

transformers_logging.disable_progress_bar()

SHAPES = {
    "layer": LatentShape("layer", 16, 16, EXPERTS, EXPERTS),
    "interpolative": LatentShape("grouped", 12, 20, 2, 1, storage="interpolative"),
    "orthonormal": LatentShape("grouped", 20, 12, 4, 2),
    "one group a side": LatentShape("grouped", 12, 20, EXPERTS, EXPERTS, storage="interpolative"),
    "separate": LatentShape("grouped", 12, 16, 2, EXPERTS, gate_up="separate"),
    "dense down": LatentShape("grouped", 16, None, 1, 1, gate_up="separate", storage="interpolative"),
    "odd ranks": LatentShape("grouped", 7, 9, 2, 2),
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
BACKENDS = ("eager", "batched_mm", "grouped_mm", "molae")


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest) -> AnyShape:
    return request.param


def random_latent(spec: ExpertsSpec, shape: AnyShape, seed: int = 0) -> dict[str, Tensor]:
    """Latent tensors large enough for every one of them to matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for bank in shape.banks(spec):
        for name, size in bank.shape.tensors(bank.spec).items():
            if name.endswith(".pivots"):
                rank = bank.shape.rank_out if name.startswith("decode") else bank.shape.rank_in
                assert rank is not None
                columns = [torch.randperm(HIDDEN, generator=generator)[:rank] for _ in range(size[0] // rank)]
                value = torch.cat([chosen.sort().values for chosen in columns]).to(torch.int32)
            else:
                value = torch.randn(size, generator=generator) * 0.3
            tensors[f"{bank.prefix}{name}"] = value
    return tensors


def attach_all_(model: PreTrainedModel, shape: AnyShape, specs: list[ExpertsSpec] | None = None) -> PreTrainedModel:
    specs = find_experts(model) if specs is None else specs
    return attach_(model, {spec.name: (shape, random_latent(spec, shape, spec.layer)) for spec in specs})


def some_latent(family: str, shape: AnyShape) -> LatentExperts:
    model = tiny_model(family)
    spec = find_experts(model)[-1]
    latent = LatentExperts.from_stock(model.get_submodule(spec.name), spec, shape)
    latent.load_latent_(random_latent(spec, shape))
    return latent


def some_routing(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Eleven tokens over six of the experts: two have none."""
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(11, HIDDEN, generator=generator)
    index_TK = torch.stack([torch.randperm(EXPERTS - 2, generator=generator)[:TOP_K] for _ in range(11)])
    return x_TH.to(dtype), index_TK, torch.rand(11, TOP_K, generator=generator).to(dtype)


def dense_reference(dense: DenseExperts, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Token by token, expert by expert, in fp64."""
    y_TH = torch.zeros_like(x_TH, dtype=torch.float64)
    for t, k in ((t, k) for t in range(index_TK.shape[0]) for k in range(index_TK.shape[1])):
        e = int(index_TK[t, k])
        out_H = dense.intermediate(e, x_TH[t].double()) @ dense.w_out_EHI[e].double().T
        out_H = out_H + (0 if dense.bias_out_EH is None else dense.bias_out_EH[e].double())
        y_TH[t] += weight_TK[t, k].double() * out_H
    return y_TH


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(tiny_ids()).logits


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Loads and asserts that every tensor of file and model met its counterpart."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return realigned_(model) if not hasattr(model, "hf_device_map") else model


def realigned_(model: PreTrainedModel) -> PreTrainedModel:
    """Moves mapped weights to fresh memory: how matrix products round depends on the alignment of their operands."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def saved(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# ---------------------------------------------------------------- the function


def test_backends_agree_with_the_dense_experts_they_stand_for(family: str, shape: AnyShape) -> None:
    latent = some_latent(family, shape)
    routing = some_routing()
    expected = dense_reference(to_dense(latent), *routing)
    for backend in (*BACKENDS, "sonicmoe") if shape != SHAPES["layer"] else BACKENDS:
        latent.config._experts_implementation = backend
        torch.testing.assert_close(latent(*routing).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_module_made_on_meta_takes_tensors_where_they_are(shape: AnyShape) -> None:
    expected = some_latent("gpt_oss", shape)
    stock = tiny_model("gpt_oss").to("meta").model.layers[-1].mlp.experts
    latent = LatentExperts.from_stock(stock, expected.spec, shape)
    assert all(tensor.is_meta for tensor in latent.state_dict().values())
    latent.load_latent_(expected.latent_tensors())
    assert torch.equal(latent(*some_routing()), expected(*some_routing()))


def test_full_rank_identity_basis_changes_nothing(family: str) -> None:
    for name in ("layer", "orthonormal", "all columns"):
        model = tiny_model(family)
        expected = logits(model)
        specs = find_experts(model)
        modules = {}
        for spec in specs:
            dense = dense_experts(model, spec)
            form = SHAPES[name]
            full = LatentShape(form.form, HIDDEN, HIDDEN, form.input_group, form.output_group, storage=form.storage)
            modules[spec.name] = (full, identity_latent(dense, full))
        attach_(model, modules)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def identity_latent(dense: DenseExperts, shape: AnyShape) -> dict[str, Tensor]:
    """Latent tensors of dense weights when every basis is the identity."""
    values = {}
    for name, size in shape.tensors(dense.spec).items():
        if name.endswith(".pivots"):
            values[name] = torch.arange(HIDDEN, dtype=torch.int32).repeat(size[0] // HIDDEN)
        elif name.endswith(".weight"):
            values[name] = torch.eye(HIDDEN).repeat(size[0] // HIDDEN, 1)[:, : size[1]]
        elif name == "core.gate_up":
            values[name] = dense.w_in_EJH.transpose(1, 2).reshape(size)
        elif name == "core.down":
            values[name] = dense.w_out_EHI.reshape(size)
        elif name in ("core.bias", "core.gate_up_proj_bias"):
            values[name] = dense.bias_in_EJ
        elif name == "decode_bias":
            values[name] = dense.bias_out_EH
        else:
            stack = dense.w_in_EJH if "gate_up" in name else dense.w_out_EHI
            values[name] = stack.transpose(1, 2) if dense.spec.is_transposed else stack
    return values


def test_gradients_reach_every_latent_parameter(shape: AnyShape) -> None:
    for family, dtype in (("qwen3_moe", torch.float32), ("gpt_oss", torch.float32), ("gpt_oss", torch.bfloat16)):
        model = attach_all_(tiny_model(family, dtype), shape).train()
        model(tiny_ids(), labels=tiny_ids()).loss.backward()
        for name, parameter in model.named_parameters():
            if ".experts." in name and parameter.numel():
                assert parameter.grad is not None, name
                assert parameter.grad.abs().sum() > 0, name


def test_bf16_runs_on_every_backend_and_keeps_its_type(shape: AnyShape) -> None:
    latent = some_latent("gpt_oss", shape).to(torch.bfloat16)
    x_TH, index_TK, weight_TK = some_routing(torch.bfloat16)
    for backend in BACKENDS:
        latent.config._experts_implementation = backend
        y_TH = latent(x_TH, index_TK, weight_TK.float())  # several routers hand out fp32 weights
        assert y_TH.dtype == torch.bfloat16
        expected = dense_reference(to_dense(latent), x_TH, index_TK, weight_TK)
        assert (y_TH.double() - expected).norm() < 0.03 * expected.norm()


def test_gradients_are_those_of_the_dense_experts_they_stand_for(shape: AnyShape) -> None:
    latent, (x_TH, index_TK, weight_TK) = some_latent("gpt_oss", shape), some_routing()
    inputs = (x_TH.requires_grad_(), weight_TK.requires_grad_())
    y_TH = dense_reference(to_dense(latent), x_TH, index_TK, weight_TK)
    expected = torch.autograd.grad(y_TH.square().sum(), inputs)
    for backend in BACKENDS:
        latent.config._experts_implementation = backend
        found = torch.autograd.grad(latent(x_TH, index_TK, weight_TK).square().sum(), inputs)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["layer", "interpolative", "one group a side", "separate", "banks"])
def test_the_moe_block_compiles_to_one_graph(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach_all_(tiny_model("gpt_oss"), SHAPES[name]).save_pretrained(tmp_path)
    model = load(tmp_path)
    monkeypatch.delattr(Basis, "_derive_rest")  # not a part of the graph: it was done while loading
    block = model.model.layers[0].mlp
    x = torch.randn(1, 6, HIDDEN)
    for backend in ("grouped_mm", "batched_mm", "molae"):
        model.set_experts_implementation(backend)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x)[0], block(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strangers_of_a_bank_leave_no_trace_where_they_keep_their_rows(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a compiled graph: kernels leave rows of strangers as they find them, here NaN, forward and backward."""

    def result() -> tuple[Tensor, ...]:
        latent = some_latent("gpt_oss", SHAPES["banks"]).to(dtype)
        latent.config._experts_implementation = backend
        x_TH, index_TK, weight_TK = some_routing(dtype)
        y_TH = latent(x_TH.requires_grad_(), index_TK, weight_TK.requires_grad_())
        leaves = [x_TH, weight_TK, *latent.parameters()]
        return (y_TH, *torch.autograd.grad(y_TH.square().sum(), leaves))

    expected = result()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for _ in range(5):
        for size in (64, 512, 4096, 32768):
            torch.full((size,), torch.nan, dtype=dtype)  # freed at once: what the next tensors may find
        for found, wanted in zip(result(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def test_derived_columns_follow_the_pivots_wherever_they_change() -> None:
    latent = some_latent("qwen3_moe", SHAPES["interpolative"])
    before = latent(*some_routing())
    other = random_latent(latent.spec, latent.shape, seed=5)
    latent.load_state_dict(other)  # written in place
    fresh = some_latent("qwen3_moe", latent.shape)
    fresh.load_latent_(other)
    assert torch.equal(latent(*some_routing()), fresh(*some_routing()))
    assert not torch.equal(latent(*some_routing()), before)
    assert torch.equal(copy.deepcopy(latent)(*some_routing()), latent(*some_routing()))


# ---------------------------------------------------------------- saving and loading


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of mapped files")
def test_a_model_of_another_type_than_its_file_lets_go_of_it(tmp_path: Path) -> None:
    attach_all_(tiny_model("qwen3_moe"), SHAPES["banks"]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    model = model.to(torch.bfloat16)
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_round_trip_is_exact(family: str, shape: AnyShape, tmp_path: Path) -> None:
    model = attach_all_(tiny_model(family), shape)
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    assert torch.equal(logits(again), expected)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (family == "qwen3_moe")
    again.save_pretrained(tmp_path / "second")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    entries = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    assert entries["quant_method"] == "molae"
    assert {shape_from_dict(e, name=n) for n, e in entries["modules"].items()} == {shape}
    spec = find_experts(tiny_model(family))[-1]
    stored = {k.removeprefix(f"{on_disk(family, spec.name)}.") for k in saved(tmp_path / "first") if ".experts." in k}
    assert {name for name in stored if "layers" not in name} == set(shape.tensors(spec))


def on_disk(family: str, name: str) -> str:
    """Mixtral's hub format calls the block differently, of latent experts too."""
    return name.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_compressed_and_original_layers_share_a_bf16_checkpoint(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, torch.bfloat16)
    attach_all_(model, SHAPES["interpolative"], find_experts(model)[1:])
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    wider = load(tmp_path, dtype=torch.float32)
    held = wider.model.layers[-1].mlp.experts.encode
    assert (held.weight.dtype, held.pivots.dtype) == (torch.float32, torch.int32)


@pytest.mark.parametrize("name", ["layer", "interpolative", "separate", "dense down", "banks"])
@pytest.mark.parametrize("buffers", [False, True])
def test_offloaded_to_disk(name: str, buffers: bool, tmp_path: Path) -> None:
    model = attach_all_(tiny_model("gpt_oss"), SHAPES[name])
    model.save_pretrained(tmp_path / "model")
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head")
    device_map = dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}
    folder = tmp_path / "offload"
    again = load(tmp_path / "model", device_map=device_map, offload_folder=folder, offload_buffers=buffers)
    assert name in ("layer", "banks") or again.model.layers[1].mlp.experts.core.down.is_meta
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="not in memory"):
        expand_(again)


def test_device_map_auto(shape: AnyShape, tmp_path: Path) -> None:
    model = attach_all_(tiny_model("gpt_oss"), shape)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(realigned_(load(tmp_path, device_map="auto"))), logits(model))


def test_what_is_not_stored_is_set_after_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave_garbage(self: PreTrainedModel, module: nn.Module) -> None:
        if isinstance(bias := getattr(module, "down_proj_bias", None), Tensor):
            bias.data.fill_(torch.nan)

    model = attach_all_(tiny_model("gpt_oss"), SHAPES["layer"])
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(GptOssPreTrainedModel, "_init_weights", leave_garbage)
    experts = load(tmp_path).model.layers[0].mlp.experts
    assert experts.core.down_proj_bias.shape == (EXPERTS, 16)
    assert not experts.core.down_proj_bias.any()


def test_generate_with_cache_equals_without(family: str) -> None:
    model = attach_all_(tiny_model(family), SHAPES["interpolative"])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = tiny_ids(batch=1)
    assert torch.equal(model.generate(ids, use_cache=True, **options), model.generate(ids, use_cache=False, **options))


def test_loads_without_the_head_and_back_with_it(tmp_path: Path) -> None:
    model = attach_all_(tiny_model("olmoe"), SHAPES["interpolative"])
    model.save_pretrained(tmp_path / "lm")
    body, info = AutoModel.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not info["missing_keys"]
    realigned_(body)
    with torch.no_grad():
        assert torch.equal(body(tiny_ids()).last_hidden_state, model.model(tiny_ids()).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    with_head = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert torch.equal(with_head.model.layers[1].mlp.experts.core.down, model.model.layers[1].mlp.experts.core.down)


def test_a_loaded_model_is_as_free_as_any_other(tmp_path: Path) -> None:
    attach_all_(tiny_model("mixtral"), SHAPES["orthonormal"]).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.hf_quantizer.is_serializable()
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    assert model.hf_quantizer.is_compileable
    assert not [key for plan in (model.tp_plan, model.ep_plan) for key in plan if ".experts" in key]
    assert logits(model.half().float()).isfinite().all()


def test_the_trainer_fine_tunes_a_loaded_model_in_full(tmp_path: Path) -> None:
    attach_all_(tiny_model("qwen2_moe"), SHAPES["interpolative"]).save_pretrained(tmp_path)
    model = load(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.model.layers[0].mlp.experts.latent_tensors().items()}
    arguments = TrainingArguments(tmp_path / "run", max_steps=1, learning_rate=0.1, use_cpu=True, report_to=[])
    Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in tiny_ids()]).train()
    for name, tensor in model.model.layers[0].mlp.experts.latent_tensors().items():
        assert torch.equal(tensor, before[name]) == name.endswith(".pivots")


# ---------------------------------------------------------------- expanding

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        torch.save(model(torch.load(folder + "/ids.pt")).logits, folder + "/logits.pt")
assert not any(name.startswith("molae_compress") for name in sys.modules)
"""


def test_expanded_models_load_without_the_package(tmp_path: Path) -> None:
    expected = {}
    for family in FAMILIES:
        for name in ("layer", "interpolative", "separate"):
            folder = tmp_path / f"{family} {name}"
            latent = attach_all_(tiny_model(family), SHAPES[name])
            latent.save_pretrained(folder / "latent")
            model = load(folder / "latent") if name == "interpolative" else latent
            expected[folder] = logits(model)
            assert expand_(model) is model
            assert find_experts(model)  # stock again
            model.save_pretrained(folder)
            original = tiny_model(family)
            original.save_pretrained(tmp_path / "original")
            assert saved(folder).keys() == saved(tmp_path / "original").keys()
            torch.save(tiny_ids(), folder / "ids.pt")
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, expected)], check=True)
    for folder, value in expected.items():
        torch.testing.assert_close(torch.load(folder / "logits.pt"), value, rtol=1e-4, atol=1e-5)


def test_dequantize_is_expand(tmp_path: Path) -> None:
    attach_all_(tiny_model("olmoe"), SHAPES["orthonormal"]).save_pretrained(tmp_path)
    model = load(tmp_path)
    expected = logits(model)
    model.dequantize()
    assert len(find_experts(model)) == 2
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- refusals


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_loading_refuses_what_does_not_belong_together(checkpoint: Any, tmp_path: Path) -> None:
    shape = SHAPES["orthonormal"]
    attach_all_(tiny_model("olmoe"), shape).save_pretrained(tmp_path)
    good = {f"model.layers.{i}.mlp.experts": shape.to_dict() for i in range(2)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"modules": good | {"model.layers.7.mlp.experts": shape.to_dict()}}, "model.layers.7.mlp.experts"),
        ({"modules": good | {"model.layers.0.self_attn": shape.to_dict()}}, "self_attn"),
        ({"modules": {"model.layers.0.mlp.experts": {"rank": 3}}}, "rank"),
        ({"modules": {"model.layers.0.mlp.experts": shape.to_dict() | {"input_group": 3}}}, "input_group is 3"),
        ({"modules": good, "format": 2, "version": "9.9"}, "format 2.*9.9"),
        ({"modules": good, "format": 1, "flavour": "x"}, "flavour"),
    ]
    for changes, message in cases:
        edit_config(tmp_path, **changes)
        with pytest.raises(ModelError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not compressed"):
        AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"), quantization_config=MolaeConfig({}))


def test_loading_refuses_a_checkpoint_without_the_latent_tensors(checkpoint: Any, own_checkpoint: Any) -> None:
    folder = own_checkpoint("olmoe")
    config = json.loads((folder / "config.json").read_text())
    entry = {"model.layers.0.mlp.experts": SHAPES["orthonormal"].to_dict()}
    config["quantization_config"] = MolaeConfig(entry).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts\.encode\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_attach_checks_everything_before_it_touches_the_model() -> None:
    model = tiny_model("olmoe")
    first, second = find_experts(model)
    shape = SHAPES["interpolative"]
    good = (shape, random_latent(first, shape))
    pivots = good[1] | {"encode.pivots": good[1]["encode.pivots"].flip(0)}
    bad_values = {
        "encode.weight": (shape, {k: v for k, v in good[1].items() if k != "encode.weight"}),
        "core.down": (shape, good[1] | {"core.down": torch.zeros(1)}),
        "do not ascend": (shape, pivots),
        "rank_in is 99": (LatentShape("grouped", 99, 12, 2, 2), good[1]),
        "layer form has": (LatentShape("layer", 8, 16, EXPERTS, EXPERTS), good[1]),
        "layer form: 12": (LatentShape("layer", 12, 12, EXPERTS, EXPERTS), good[1]),
        "form is 'ragged'": (LatentShape("ragged", 12, 16, EXPERTS, EXPERTS), good[1]),  # type: ignore[arg-type]
    }
    for message, bad in bad_values.items():
        with pytest.raises(ModelError, match=message):
            attach_(model, {first.name: good, second.name: bad})
    with pytest.raises(ModelError, match="no routed experts at 'nowhere'"):
        attach_(model, {first.name: good, "nowhere": good})
    assert len(find_experts(model)) == 2
    attach_(model, {first.name: good})
    attach_(model, {second.name: good})
    assert list(model.config.quantization_config.modules) == [first.name, second.name]
    with pytest.raises(ModelError, match="compressed already"):
        find_experts(model)
    with pytest.raises(ModelError, match="nothing to expand"):
        expand_(tiny_model("olmoe"))


def test_registering_twice_does_no_harm() -> None:
    register()


def test_the_stock_module_leaves_nothing_large_behind() -> None:
    latent = some_latent("gpt_oss", SHAPES["interpolative"])
    assert not any(True for _ in latent.stock().parameters())
    names = {name for name, module in latent.named_modules() if not isinstance(module, LatentExperts)}
    assert names == {"encode", "core", "decode"}
    assert not any(isinstance(module, nn.Linear) for module in latent.modules())


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("experts_per_group", [1, 2])
def test_many_rows_take_their_columns_group_by_group(
    decode: bool, experts_per_group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers and gradients as by an index for every row; the last expert gets no token."""
    experts, rank, hidden = 6, 5, 12
    groups = experts // experts_per_group
    basis = Basis(
        groups,
        experts_per_group,
        rank,
        hidden,
        "interpolative",
        decode=decode,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    torch.nn.init.normal_(basis.weight)
    columns = [torch.randperm(hidden)[:rank].sort().values for _ in range(groups)]
    basis.pivots = torch.cat(columns).to(PIVOT_DTYPE)
    route = make_route(torch.randint(experts - 1, (100, 2)), experts, "grouped_mm")
    x_SW = torch.randn(200, rank if decode else hidden, dtype=torch.float64, requires_grad=True)

    def answer(rows: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(bases, "_ROWS", rows)
        assert (basis._groups_of(x_SW, route)[1] is not None) == (rows == 1)
        y_SW = basis(x_SW, route)
        return y_SW, *torch.autograd.grad(y_SW.square().sum(), (x_SW, basis.weight))

    for looped, indexed in zip(answer(1), answer(1000), strict=True):
        torch.testing.assert_close(looped, indexed, rtol=0, atol=0)
