"""Models from scratch: scales against the dense twin, training, and the whole way to disk and back, over all families."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import molae_compress as molae
from molae_compress.cli import main
from molae_compress.errors import ModelError, RecipeError, ResumeError
from molae_compress.layouts import dense_experts, describe_in
from molae_compress.modeling.expand import to_dense
from molae_compress.modeling.initial import random_tensors
from molae_compress.modeling.latent import LatentExperts
from molae_compress.tensors import BankedShape, DenseExperts, ExpertsSpec, LatentShape
from tests.runs import distance, loaded, logits
from tests.tiny import sizes, tiny_ids, tiny_tokenizer
from tests.zoo import MODELS, NO_BASIS, NO_LAYER_FORM, zoo_config, zoo_logits

FORMS: dict[str, dict[str, Any]] = {
    "layer": {"profile": "serving", "rank": 16},
    "grouped": {"rank": 12},
    "shared": {"rank": 16, "experts_per_input_group": "all", "experts_per_output_group": 2, "storage": "orthonormal"},
    "paper": {"method": "paper", "rank": 16},
}
forms = pytest.mark.parametrize("form", FORMS)


def fresh(family: str, form: str = "grouped", **more: Any) -> PreTrainedModel:
    return molae.from_config(family, molae=FORMS[form], seed=0, **(sizes(family) | more))


def dense(family: str, **more: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes(family) | more)))


def experts(model: PreTrainedModel) -> str:
    return next(name for name, _ in model.named_modules() if name.endswith(".experts"))


def stages(found: DenseExperts, x_NH: Tensor) -> dict[str, Tensor]:
    """[E,N,...] of every expert: what is between its parts, and what comes out."""
    E = found.spec.num_experts
    rows = [x_NH @ found.w_in_EJH[e].T for e in range(E)]
    inside = [found.intermediate(e, x_NH) for e in range(E)]
    return {
        "rows": torch.stack(rows),
        "intermediate": torch.stack(inside),
        "output": torch.stack([found.output(e, z_NI) for e, z_NI in enumerate(inside)]),
    }


@forms
def test_every_activation_has_the_variance_of_the_dense_model(family: str, form: str) -> None:
    # wide enough for averages; weights of a scale at which activations and clamps are far from linear
    more = {"hidden_size": 64, "initializer_range": 0.2}
    wide = {"mixtral": "intermediate_size", "olmoe": "intermediate_size", "gpt_oss": "intermediate_size"}
    more[wide.get(family, "moe_intermediate_size")] = 96
    shape = {**FORMS[form], "rank": 32}
    latent = molae.from_config(family, molae=shape, seed=1, **(sizes(family) | more))
    stock, name = dense(family, **more), experts(latent)
    x_NH = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 2.0, 64)
    with torch.no_grad():
        expected = stages(dense_experts(stock, describe_in(stock, name)), x_NH)
        found = stages(to_dense(latent.get_submodule(name)), x_NH)
    for stage, value in expected.items():
        ratio = float(found[stage].square().mean() / value.square().mean())
        assert 0.85 < ratio < 1.18, (stage, ratio)
    # of the latent coordinates too: encoded inputs are as large as inputs, in orthonormal storage
    module = latent.get_submodule(name)
    if form in ("layer", "shared"):
        z = module.encode(x_NH).detach()
        assert 0.8 < float(z.square().mean() / x_NH.square().mean()) < 1.25


def test_the_test_of_variance_sees_a_wrong_scale() -> None:
    """The scale without the gain of the core is off by the ratio of the widths, which the bounds above do not allow."""
    spec = ExpertsSpec("experts", 0, 4, 64, 32)
    found = DenseExperts(spec, torch.randn(4, 64, 64), torch.randn(4, 64, 32), lambda h_NJ: h_NJ[:, :32])
    tensors = random_tensors(found, LatentShape("grouped", 16, 16, 4, 4))
    assert float(tensors["core.gate_up"].std()) == pytest.approx(2.0, rel=0.1)  # sqrt(64 / 16)
    product_GRH = tensors["encode.weight"] @ tensors["encode.weight"].T
    assert torch.allclose(product_GRH, torch.eye(16), atol=1e-5)
    tensors = random_tensors(found, LatentShape("grouped", 16, 16, 2, 1, storage="interpolative"))
    assert float(tensors["core.gate_up"].std()) == pytest.approx(1.0, rel=0.1)
    assert float(tensors["encode.weight"].std()) == pytest.approx(0.25, rel=0.1)


def test_banks_are_filled_like_whole_modules() -> None:
    spec = ExpertsSpec("experts", 0, 4, 64, 32, has_bias=True)
    biases = torch.randn(4, 64), torch.randn(4, 64)
    found = DenseExperts(spec, torch.randn(4, 64, 64), torch.randn(4, 64, 32), lambda h_NJ: h_NJ[:, :32], *biases)
    part = LatentShape("grouped", 16, 8, 1, 1, storage="interpolative")
    shape = BankedShape(((2, 0), (1, 3)), (part, replace(part, rank_in=24)))
    tensors = random_tensors(found, shape)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shape.tensors(spec)
    assert torch.equal(tensors["bank_0.core.bias"], biases[0][[2, 0]])
    assert torch.equal(tensors["bank_1.decode_bias"], biases[1][[1, 3]])


def test_all_but_the_experts_is_as_transformers_makes_it(family: str) -> None:
    latent, stock = fresh(family).state_dict(), dense(family).state_dict()
    common = {key for key in stock if ".experts." not in key}
    assert common == {key for key in latent if ".experts." not in key}
    assert all(torch.equal(stock[key], latent[key]) for key in common)


@forms
def test_a_model_from_scratch_lives_like_a_compressed_one(family: str, form: str, tmp_path: Path) -> None:
    model = fresh(family, form).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    molae.report_for(model).save(tmp_path / "saved")
    assert molae.verify(tmp_path / "saved").passed
    assert distance(logits(loaded(tmp_path / "saved")), expected) < 1e-6
    molae.expand(tmp_path / "saved", tmp_path / "dense")
    assert distance(logits(loaded(tmp_path / "dense")), expected) < 1e-5
    again = molae.from_config(tmp_path / "saved", seed=0)  # the form is in its config.json
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))


@forms
def test_plain_trainer_trains_every_parameter(family: str, form: str, tmp_path: Path) -> None:
    model = fresh(family, form)
    ids = tiny_ids(batch=8, length=12)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        start = float(model(input_ids=ids, labels=ids).loss)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, learning_rate=1e-2, per_device_train_batch_size=8, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) < start - 0.1
    latent = {name for name in before if ".experts." in name}
    assert latent
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in latent)


@forms
def test_transformers_never_initialises_latent_parts_again(family: str, form: str, tmp_path: Path) -> None:
    model = fresh(family, form)
    name = experts(model)
    before = {key: tensor.clone() for key, tensor in model.get_submodule(name).state_dict().items()}
    model.init_weights()
    model.resize_token_embeddings(300)
    model.init_weights()
    after = model.get_submodule(name).state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    # nor when a head is missing from the file, or embeddings of another size are asked for
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, vocab_size=280, ignore_mismatched_sizes=True)
    after = other.get_submodule(name).state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NO_BASIS])
def test_every_class_starts_from_scratch(name: str) -> None:
    import transformers

    shape = {"rank": 8} if name in NO_LAYER_FORM else {"profile": "serving", "rank": 8}
    config = zoo_config(getattr(transformers, name))
    model = molae.from_config(config, molae=shape, seed=0)
    assert any(isinstance(module, LatentExperts) for module in model.modules())
    assert bool(zoo_logits(model.eval()).isfinite().all())


def test_ranks_of_single_modules_and_layers_that_stay_dense(tmp_path: Path) -> None:
    shape = {"ranks": {"model.layers.0.mlp.experts": [8, 12], "re:.*\\.2\\..*": 4}, "keep": 0.5, "ignore": ["re:.*3.*"]}
    model = molae.from_config("qwen3_moe", molae=shape, **(sizes("qwen3_moe") | {"num_hidden_layers": 4}))
    found = [layer.mlp.experts for layer in model.model.layers]
    assert [getattr(module, "shape", None) and (module.shape.rank_in, module.shape.rank_out) for module in found] == [
        (8, 12),
        (found[1].shape.rank_in, found[1].shape.rank_out),
        (4, 4),
        None,
    ]
    assert found[1].shape.numel(found[1].spec) <= 0.5 * found[1].spec.dense_numel
    model.save_pretrained(tmp_path)
    assert distance(logits(loaded(tmp_path)), logits(model.eval())) < 1e-6


def test_the_random_numbers_are_those_of_the_seed() -> None:
    one, other = fresh("qwen3_moe"), fresh("qwen3_moe")
    state = torch.get_rng_state()
    third = molae.from_config("qwen3_moe", molae=FORMS["grouped"], seed=1, **sizes("qwen3_moe"))
    assert torch.equal(state, torch.get_rng_state())
    key = f"{experts(one)}.core.gate_up"
    assert torch.equal(one.get_parameter(key), other.get_parameter(key))
    assert not torch.equal(one.get_parameter(key), third.get_parameter(key))
    torch.manual_seed(0)
    fourth = molae.from_config("qwen3_moe", molae=FORMS["grouped"], **sizes("qwen3_moe"))
    assert torch.equal(one.get_parameter(key), fourth.get_parameter(key))


@pytest.mark.parametrize(
    ("where", "form", "values", "says"),
    [
        ("qwen3_moee", {"rank": 8}, {}, "Did you mean 'qwen3_moe'"),
        ("qwen3_moe", {"rnak": 8}, {}, "Did you mean `rank`"),
        ("qwen3_moe", {"budget": {"rank": 8}}, {}, "whole recipe"),
        ("qwen3_moe", None, {}, "it is missing"),
        ("qwen3_moe", {"rank": 8}, {"num_hiden_layers": 3}, "Did you mean 'num_hidden_layers'"),
        ("qwen3_moe", {"rank": 500}, {}, "larger"),
        ("qwen3_moe", {"ranks": {"model.layers.9.mlp.experts": 8}}, {}, "Did you mean 'model.layers"),
        ("qwen3_moe", {"ranks": {"re:.*": [8, 64]}}, {}, "larger"),
        ("qwen3_moe", {"max_kl": 0.1}, {}, "random weights"),
        ("qwen3_moe", {"banks": 2}, {}, "random weights"),
        ("qwen3_moe", {"molae": 1, "model": "somewhere"}, {}, "no `init` section"),
        ("qwen3_moe", {"rank": 8}, {"num_attention_heads": 0}, "cannot be built"),
        ("llama", {"rank": 8}, {}, "No routed experts"),
    ],
)
def test_what_cannot_be_built_is_refused(where: str, form: Any, values: dict[str, Any], says: str) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "num_attention_heads": 4}
    usual = small if where == "llama" else sizes("qwen3_moe")
    with pytest.raises((RecipeError, ModelError), match=says):
        molae.from_config(where, molae=form, **(usual | values))


def test_the_command_writes_what_the_recipe_says(tmp_path: Path, checkpoint: Any) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text(f"molae: 1\nmodel: {checkpoint('mixtral')}\ninit: {{}}\nbudget: {{rank: 8}}\n")
    planned = molae.plan(str(recipe))
    done = CliRunner().invoke(main, ["init", str(recipe), "--output", str(out), "--set", "init.config.num_hidden_layers=1"])
    assert done.exit_code == 0, done.output
    assert molae.verify(out).passed
    assert (out / "tokenizer.json").exists()
    assert "random" in (out / "README.md").read_text()
    assert len(molae.Report.load(out).layers) == 1 < len(planned.layers)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert 0 <= size - molae.Report.load(out).artifact["bytes"] < 20_000
    again = CliRunner().invoke(main, ["init", str(recipe), "--output", str(out)])
    assert again.exit_code == 1
    assert "--fresh" in again.output
    assert CliRunner().invoke(main, ["init", str(recipe), "--output", str(out), "--fresh", "--quiet"]).exit_code == 0
    for command in (["apply", str(recipe), "--output", str(tmp_path / "x")], ["plan", str(recipe), "--measured"]):
        refused = CliRunner().invoke(main, command)
        assert refused.exit_code == 1
        assert "molae-compress init" in refused.output or "--measured" in refused.output


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"calibration": {"data": "python-docs:calibration"}}, "exclude each other"),
        ({"heal": {"router_steps": 3}}, "exclude each other"),
        ({"refit": {"cores": False, "newton": 0}}, "exclude each other"),
        ({"model": "somewhere"}, "either"),
        ({"init": {}}, "either"),
        ({"init": {"model_type": "mixtral", "ranks": {"re:(": 3}}}, "regular expression"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        molae.Recipe.load({"molae": 1, "init": {"model_type": "mixtral"}, **more})


def test_the_bundled_recipe_is_planned_beside_its_dense_twin() -> None:
    plan = molae.plan("scratch")
    assert [found.form for found in plan.costs] == ["dense", "paper", "planned"]
    assert plan.parameters < 0.55 * plan.dense_parameters
    assert all(layer.shape is not None for layer in plan.layers)
    with pytest.raises(RecipeError, match="nothing to measure"):
        molae.plan("scratch", measured=True)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    from molae_compress.scratch import init

    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ResumeError):
        init({"molae": 1, "init": {"model_type": "mixtral"}}, tmp_path, fresh=True)
    with pytest.raises(RecipeError, match="no `init` section"):
        init({"molae": 1, "model": "nowhere/at-all"}, tmp_path / "new")


@pytest.mark.parametrize("form", ["layer", "grouped", "paper"])
def test_it_exports_like_a_compressed_model(form: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from molae_compress.export import export_onnx

    fresh("qwen3_moe", form).save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    # compares its logits with those of torch
    done = export_onnx(str(tmp_path / "saved"), tmp_path / "onnx", experts="standard")
    assert done.checks


def test_the_page_shows_what_the_example_measured() -> None:
    root = Path(__file__).resolve().parents[1]
    spec = spec_from_file_location("pretrain_tiny", root / "examples" / "pretrain_tiny.py")
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    found = json.loads((root / "docs" / "assets" / "pretrain-tiny.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "from-scratch.md").read_text(encoding="utf-8")
    assert (found["sizes"], found["forms"]) == (example.SIZES, example.FORMS)
    assert example.table(found["rows"]) in page
    # what is counted is what the models of the example are
    for row in found["rows"][:4]:
        model = example.make(example.FORMS[row["form"]], row["seed"])
        assert example.non_embedding(model) == row["parameters"]
        assert example.operations(model) == {key: row[key] for key in ("forward", "backward")}
