"""Layouts beyond transformers' fused classes: lists of experts in remote code, other packages' layouts, refusals."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from molae_compress import compress_, expand_, run
from molae_compress.adapters import find_experts
from molae_compress.compress import Run
from molae_compress.errors import ModelError
from molae_compress.inspection import inspect
from molae_compress.layouts import Layout, Weights, gated, layouts
from molae_compress.layouts.lists import ExpertList
from molae_compress.layouts.registry import GROUP
from molae_compress.modeling import LatentExperts
from tests.runs import TEXT
from tests.tiny import EXPERTS, HIDDEN, INTERMEDIATE, tiny_ids, tiny_model, tiny_tokenizer
from tests.zoo import MODELS, zoo_config, zoo_logits, zoo_model

FULL = {"molae": 1, "budget": {"rank": "full"}}
HALF = {"molae": 1, "budget": {"rank": 8}}

# ---------------------------------------------------------------- remote code

CONFIGURATION = """
from transformers import PretrainedConfig

class ToyConfig(PretrainedConfig):
    model_type = "toy_of_the_tests"
    def __init__(self, hidden_size=32, num_experts_per_tok=2, num_hidden_layers=2, vocab_size=264, **more):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.num_experts_per_tok, self.num_hidden_layers = num_experts_per_tok, num_hidden_layers
        super().__init__(**more)
"""
MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_toy import ToyConfig

class ToyMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, 24, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, 24, bias=False)
        self.down_proj = nn.Linear(24, config.hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.5) * self.up_proj(x))

class ToyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, 4, bias=False)
        self.experts = nn.ModuleList([ToyMLP(config) for _ in range(4)])
        self.shared_experts = ToyMLP(config)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, index = self.gate(flat).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(flat)
        for e in range(len(self.experts)):
            tokens, slots = torch.where(index == e)
            out.index_add_(0, tokens, self.experts[e](flat[tokens]) * weights[tokens, slots, None])
        return x + (out + self.shared_experts(flat)).view_as(x)

class ToyForCausalLM(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ToyBlock(config) for _ in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, **kwargs):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.head(x))
"""


