"""The PEFT method, plain use of PEFT and Trainer on compressed models, examples, and predictions of the original on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import molae_compress as molae
from molae_compress.checkpoint import WorkDirectory
from molae_compress.errors import CheckpointError, DataError, ModelError, RecipeError
from molae_compress.modeling import latent
from molae_compress.recipe import Recipe
from molae_compress.recipe.sections import Finetune
from molae_compress.source import DiskSource
from molae_compress.tuning import LatentTuningConfig, load_adapter
from molae_compress.tuning.examples import IGNORED, Examples, chat_examples, collated, text_examples
from molae_compress.tuning.inputs import loaded as whole
from molae_compress.tuning.objective import full_divergence, top_divergence
from molae_compress.tuning.targets import linear_targets, router_targets
from molae_compress.tuning.teacher import STAGE, Cached, Resident, keep_predictions
from molae_compress.tuning.ways import attach, choose, merge
from tests.runs import distance, loaded, logits
from tests.tiny import VOCABULARY, tiny_ids, tiny_model, tiny_tokenizer

FORMS = {"layer": {"profile": "serving"}, "banks": {}}
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`folders(family, form)`: a model folder compressed without text."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, form: str) -> Path:
        if (family, form) not in made:
            made[family, form] = tmp_path_factory.mktemp(f"{family}-{form}")
            model = tiny_model(family)
            molae.compress_(model, {"molae": 1, "budget": {"keep": 0.5, "align": 8}, "basis": FORMS[form]})
            model.save_pretrained(made[family, form])
        return made[family, form]

    return make


def trained(model: PeftModel, steps: int = 2) -> PeftModel:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tiny_ids(), labels=tiny_ids()).loss.backward()
        optimizer.step()
    return model.eval()


def plain_arguments(folder: Path, **changes: Any) -> TrainingArguments:
    chosen = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "seed": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=str(folder), **{**chosen, **quiet, **changes})


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tiny_ids(12, 10)]


@pytest.mark.parametrize(("family", "form"), [("qwen3_moe", "banks"), ("gpt_oss", "layer"), ("deepseek_v3", "banks")])
def test_the_method_does_what_peft_asks_of_one(
    family: str, form: str, folders: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = folders(family, form)
    plain = logits(loaded(folder))
    model = get_peft_model(loaded(folder), LatentTuningConfig(train=["core", "router"]))
    assert distance(logits(model), plain) < 1e-5
    one = logits(trained(model))
    assert distance(one, plain) > 1e-3
    with model.disable_adapter():
        assert distance(logits(model), plain) < 1e-5
    model.add_adapter("other", LatentTuningConfig(train=["encode"]))
    model.set_adapter("other")
    assert distance(logits(model), plain) < 1e-5
    other = logits(trained(model))
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert min(distance(both, one), distance(both, other)) > 1e-4
    model.set_adapter("default")
    assert distance(logits(model), one) < 1e-5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded(folder), tmp_path)
    assert distance(logits(again), one) < 1e-5
    second = load_adapter(loaded(folder), tmp_path / "other")
    assert distance(logits(second), other) < 1e-5
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter()
    assert distance(logits(model), both) < 1e-5
    model.unmerge_adapter()
    model.base_model.set_adapter(["default"])
    merged = model.merge_and_unload()
    assert distance(logits(merged), one) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert distance(logits(loaded(tmp_path / "merged")), one) < 1e-5


def test_a_name_that_is_nothing_and_a_tensor_that_is_adapted_already_are_refused(
    folders: Callable[[str, str], Path],
) -> None:
    with pytest.raises(RecipeError, match="Did you mean 'decode'"):
        get_peft_model(loaded(folders("qwen3_moe", "banks")), LatentTuningConfig(train=["decoder"]))
    with pytest.raises(ModelError, match="no latent experts"):
        get_peft_model(tiny_model("qwen3_moe"), LatentTuningConfig())
    model = loaded(folders("qwen3_moe", "layer"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["encode"])).get_base_model()
    with pytest.raises(ModelError, match="has an adapter"):
        get_peft_model(adapted, LatentTuningConfig(train=["encode"]))


def test_a_step_of_adapters_moves_tensors_as_far_at_any_rank(folders: Callable[[str, str], Path]) -> None:
    moved = []
    for rank in (2, 8, 32):
        model = loaded(folders("qwen3_moe", "banks"))
        targets = choose(model, Finetune(adapters=rank))
        before = {path: model.get_parameter(path).detach().clone() for path in targets.changed}
        torch.manual_seed(0)
        tuned = attach(model, targets, rank)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:  # what begins as zeros: the first step of Adam is as large in every number
                parameter.data = 0.01 * torch.randn_like(parameter).sign()
        merged = merge(tuned)
        moved.append(sum(float((merged.get_parameter(path) - old).square().sum()) for path, old in before.items()))
    assert max(moved) < 1.3 * min(moved)


def test_adapters_of_the_dense_model_are_told_apart(folders: Callable[[str, str], Path], tmp_path: Path) -> None:
    dense = get_peft_model(tiny_model("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trained(dense).save_pretrained(tmp_path / "attention")
    load_adapter(loaded(folders("qwen3_moe", "banks")), tmp_path / "attention")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    trained(get_peft_model(tiny_model("qwen3_moe"), config)).save_pretrained(tmp_path / "experts")
    for form in FORMS:
        with pytest.raises(ModelError, match="made for dense experts"):
            load_adapter(loaded(folders("qwen3_moe", form)), tmp_path / "experts")
    whole_latent = get_peft_model(loaded(folders("qwen3_moe", "layer")), LatentTuningConfig())
    whole_latent.save_pretrained(tmp_path / "latent")
    with pytest.raises(ModelError, match="another compression"):
        load_adapter(loaded(folders("qwen3_moe", "banks")), tmp_path / "latent")
    wider = tiny_model("qwen3_moe")
    molae.compress_(wider, {"molae": 1, "budget": {"rank": 24, "align": 8}, "basis": FORMS["layer"]})
    trained(get_peft_model(wider, LoraConfig(r=2, target_modules=["encode", "decode"]))).save_pretrained(tmp_path / "wider")
    with pytest.raises(ModelError, match="another compression"):
        load_adapter(loaded(folders("qwen3_moe", "layer")), tmp_path / "wider")
    with pytest.raises(CheckpointError, match="no adapter"):
        load_adapter(loaded(folders("qwen3_moe", "banks")), tmp_path)


def test_fused_kernels_are_not_given_adapted_tensors(
    folders: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    monkeypatch.setattr(latent, "latent_bank", lambda held, *_: given.append(type(held.core).__name__))
    model = loaded(folders("qwen3_moe", "banks"))
    model.set_experts_implementation("molae")
    before = logits(model)
    assert set(given) == {"GroupedCore"}
    given.clear()
    names = [name for name, _ in model.named_parameters() if name.endswith("encode.weight")]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=names))
    assert distance(logits(adapted), before) < 1e-5
    assert given == []


def test_plain_trainer_trains_all_of_a_loaded_model(folders: Callable[[str, str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders("qwen3_moe", "banks"))
    assert model.hf_quantizer.is_qat_trainable
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Trainer(model, plain_arguments(tmp_path / "run"), train_dataset=rows()).train()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    model.save_pretrained(tmp_path / "saved")
    assert distance(logits(loaded(tmp_path / "saved")), logits(model.eval())) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_plain_trainer_with_the_method_resumes_bit_for_bit(
    checkpointing: bool, folders: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = folders("qwen3_moe", "banks")

    def run(where: str, **how: Any) -> dict[str, Tensor]:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LatentTuningConfig(train=["all", "router"]))
        arguments = plain_arguments(tmp_path / where, gradient_checkpointing=checkpointing)
        Trainer(model, arguments, train_dataset=rows()).train(**how)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    whole_run = run("one")
    resumed = run("two", resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    assert whole_run.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole_run.items())


def test_routers_and_other_layers_are_found_in_every_family(family: str, folders: Callable[[str, str], Path]) -> None:
    model = loaded(folders(family, "layer"))
    routers = router_targets(model)
    assert {target.name for target in routers} <= {"weight", "bias"}
    assert all(model.get_parameter(target.path).shape[0] == 8 for target in routers)
    others = {target.short for target in linear_targets(model)}
    assert "o_proj" in others
    assert not {"encode", "decode", "lm_head", "gate", "router"} & others


def chats() -> list[list[dict[str, str]]]:
    return [
        [
            {"role": "user", "content": f"How much is {n} and {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
            {"role": "user", "content": "Thanks!"},
            {"role": "assistant", "content": "You are welcome."},
        ]
        for n in range(6)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_of_conversations_only_what_the_assistant_says_is_learned(packing: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    how = {"samples": 4, "length": 120, "seed": 0, "packing": packing, "names": ["chats"]}
    found = chat_examples([chats()], tokenizer, completion_only=True, **how)
    learned = [tokenizer.decode(ids[labels != IGNORED]) for ids, labels in zip(found.ids_NL, found.labels_NL, strict=True)]
    if packing:
        assert len(found) == 4
        assert all("user" not in text and "welcome" in text for text in learned)
    else:
        assert {text for text in learned} <= {f"It is {2 * n}.\nYou are welcome.\n" for n in range(6)}
    everything = chat_examples([chats()], tokenizer, completion_only=False, **how)
    assert everything.learned > 2 * found.learned
    assert collated([found[0], found[1]])["input_ids"].shape[1] <= 120


def test_conversations_that_cannot_be_learned_from_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    how = {"samples": 4, "length": 120, "seed": 0, "packing": False, "names": ["chats"], "completion_only": True}
    with pytest.raises(DataError, match="no chat template"):
        chat_examples([chats()], tokenizer, **how)
    tokenizer.chat_template = CHATML
    with pytest.raises(DataError, match="nothing to learn"):
        chat_examples([[[{"role": "user", "content": "Hello?"}]]], tokenizer, **how)
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="differently when others follow"):
        chat_examples([chats()], tokenizer, **how)


def test_texts_can_be_examples_of_their_own() -> None:
    found = text_examples([["short", "a text that is too long by far"]], tiny_tokenizer(), samples=9, length=12, seed=0)
    assert sorted((labels != IGNORED).sum().item() for labels in found.labels_NL) == [5, 11]


def test_the_likeliest_tokens_say_almost_as_much_as_all() -> None:
    generator = torch.Generator().manual_seed(0)
    original, model = (3 * torch.randn(5, VOCABULARY, generator=generator) for _ in range(2))
    exact = full_divergence(original, model)
    found = []
    for k in (1, 16, 64, VOCABULARY):
        top = original.log_softmax(-1).topk(k)
        found.append(top_divergence(top.values, top.indices.int(), model))
    assert found == sorted(found)
    torch.testing.assert_close(found[-1], exact)
    assert 0 < found[0] < found[2] <= exact + 1e-4
    top = original.log_softmax(-1).topk(16)
    kept = [one.softmax(-1).gather(-1, top.indices) for one in (original, model)]
    p, q = (torch.cat([own, 1 - own.sum(-1, keepdim=True)], dim=-1) for own in kept)
    torch.testing.assert_close(found[1], (p * (p / q).log()).sum())
    assert abs(top_divergence(top.values, top.indices.int(), original)) < 1e-4


def test_predictions_on_disk_are_those_of_the_model_in_memory(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("deepseek_v3")
    ids_NL = tiny_ids(19, 8)
    labels_NL = ids_NL.clone()
    labels_NL[:, :3] = IGNORED
    examples = Examples(ids_NL, labels_NL)
    source = DiskSource.open(str(folder), device=torch.device("cpu"), dense=False)
    told: list[int] = []

    def keep(limit: int) -> None:
        with WorkDirectory.open(tmp_path / "work", stage_inputs={STAGE: {}}) as work:
            keep_predictions(
                source, examples, VOCABULARY, work, memory_limit=limit, progress=lambda _, done, total: told.append(done)
            )

    keep(1)  # eight at a time
    assert len(list((tmp_path / "work" / STAGE).glob("*.safetensors"))) == 3
    (tmp_path / "work" / STAGE / "part-00002.safetensors").unlink()
    before = len(told)
    keep(1 << 30)  # goes on as it was begun
    assert len(told) - before == len(source.layers) + 1
    batch = collated([examples[17], examples[2]])
    cached = Cached.inside(tmp_path / "work" / STAGE).divergences(batch)
    resident = Resident(whole(folder, torch.float32, False).eval()).divergences(batch)
    guess = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    for one, other in zip(cached, resident, strict=True):
        torch.testing.assert_close(one(guess), other(guess), rtol=1e-4, atol=1e-4)


def test_the_command_trains_and_says_what_it_did(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from molae_compress.cli import main
    from tests.runs import recipe_for

    molae.run(recipe_for(checkpoint("qwen3_moe"), "budget.keep=0.5"), tmp_path / "artifact")
    conversations = tmp_path / "chats.jsonl"
    conversations.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats() * 3))
    template = tmp_path / "artifact" / "chat_template.jinja"
    template.write_text(CHATML)
    recipe = tmp_path / "tune.yaml"
    settings = {"latent": "all", "data": str(conversations), "column": "messages", "chat": True, "completion_only": True}
    recipe.write_text(Recipe.load({"molae": 1, "finetune": {**settings, "packing": False, "sequence_length": 96}}).dump())
    words = ["finetune", str(tmp_path / "artifact"), "--recipe", str(recipe), "--output", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "loss per token on examples set aside" in done.stdout
    assert molae.verify(tmp_path / "out").passed
    done = CliRunner().invoke(main, [*words, "--set", "finetune.latent=[encod]", "--json"])
    assert done.exit_code == 1
    assert "Did you mean 'encode" in done.stderr
