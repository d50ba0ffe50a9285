"""A model that brings its own code goes the whole way, found, compressed, loaded, verified and expanded, if allowed.

The architecture lives in this file alone, and its code in the model folder, in three files of which one is imported by
another. Nothing about it is registered anywhere: its experts are a list of gated MLPs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import molae_compress as molae
from molae_compress.cli import main
from molae_compress.compress import Run
from molae_compress.errors import ModelError, ResumeError
from molae_compress.inspection import SHARED, UNPROVEN, inspect
from molae_compress.layouts.lists import ExpertList
from molae_compress.report import Report
from molae_compress.source import load_tokenizer
from tests.runs import edit_json, hashes
from tests.tiny import tiny_ids, tiny_model, tiny_tokenizer

LAYERS, EXPERTS, HIDDEN, WIDTH = 2, 4, 32, 24
CODE = {
    "configuration_heron.py": """
from transformers import PretrainedConfig

class HeronConfig(PretrainedConfig):
    model_type = "heron_of_the_tests"
    def __init__(self, hidden_size=32, expert_width=24, num_experts=4, num_experts_per_tok=2, num_hidden_layers=2,
                 vocab_size=264, **more):
        self.hidden_size, self.expert_width, self.vocab_size = hidden_size, expert_width, vocab_size
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**more)
""",
    "experts_heron.py": """
import torch
from torch import nn

class HeronMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.expert_width, bias=False)
        self.w2 = nn.Linear(config.expert_width, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.expert_width, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.gelu(self.w1(x)) * self.w3(x).clamp(-1, 1))

class HeronMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList([HeronMLP(config) for _ in range(config.num_experts)])
        self.shared = HeronMLP(config)
        self.num_experts_per_tok = config.num_experts_per_tok

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(self.num_experts_per_tok, dim=-1)
        out = self.shared(flat)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(chosen == number)
            out.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, slots, None])
        return out.view_as(x)
""",
    "modeling_heron.py": """
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_heron import HeronConfig
from .experts_heron import HeronMoE

class HeronLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.moe = HeronMoE(config)

    def forward(self, x):
        past = x.cumsum(1) / (1 + x.new_ones(x.shape[1]).cumsum(0))[:, None]
        x = x + self.mix(past)
        return x + self.moe(self.norm(x))

class HeronForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HeronConfig
    _no_split_modules = ["HeronLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([HeronLayer(config) for _ in range(config.num_hidden_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, **more):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutputWithPast(logits=self.head(x))
""",
}
AUTO_MAP = {"AutoConfig": "configuration_heron.HeronConfig", "AutoModelForCausalLM": "modeling_heron.HeronForCausalLM"}
RECIPE = {"molae": 1, "budget": {"rank": 8}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that brings its own code, with a tokenizer."""
    return save_heron(tmp_path_factory.mktemp("heron"))


def save_heron(place: Path, *changes: tuple[str, str]) -> Path:
    """Saves a model in a folder of its own; `changes` to its code are pairs of old and new text."""
    assert all(any(old in text for text in CODE.values()) for old, _ in changes)
    place.mkdir(exist_ok=True)
    for name, text in CODE.items():
        for old, new in changes:
            text = text.replace(old, new)
        (place / name).write_text(text)
    (place / "config.json").write_text(json.dumps({"model_type": "heron_of_the_tests", "auto_map": AUTO_MAP}))
    config = AutoConfig.from_pretrained(place, trust_remote_code=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `run` makes of it."""
    out = tmp_path_factory.mktemp("compressed") / "heron"
    molae.run({**RECIPE, "model": str(folder)}, out, trust_remote_code=True)
    return out


def load(folder: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert type(model).__name__ == "HeronForCausalLM"
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tiny_ids()).logits
    return found


def call(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_inspect_finds_the_list_and_nothing_else(folder: Path) -> None:
    found = inspect(str(folder), trust_remote_code=True)
    assert found.model_class == "HeronForCausalLM"
    assert [(experts.spec.name, experts.spec.top_k) for experts in found.experts] == [
        (f"layers.{layer}.moe.experts", 2) for layer in range(LAYERS)
    ]
    assert {experts.rule for experts in found.experts} == {ExpertList.rule}
    assert found.expert_parameters == LAYERS * EXPERTS * 3 * HIDDEN * WIDTH
    assert {part.name: part.reason for part in found.left_alone}["layers.*.moe.shared"] == SHARED


def test_the_artifact_brings_the_code_and_loads_as_what_was_compressed(folder: Path, artifact: Path) -> None:
    assert hashes(artifact, "*.py") == hashes(folder, "*.py")
    assert hashes(artifact, "*.py").keys() == CODE.keys()
    model = load(folder)
    original = logits(model)
    molae.compress_(model, RECIPE)
    loaded = load(artifact)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(loaded), original, rtol=1e-2, atol=1e-2)
    found = loaded.generate(tiny_ids()[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False)
    assert found.shape == (2, 7)
    assert molae.verify(artifact, trust_remote_code=True).passed


def test_at_full_rank_nothing_changes(folder: Path) -> None:
    model = load(folder)
    expected = logits(model)
    molae.compress_(model, {"molae": 1, "budget": {"rank": "full"}})
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_saved_from_memory_it_brings_the_code_too(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    molae.compress_(model, RECIPE)
    model.save_pretrained(tmp_path)
    assert hashes(tmp_path, "*.py").keys() == CODE.keys()
    torch.testing.assert_close(logits(load(tmp_path)), logits(model))


def test_changed_code_is_another_model(folder: Path, artifact: Path, tmp_path: Path) -> None:
    assert Report.load(artifact).inputs["transformers"] == transformers.__version__
    changed, out = tmp_path / "changed", tmp_path / "out"
    shutil.copytree(folder, changed)
    recipe = {**RECIPE, "model": str(changed)}
    molae.run(recipe, out, trust_remote_code=True)
    assert molae.run(recipe, out, trust_remote_code=True).files
    with next(changed.glob("modeling*.py")).open("a") as file:
        file.write("# of another mind\n")
    with pytest.raises(ResumeError, match="there -> now: code: "):
        molae.run(recipe, out, trust_remote_code=True)


def test_expanded_it_is_a_plain_checkpoint_of_that_code(folder: Path, artifact: Path, tmp_path: Path) -> None:
    molae.expand(artifact, tmp_path / "dense", trust_remote_code=True)
    assert hashes(tmp_path / "dense", "*.py") == hashes(folder, "*.py")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = load(tmp_path / "dense")
    assert type(dense.layers[0].moe.experts) is nn.ModuleList
    torch.testing.assert_close(logits(dense), logits(load(artifact)), rtol=1e-4, atol=1e-4)


def test_every_verb_runs_with_permission(folder: Path, tmp_path: Path) -> None:
    text = {"data": str(tmp_path / "text.txt"), "samples": 4, "sequence_length": 16}
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    (tmp_path / "my.yaml").write_text(json.dumps({**RECIPE, "model": str(folder), "calibration": text, "evaluate": text}))
    out, trust = tmp_path / "out", "--trust-remote-code"
    for words in (
        ("inspect", folder),
        ("plan", tmp_path / "my.yaml"),
        ("apply", tmp_path / "my.yaml", "--output", out, "-q"),
        ("verify", out, "-q"),
        ("evaluate", out, "--against", folder, "-q"),
        ("expand", out, tmp_path / "dense", "-q"),
    ):
        done = call(*words, trust)
        assert done.exit_code == 0, f"{words}\n{done.output}"


CALL, REST = "expert(flat[tokens])", "self.shared ="
MORE_EXPERTS = (
    (REST, f"self.blocks = nn.ModuleList([HeronMLP(config) for _ in range(config.num_experts)])\n        {REST}"),
    (
        "        return out.view_as(x)",
        """        for number, expert in enumerate(self.blocks):
            tokens, slots = torch.where(chosen == number)
            out.index_add_(0, tokens, expert(flat[tokens]) * weights[tokens, slots, None])
        return out.view_as(x)""",
    ),
)
LOOKS_INSIDE = {
    "type": (CALL, "expert(flat[tokens].to(expert.w1.weight.dtype))"),
    "device": (CALL, "expert(flat[tokens].to(next(expert.parameters()).device))"),
    "shape": (CALL, "expert(flat[tokens][:, : expert.w1.weight.shape[1]])"),
    "keyword": (CALL, "expert(x=flat[tokens])"),
    "slice": ("enumerate(self.experts)", "enumerate(self.experts[: len(self.experts)])"),
    "last first": ("self.experts)", "[self.experts[n - len(self.experts)] for n in range(4)])"),
}


def test_a_second_list_under_another_name_is_compressed_too(tmp_path: Path) -> None:
    folder = save_heron(tmp_path / "two_lists", *MORE_EXPERTS)
    found = inspect(str(folder), trust_remote_code=True)
    names = [f"layers.{layer}.moe.{name}" for layer in range(LAYERS) for name in ("experts", "blocks")]
    assert [experts.spec.name for experts in found.experts] == names
    text = {"data": str(tmp_path / "text.txt"), "samples": 4, "sequence_length": 16}
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    recipe = {"molae": 1, "budget": {"rank": "full"}, "calibration": text, "model": str(folder)}
    report = molae.run(recipe, tmp_path / "two_lists_out", trust_remote_code=True)
    assert [(layer.name, sum(layer.tokens_per_expert)) for layer in report.layers] == [(name, 2 * 4 * 16) for name in names]
    torch.testing.assert_close(logits(load(tmp_path / "two_lists_out")), logits(load(folder)), rtol=1e-3, atol=1e-3)
    assert molae.verify(tmp_path / "two_lists_out", trust_remote_code=True).passed


def test_what_may_be_routed_experts_is_named_where_it_is_left_alone(tmp_path: Path) -> None:
    chosen = ("self.router(flat)", "self.scores(flat)")
    hidden = ("self.router = nn.Linear", "self.scores = lambda flat: flat[:, :4]\n        self.mix = nn.Linear")
    folder = save_heron(tmp_path / "unproven", *MORE_EXPERTS, chosen, hidden, ("config.num_experts, bias", "7, bias"))
    found = inspect(str(folder), trust_remote_code=True)
    assert [experts.spec.name for experts in found.experts] == [f"layers.{layer}.moe.experts" for layer in range(LAYERS)]
    assert {part.name: part.reason for part in found.left_alone}["layers.*.moe.blocks"] == UNPROVEN
    report = molae.run({**RECIPE, "model": str(folder)}, tmp_path / "unproven_out", trust_remote_code=True)
    said = [warning for warning in report.warnings if "looks like routed experts" in warning]
    assert [warning.split("'")[1] for warning in said] == [f"layers.{layer}.moe.blocks" for layer in range(LAYERS)]


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("look", LOOKS_INSIDE)
def test_code_may_look_at_the_experts_it_takes_out(look: str, calibrated: bool, tmp_path: Path) -> None:
    # transformers keeps code by the name of its folder
    name = f"looks_{look.replace(' ', '_')}_{calibrated}"
    folder, out = save_heron(tmp_path / name, LOOKS_INSIDE[look]), tmp_path / f"{name}_out"
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    text = {"data": str(tmp_path / "text.txt"), "samples": 4, "sequence_length": 16}
    recipe = {"molae": 1, "budget": {"rank": "full"}, "model": str(folder), **({"calibration": text} if calibrated else {})}
    molae.run(recipe, out, trust_remote_code=True)
    torch.testing.assert_close(logits(load(out)), logits(load(folder)), rtol=1e-3, atol=1e-3)
    assert molae.verify(out, trust_remote_code=True).passed


WANTS_MORE = {
    "layers": ("expert.w2(expert.w1(flat[tokens]))", "no finite numbers"),
    "weights": ("nn.functional.linear(flat[tokens], expert.w2.weight @ expert.w1.weight)", "no finite numbers"),
    "itself": ("expert.train(False)(flat[tokens])", "no finite numbers"),
    "insides": ("expert(flat[tokens], **self.experts._modules['0']._buffers)", "ends with KeyError: '0'"),
}


@pytest.mark.parametrize("want", WANTS_MORE)
def test_code_that_wants_more_of_its_experts_is_refused_before_the_work(
    want: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, reason = WANTS_MORE[want]
    folder = save_heron(tmp_path / f"wants_{want}", (CALL, call))
    monkeypatch.setattr(Run, "solve_layers", lambda *_: pytest.fail("solves what could not run"))
    for attempt in (
        lambda: molae.run({**RECIPE, "model": str(folder)}, tmp_path / "out", trust_remote_code=True),
        lambda: molae.compress_(load(folder), RECIPE),
    ):
        with pytest.raises(ModelError, match=rf"block HeronMoE around the experts 'layers\.0\.moe\.experts'.*{reason}"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_block_that_needs_more_than_hidden_states_is_proven_in_its_layer(tmp_path: Path) -> None:
    changes = (
        ("forward(self, x):\n        flat", "forward(self, x, *, factor):\n        flat"),
        ("self.moe(self.norm(x))", "self.moe(self.norm(x), factor=1.0)"),
    )
    folder = save_heron(tmp_path / "factor", *changes)
    molae.run({**RECIPE, "model": str(folder)}, tmp_path / "factor_out", trust_remote_code=True)
    assert molae.verify(tmp_path / "factor_out", trust_remote_code=True).passed
    folder = save_heron(tmp_path / "factor_spoilt", *changes, (CALL, WANTS_MORE["layers"][0]))
    with pytest.raises(ModelError, match="no finite numbers"):
        molae.run({**RECIPE, "model": str(folder)}, tmp_path / "never", trust_remote_code=True)


def test_without_permission_no_line_of_it_runs(folder: Path, artifact: Path, tmp_path: Path) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: inspect(str(folder)),
        lambda: molae.plan({**RECIPE, "model": str(folder)}),
        lambda: molae.run({**RECIPE, "model": str(folder)}, tmp_path / "out"),
        lambda: molae.expand(artifact, tmp_path / "dense"),
        lambda: molae.evaluate(artifact, data=["python-docs:heldout"]),
    ]
    for attempt in attempts:
        with pytest.raises(ModelError, match="its own code") as refusal:
            attempt()
        assert "modeling_heron.HeronForCausalLM" in refusal.value.what
        assert "--trust-remote-code" in refusal.value.remedy
    for words in (("inspect", folder), ("verify", artifact)):
        done = call(*words)
        assert done.exit_code == 1
        assert "--trust-remote-code" in done.output
    assert not list(tmp_path.iterdir())


def test_code_for_a_type_that_transformers_knows_is_neither_needed_nor_run(tmp_path: Path) -> None:
    """As DeepSeek-V3 is published: with code from before transformers had the class."""
    source = tmp_path / "source"
    tiny_model("deepseek_v3").save_pretrained(source)
    edit_json(source / "config.json", auto_map={"AutoConfig": "configuration_old.Old", "AutoModelForCausalLM": "old.Old"})
    for file in ("configuration_old.py", "old.py"):
        (source / file).write_text("raise SystemExit('code of the folder was run')")
    molae.run({**RECIPE, "model": str(source), "calibration": None}, tmp_path / "out")
    assert (tmp_path / "out" / "old.py").exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert molae.verify(tmp_path / "out").passed


def test_a_tokenizer_with_its_own_code_is_refused_with_the_flag(tmp_path: Path) -> None:
    content = {"tokenizer_class": "OldTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_old.OldTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"own code.*--trust-remote-code"):
        load_tokenizer(tmp_path)