@pytest.fixture(scope="module")
def remote_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that brings its own code."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "configuration_toy.py").write_text(CONFIGURATION)
    (folder / "modeling_toy.py").write_text(MODEL)
    auto_map = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM"}
    config = {"model_type": "toy_of_the_tests", "architectures": ["ToyForCausalLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    code = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(code, trust_remote_code=True)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids()).logits


def load_remote(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_experts_in_a_list_of_remote_code_need_no_layout(remote_folder: Path, tmp_path: Path) -> None:
    model = load_remote(remote_folder)
    expected = logits(model)
    assert [(spec.name, spec.num_experts, spec.top_k) for spec in find_experts(model)] == [
        ("layers.0.experts", 4, 2),
        ("layers.1.experts", 4, 2),
    ]
    for profile in ("quality", "serving"):
        whole = load_remote(remote_folder)
        compress_(whole, {**FULL, "basis": {"profile": profile}})
        assert isinstance(whole.layers[0].experts, LatentExperts)
        torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-4)
    compress_(model, HALF)
    run({**HALF, "model": str(remote_folder)}, tmp_path / "latent", device="cpu", trust_remote_code=True)
    loaded = load_remote(tmp_path / "latent")
    torch.testing.assert_close(logits(loaded), logits(model))
    latent = logits(loaded)
    torch.testing.assert_close(logits(expand_(loaded)), latent, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in loaded.layers[0].experts[3].named_parameters()] == [
        "gate_proj.weight",
        "up_proj.weight",
        "down_proj.weight",
    ]
    report = inspect(str(remote_folder), trust_remote_code=True)
    assert report.rule == ExpertList.rule


def test_experts_called_one_by_one_are_calibrated_alike_on_disk_and_in_memory(remote_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(remote_folder, tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    calibration = {"data": str(tmp_path / "text.txt"), "samples": 4, "sequence_length": 16, "batch_size": 2}
    recipe = {**HALF, "calibration": calibration, "refit": {"sequential": True}}
    run({**recipe, "model": str(tmp_path / "dense")}, tmp_path / "latent", device="cpu", trust_remote_code=True)
    model = load_remote(remote_folder)
    report = compress_(model, recipe, data=[TEXT], tokenizer=tiny_tokenizer())
    assert [sum(layer.tokens_per_expert) for layer in report.layers] == [2 * 4 * 16] * 2
    torch.testing.assert_close(logits(load_remote(tmp_path / "latent")), logits(model))


def test_a_latent_list_is_taken_apart_like_the_original(remote_folder: Path) -> None:
    model = load_remote(remote_folder)
    original = model.layers[0].experts
    x = torch.randn(2, 3, HIDDEN)
    expected = [expert(x) for expert in original]
    compress_(model, FULL)
    experts = model.layers[0].experts
    assert len(experts) == 4
    for found in ([expert(x) for expert in experts], [experts[torch.tensor(e)](x) for e in range(4)]):
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(experts[-1](x), expected[-1], rtol=1e-4, atol=1e-4)
    assert [one(x).shape for one in experts[1:3]] == [x.shape] * 2
    torch.testing.assert_close(experts[1:3][0](x), expected[1], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(one.forward(x), other(x)) for one, other in zip(experts, experts[:], strict=True))
    assert experts[0] in experts
    assert original[0] not in experts
    with pytest.raises(IndexError):
        experts[4]


def test_a_single_latent_expert_answers_as_one_of_the_originals(remote_folder: Path) -> None:
    model = load_remote(remote_folder)
    original = model.layers[0].experts[1]
    compress_(model, HALF)
    for dtype in (torch.float32, torch.bfloat16):
        expert = model.to(dtype).layers[0].experts[1]
        for (name, weight), (other, stand_in) in zip(original.named_parameters(), expert.named_parameters(), strict=True):
            assert (name, weight.shape, weight.device, dtype) == (other, stand_in.shape, stand_in.device, stand_in.dtype)
            assert stand_in.untyped_storage().nbytes() <= 8
        assert expert.gate_proj.weight.dtype == dtype
        assert expert.down_proj.in_features == original.down_proj.in_features
        assert expert.act_fn is not None
        assert not hasattr(expert, "w1")
        assert expert(torch.ones(2, HIDDEN, dtype=dtype)).isfinite().all()
        assert expert.gate_proj(torch.ones(2, HIDDEN, dtype=dtype)).isnan().all()
    held = model.layers[0].experts
    assert set(held.state_dict()) == set(held.shape.tensors(held.spec))


class MLP(nn.Module):
    """A gated expert under unusual names, whose forward can be spoilt."""

    def __init__(self, hidden: int = HIDDEN, width: int = 8, spoil: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(hidden, width), nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        out = self.c(nn.functional.silu(self.a(x)) * self.b(x))
        return out if self.spoil is None else self.spoil(out)


def with_experts(*experts: nn.Module) -> PreTrainedModel:
    model = tiny_model("olmoe")
    model.model.layers[1].mlp.experts = nn.ModuleList(experts)
    return model


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        ([MLP(), MLP(width=9)], "unequal classes or shapes"),
        ([MLP(), nn.Sequential()], None),
        ([MLP(spoil=torch.tanh), MLP(spoil=torch.tanh)], "compute something else than their layers a, b, c"),
        ([MLP(), MLP(), nn.LayerNorm(4)], "other modules beside its experts"),
    ],
)
def test_a_list_that_is_not_alike_mlps_is_refused_by_name(experts: list[nn.Module], reason: str | None) -> None:
    with pytest.raises(ModelError, match=reason or "structure that is not understood") as refusal:
        find_experts(with_experts(*experts))
    assert "model.layers.1.mlp.experts" in str(refusal.value)


def test_unusual_names_are_read_by_their_widths() -> None:
    model = with_experts(MLP(), MLP())
    spec = find_experts(model)[1]
    assert (spec.intermediate, spec.has_gate, spec.has_bias) == (8, True, True)


# ---------------------------------------------------------------- layouts of other packages


# --8<-- [start:experts]
class ToyExperts(nn.Module):
    """An architecture that transformers does not know: transposed, and called with weights before indices."""

    def __init__(self) -> None:
        super().__init__()
        self.w_first = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE) * 0.2)
        self.w_last = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) * 0.2)

    def forward(self, x_TH: Tensor, weight_TK: Tensor, index_TK: Tensor) -> Tensor:
        gate_TKI, up_TKI = torch.einsum("th,tkhj->tkj", x_TH, self.w_first[index_TK]).chunk(2, dim=-1)
        y_TKH = torch.einsum("tki,tkih->tkh", torch.relu(gate_TKI) * up_TKI, self.w_last[index_TK])
        return (y_TKH * weight_TK[..., None]).sum(1)


# --8<-- [end:experts]


# --8<-- [start:layout]
class ToyLayout(Layout):
    """What a package registers for `ToyExperts`."""

    rule = "the class ToyExperts"
    arguments = ("x_TH", "weight_TK", "index_TK")

    def matches(self, name: str, module: nn.Module) -> bool:
        return type(module).__name__ == "ToyExperts"

    def weight_names(self, module: nn.Module) -> tuple[str, ...]:
        return "w_first", "w_last"

    def canonical(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Weights:
        return Weights(tensors["w_first"].transpose(1, 2), tensors["w_last"].transpose(1, 2))

    def stored(self, module: nn.Module, weights: Weights) -> dict[str, Tensor]:
        return {"w_first": weights.w_in_EJH.transpose(1, 2), "w_last": weights.w_out_EHI.transpose(1, 2)}

    def activation(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return gated(torch.relu)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        x_TH, weight_TK, index_TK = super().bind(args, kwargs)
        return x_TH, index_TK, weight_TK


# --8<-- [end:layout]


class GreedyLayout(ToyLayout):
    """Claims what another layout claims too."""

    def matches(self, name: str, module: nn.Module) -> bool:
        return name.endswith(".experts")


class ToyBlock(nn.Module):
    """Routes by a softmax, and calls its experts by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.top_k = nn.Linear(HIDDEN, EXPERTS), ToyExperts(), 2

    def forward(self, hidden_states: Tensor) -> Tensor:
        x_TH = hidden_states.reshape(-1, HIDDEN)
        weight_TK, index_TK = self.gate(x_TH).softmax(-1).topk(self.top_k)
        return self.experts(x_TH, index_TK=index_TK, weight_TK=weight_TK).view_as(hidden_states)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`installed(layout, ...)`: as if packages had registered these entry points."""

    def install(*found: object) -> None:
        entries = [SimpleNamespace(name=str(one), value=f"toy:{one}", load=lambda one=one: one) for one in found]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries if group == GROUP else [])
        layouts.cache_clear()

    yield install
    layouts.cache_clear()


def toy_model() -> PreTrainedModel:
    model = tiny_model("olmoe")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in model.model.layers:
            layer.mlp = ToyBlock()
    return model.eval().requires_grad_(False)


def test_a_registered_layout_is_all_an_architecture_needs(installed: Callable[..., None]) -> None:
    with pytest.raises(ModelError, match="structure that is not understood"):
        find_experts(toy_model())
    installed(ToyLayout)
    model = toy_model()
    expected = logits(model)
    assert [spec.name for spec in find_experts(model)] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    for calibration in ({}, {"calibration": {"samples": 2, "sequence_length": 9}}):
        for profile in ("quality", "serving"):
            model = toy_model()
            recipe = {**FULL, **calibration, "basis": {"profile": profile}}
            compress_(model, recipe, data=tiny_ids() if calibration else None)
            torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(expand_(model)), expected, rtol=1e-3, atol=1e-3)
    assert type(model.model.layers[0].mlp.experts) is ToyExperts


def test_two_layouts_that_claim_one_module_are_refused(installed: Callable[..., None]) -> None:
    installed(ToyLayout, GreedyLayout)
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.experts'.*ToyLayout, GreedyLayout"):
        find_experts(toy_model())


def test_an_entry_point_that_is_no_layout_is_refused_by_name(installed: Callable[..., None]) -> None:
    installed(dict)
    with pytest.raises(ModelError, match="no subclass of"):
        layouts()

    def broken() -> None:
        raise ImportError("no module named toy")

    installed(broken)
    with pytest.raises(ModelError, match="no module named toy"):
        layouts()


# ---------------------------------------------------------------- transformers' own classes


def test_llama4_is_calibrated_with_one_expert_per_token() -> None:
    model = zoo_model("Llama4ForCausalLM")
    for layer in model.model.layers:
        layer.feed_forward.top_k = layer.feed_forward.router.top_k = 1
    expected = zoo_logits(model)
    recipe = {**FULL, "calibration": {"samples": 2, "sequence_length": 9}}
    compress_(model, recipe, data=tiny_ids().remainder(90))
    torch.testing.assert_close(zoo_logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["DbrxForCausalLM", "JetMoeForCausalLM", "LongcatFlashForCausalLM", "MuseSparkForConditionalGeneration"]
)
def test_odd_layouts_are_observed_as_they_compute(name: str) -> None:
    model = zoo_model(name)
    expected = zoo_logits(model)
    recipe = {**FULL, "calibration": {"samples": 2, "sequence_length": 9}, "refit": {"sequential": True}}
    compress_(model, recipe, data=tiny_ids().remainder(90))
    torch.testing.assert_close(zoo_logits(model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("profile", ["quality", "serving"])
def test_experts_in_a_latent_space_of_the_model_are_compressed_inside_it(profile: str, tmp_path: Path) -> None:
    model_class = transformers.NemotronHForCausalLM
    config = zoo_config(model_class)
    config.moe_latent_size = 24
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.0, 0.2)
    expected = zoo_logits(model)
    assert {spec.hidden for spec in find_experts(model)} == {24}
    model.save_pretrained(tmp_path / "dense")
    recipe = {**FULL, "basis": {"profile": profile}, "model": str(tmp_path / "dense")}
    run(recipe, tmp_path / "latent", device="cpu")
    loaded: Any = model_class.from_pretrained(tmp_path / "latent", output_loading_info=True)
    assert not any(loaded[1].values())
    torch.testing.assert_close(zoo_logits(loaded[0].eval()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ignored", ["text_moe", "vision_moe"])
def test_experts_that_are_stored_together_are_not_parted(
    ignored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo_model("Ernie4_5_VLMoeForConditionalGeneration")
    model.save_pretrained(tmp_path / "dense")
    recipe = {**HALF, "ignore": [f"re:.*{ignored}.*"]}
    monkeypatch.setattr(Run, "solve_layers", lambda *_: pytest.fail("solves what could not be saved"))
    for attempt in (
        lambda: compress_(model, recipe),
        lambda: run({**recipe, "model": str(tmp_path / "dense")}, tmp_path / "latent", device="cpu"),
    ):
        with pytest.raises(ModelError, match=rf"{ignored}\.experts' would stay dense.*stores both together") as refusal:
            attempt()
        assert "`ignore`" in refusal.value.remedy
    assert not any(isinstance(module, LatentExperts) for module in model.modules())


def test_slots_without_an_expert_add_nothing() -> None:
    model = tiny_model("olmoe")
    compress_(model, HALF)
    experts = model.model.layers[0].mlp.experts
    x_TH, index_TK, weight_TK = torch.randn(5, HIDDEN), torch.tensor([[1, 3]] * 5), torch.rand(5, 2)
    alone = experts(x_TH, index_TK[:, :1], weight_TK[:, :1])
    index_TK[:, 1] = EXPERTS  # what a module split over devices is given for experts that are elsewhere
    torch.testing.assert_close(experts(x_TH, index_TK, weight_TK), alone)


# Classes that hold several stacks of matrices, or are named after experts, and are no routed experts of their own.
NOT_ROUTED = {
    "AriaSharedExpertsMLP": "shared experts",
    "InklingSharedExperts": "shared experts",
    "JetMoeMoA": "attention experts",
    "JetMoeParallelExperts": "one projection of JetMoeMoE",
    "DbrxExpertGLU": "part of DbrxExperts",
    "DogeCDMoE": "refused with its reason",
}


def experts_classes(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Classes that look like experts in a source file, and whether they are decorated."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            decorated = any("use_experts_implementation" in ast.unparse(decorator) for decorator in node.decorator_list)
            bases = " ".join(map(ast.unparse, node.bases))
            is_module = "Module" in bases or decorated
            if is_module and (decorated or node.name.endswith(("Experts", "Expert", "ExpertsMLP", "ExpertGLU"))):
                yield node.name, decorated


def installed_experts() -> Iterator[tuple[str, str, bool]]:
    """Model, name, and whether it is decorated, of every class of the installed transformers that looks like experts."""
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "Expert" in text:
            yield from ((file.parent.name, name, decorated) for name, decorated in experts_classes(ast.parse(text)))


def test_no_experts_class_of_the_installed_transformers_is_unknown() -> None:
    unknown = set()
    for model, name, decorated in installed_experts():
        module = type(name, (nn.ModuleDict,), {})()
        known = decorated or name in NOT_ROUTED or any(layout.matches("x.experts", module) for layout in layouts())
        if not known:
            unknown.add(f"{model}.{name}")
    assert not unknown, f"transformers {transformers.__version__} has experts that no layout knows: {sorted(unknown)}"


def test_every_experts_class_of_the_installed_transformers_is_built_in_the_zoo() -> None:
    # A class of the zoo whose small configuration has dense layers only would pass every other test.
    classes = [getattr(transformers, name) for name in MODELS]
    with torch.device("meta"):
        built = {type(module).__name__ for found in classes for module in found(zoo_config(found)).modules()}
    missing = {f"{model}.{name}" for model, name, _ in installed_experts() if name not in built}
    assert missing == {"qwen3_omni_moe.Qwen3OmniMoeTalkerTextExperts"}, "a small model in tests/zoo.py should hold them"
