"""Fine-tuning: every way on every form and family, what is written back, resuming, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import molae_compress as molae
from molae_compress.checkpoint import WorkDirectory
from molae_compress.errors import CheckpointError, DataError, MolaeError, RecipeError, ResumeError
from molae_compress.report import Report
from molae_compress.tuning import trainer as training
from molae_compress.tuning import ways
from tests.runs import TEXT, distance, edit_json, hashes, loaded, logits, recipe_for, same_every_time, tensors_in

LENGTH = 16
FORMS = {
    "layer": ("basis.profile=serving", "budget.align=8"),
    "banks": ("budget.banks=2",),
    "shared": ("basis.experts_per_input_group=4", "basis.storage=orthonormal", "basis.gate_up=separate"),
}
WAYS: dict[str, dict[str, Any]] = {
    "router": {"router": True},
    "adapters": {"adapters": 2},
    "latent": {"latent": "all"},
    "all": {"router": True, "adapters": 2, "adapter_targets": ["encode", "q_proj", "q_a_proj"], "latent": ["core"]},
}
# Each form with each way once, families in turn: attention of deepseek_v3 has another query layer.
MATRIX = [
    ("qwen3_moe", "layer", "all"),
    ("qwen3_moe", "banks", "adapters"),
    ("qwen3_moe", "shared", "latent"),
    ("mixtral", "layer", "adapters"),
    ("mixtral", "banks", "router"),
    ("deepseek_v3", "layer", "latent"),
    ("deepseek_v3", "banks", "all"),
    ("gpt_oss", "layer", "router"),
    ("gpt_oss", "banks", "latent"),
    ("gpt_oss", "shared", "adapters"),
]
Artifacts = Callable[..., Path]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[..., Path]) -> Artifacts:
    """`artifact(family, form, dtype=...)`: a compressed model to read, never to write into."""
    made: dict[tuple[str, str, torch.dtype], Path] = {}

    def make(family: str, form: str, dtype: torch.dtype = torch.float32) -> Path:
        key = (family, form, dtype)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{form}") / "artifact"
            recipe = recipe_for(checkpoint(family, dtype=dtype), "budget.keep=0.5", *FORMS[form])
            molae.run(recipe, made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "learn.txt"
    path.write_text(TEXT)
    return path


def asked(text: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of a few steps."""
    settings = {
        "data": str(text),
        "samples": 12,
        "sequence_length": LENGTH,
        "batch_size": 4,
        "epochs": 1,
        "learning_rate": 0.002,
        "teacher": "resident",
        **changes,
    }
    return {"molae": 1, "finetune": settings}


def ways_for(family: str, way: str) -> dict[str, Any]:
    settings = dict(WAYS[way])
    if "adapter_targets" in settings:
        other = "q_proj" if family == "deepseek_v3" else "q_a_proj"
        settings["adapter_targets"] = [name for name in settings["adapter_targets"] if name != other]
    return settings


class Watch(TrainerCallback):
    """Keeps what the model gave before it was merged, and which parameters had a gradient."""

    def __init__(self) -> None:
        self.logits = torch.zeros(0)
        self.with_gradient: set[str] = set()
        self.trainable: set[str] = set()

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.with_gradient |= {name} if parameter.grad.any() else set()
                assert parameter.requires_grad, name

    def on_train_end(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.logits = logits(model.eval())


class Stops(TrainerCallback):
    """Ends the process, as far as the training can tell, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("family", "form", "way"), MATRIX)
def test_every_way_trains_what_it_says_and_is_written_back(
    family: str, form: str, way: str, artifact: Artifacts, text: Path, tmp_path: Path
) -> None:
    before, watch = artifact(family, form), Watch()
    report = molae.finetune(before, asked(text, **ways_for(family, way)), tmp_path / "out", callbacks=[watch])
    assert watch.with_gradient == watch.trainable != set()
    entry = report.finetuned[-1]
    assert entry["trained"].keys() == {"all": {"router", "adapters", "latent"}}.get(way, {way})
    assert entry["loss_after"] != entry["loss_before"]
    old, new = tensors_in(before), tensors_in(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == set(entry["changed"])
    assert {name: tensor.dtype for name, tensor in old.items()} == {name: tensor.dtype for name, tensor in new.items()}
    tuned = loaded(tmp_path / "out")
    assert distance(logits(tuned), watch.logits) < 1e-5
    assert distance(logits(tuned), logits(loaded(before))) > 1e-4
    assert molae.verify(tmp_path / "out").passed
    assert not (tmp_path / "out.finetune").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Fine-tuning" in card
    assert "| err_h (error relative to the residual stream, over layers) of the compression, before fine-tuning |" in card


@pytest.mark.parametrize("way", ["adapters", "all"])
def test_in_sixteen_bits_only_the_last_rounding_is_lost(way: str, artifact: Artifacts, text: Path, tmp_path: Path) -> None:
    before, watch = artifact("qwen3_moe", "banks", torch.bfloat16), Watch()
    settings = asked(text, **ways_for("qwen3_moe", way))
    molae.finetune(before, settings, tmp_path / "out", callbacks=[watch])
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values() if tensor.is_floating_point()} == {
        torch.bfloat16
    }
    tuned = logits(loaded(tmp_path / "out"))
    apart = sorted((tuned - watch.logits).abs().amax(-1).flatten().tolist())
    assert apart[-2] < 0.005 * float(tuned.abs().max())  # rounding may send a token to another expert
    settings["finetune"]["precision"] = "bfloat16"
    report = molae.finetune(before, settings, tmp_path / "in-16", callbacks=[watch])
    assert report.finetuned[-1]["loss_after"] != report.finetuned[-1]["loss_before"]
    assert distance(logits(loaded(tmp_path / "in-16")), logits(loaded(tmp_path / "out"))) < 0.1


def test_a_killed_training_goes_on_and_ends_with_the_same_files(
    artifact: Artifacts, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molae_compress.tuning.training._FAR", 10.0)  # rates are taken in part
    before = artifact("qwen3_moe", "layer")
    settings = asked(text, **ways_for("qwen3_moe", "all"), teacher="cached", checkpoint_steps=2, epochs=2)
    settings["finetune"]["learning_rate"] = "auto"
    molae.finetune(before, settings, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        molae.finetune(before, settings, tmp_path / "killed", callbacks=[Stops(3)])
    assert not (tmp_path / "killed").exists()
    seen: list[tuple[str, int, int]] = []
    report = molae.finetune(before, settings, tmp_path / "killed", progress=lambda *told: seen.append(told))
    assert report.finetuned[-1]["loss_before"] == Report.load(tmp_path / "whole").finetuned[-1]["loss_before"]
    assert [done for stage, done, _ in seen if stage == "finetune"] == [3, 4, 5, 6]
    assert same_every_time(tmp_path / "killed") == same_every_time(tmp_path / "whole")


def test_the_same_again_is_not_trained_twice(artifact: Artifacts, text: Path, tmp_path: Path) -> None:
    settings = asked(text, router=True)
    molae.finetune(artifact("qwen3_moe", "layer"), settings, tmp_path / "out")
    written = hashes(tmp_path / "out")
    molae.finetune(artifact("qwen3_moe", "layer"), settings, tmp_path / "out")
    molae.finetune(tmp_path / "out", settings)
    assert hashes(tmp_path / "out") == written
    with pytest.raises(ResumeError, match="made otherwise"):
        molae.finetune(artifact("qwen3_moe", "layer"), asked(text, latent="all"), tmp_path / "out")
    report = molae.finetune(tmp_path / "out", asked(text, latent="all", learning_rate="auto"))
    assert [list(entry["trained"]) for entry in report.finetuned] == [["router"], ["latent"]]


def test_a_single_step_is_not_lost_to_warming_up(artifact: Artifacts, text: Path, tmp_path: Path) -> None:
    settings = asked(text, latent="all", samples=4)
    entry = molae.finetune(artifact("qwen3_moe", "layer"), settings, tmp_path / "out").finetuned[-1]
    assert entry["steps"] == 1
    assert entry["loss_after"] != entry["loss_before"]


def test_the_nearer_the_original_the_smaller_the_steps(
    artifact: Artifacts, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    class Rates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            seen.append(max(group["initial_lr"] for group in optimizer.param_groups))

    def rate(name: str, **changes: Any) -> float:
        seen.clear()
        settings = asked(text, adapters=2, learning_rate="auto", trainer={"max_steps": 1}, **changes)
        molae.finetune(artifact("qwen3_moe", "layer"), settings, tmp_path / name, callbacks=[Rates()])
        return seen[0]

    loss = molae.finetune(artifact("qwen3_moe", "layer"), asked(text, adapters=2), tmp_path / "first").finetuned[-1]
    far = loss["loss_before"]
    monkeypatch.setattr("molae_compress.tuning.training._FAR", far / 2)
    assert rate("far") == ways.ADAPTER_RATE
    monkeypatch.setattr("molae_compress.tuning.training._FAR", 4 * far)
    assert rate("near") == pytest.approx(ways.ADAPTER_RATE / 2)
    assert rate("weighted", kl_weight=3.0) == pytest.approx(ways.ADAPTER_RATE / 2)
    assert rate("text", language_weight=0.1) == ways.ADAPTER_RATE


def test_a_training_that_does_harm_says_so(artifact: Artifacts, text: Path, tmp_path: Path) -> None:
    folder = artifact("qwen3_moe", "layer")
    report = molae.finetune(folder, asked(text, latent="all", learning_rate=0.3), tmp_path / "out")
    assert "the model was better before" in report.warnings[-1]
    assert "the model was better before" in (tmp_path / "out" / "README.md").read_text()
    report = molae.finetune(folder, asked(text, latent="all", learning_rate=1e-4), tmp_path / "other")
    assert not any("better before" in warning for warning in report.warnings)


def test_what_a_kill_after_publication_leaves_is_removed_by_whatever_comes_next(
    artifact: Artifacts, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, work = artifact("qwen3_moe", "layer"), tmp_path / "out.finetune"

    def killed(self: WorkDirectory) -> None:
        raise KeyboardInterrupt

    def finetune_killed(*args: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(WorkDirectory, "remove", killed)
            with pytest.raises(KeyboardInterrupt):
                molae.finetune(*args)
        assert work.exists()

    finetune_killed(folder, asked(text, router=True), tmp_path / "out")
    written = hashes(tmp_path / "out")
    molae.finetune(folder, asked(text, router=True), tmp_path / "out")
    assert not work.exists()
    assert hashes(tmp_path / "out") == written
    finetune_killed(tmp_path / "out", asked(text, latent="all"))
    report = molae.finetune(tmp_path / "out", asked(text, adapters=2))
    assert [list(entry["trained"]) for entry in report.finetuned] == [["router"], ["latent"], ["adapters"]]
    assert not work.exists()
    with pytest.raises(KeyboardInterrupt):  # this one has written nothing, and is not to be lost
        molae.finetune(tmp_path / "out", asked(text, latent="all", checkpoint_steps=1), callbacks=[Stops(2)])
    with pytest.raises(ResumeError, match=r"finetune\.latent"):
        molae.finetune(tmp_path / "out", asked(text, router=True))
    assert (work / training.STAGE).exists()


def test_a_recipe_compresses_and_then_trains(checkpoint: Callable[..., Path], tmp_path: Path, text: Path) -> None:
    model = checkpoint("qwen3_moe")
    tuning = asked(text, latent="all", language_weight=0.05, learning_rate=5e-4, checkpoint_steps=1)["finetune"]
    evaluated = {"data": str(text), "samples": 4, "sequence_length": 24}
    content = recipe_for(model, "budget.keep=0.5").model_dump() | {"evaluate": evaluated}
    plain = molae.run(content, tmp_path / "plain")
    recipe = content | {"finetune": {**tuning, "data": None}}
    nan = recipe | {"finetune": {**tuning, "learning_rate": 1e30}}
    with pytest.raises(MolaeError, match="not finite"):
        molae.run(nan, tmp_path / "out")
    assert not Report.load(tmp_path / "out").finetuned
    assert hashes(tmp_path / "out", "*.safetensors") == hashes(tmp_path / "plain", "*.safetensors")
    with pytest.raises(ResumeError, match=r"finetune\.learning_rate"):
        molae.run(recipe, tmp_path / "out")
    report = molae.run(recipe, tmp_path / "out", fresh=True)
    assert report.finetuned[0]["evaluation_before"] == plain.evaluation
    assert report.evaluation is not None
    assert plain.evaluation is not None
    assert report.evaluation["kl"] < plain.evaluation["kl"]
    with WorkDirectory.open(tmp_path / "out.finetune", stage_inputs={training.STAGE: {}}) as work:
        work.commit(training.STAGE, "written", {}, {"files": report.files})  # as a kill after its publication leaves it
    assert molae.run(recipe, tmp_path / "out").finetuned == report.finetuned
    assert not (tmp_path / "out.finetune").exists()


def test_a_loss_that_is_not_finite_stops_and_the_last_checkpoint_can_be_written(
    artifact: Artifacts, text: Path, tmp_path: Path
) -> None:
    before = artifact("qwen3_moe", "layer")
    untouched = hashes(before)

    class Spoils(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    settings = asked(text, latent="all", checkpoint_steps=1, epochs=2, trainer={"logging_steps": 1})
    spoiled = settings | {"finetune": {**settings["finetune"], "checkpoint_steps": 2}}
    with pytest.raises(training.Diverged, match=r"step 3.*step 2 is kept"):
        molae.finetune(before, settings, tmp_path / "out", callbacks=[_Late(Spoils())])
    assert hashes(before) == untouched
    assert not (tmp_path / "out").exists()
    report = molae.finetune(before, spoiled, tmp_path / "out", finish=True)
    assert report.finetuned[-1]["steps"] == 2
    assert molae.verify(tmp_path / "out").passed


class _Late(TrainerCallback):
    """Calls another callback's `on_step_end` when the checkpoint of that step is written."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.inner.on_step_end(args, state, control, **kwargs)


def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(artifact: Artifacts, text: Path, tmp_path: Path) -> None:
    class Breaks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                parameter = next(p for p in model.parameters() if p.requires_grad)
                parameter.register_hook(lambda gradient: gradient * float("inf"))

    settings = asked(text, latent="all", checkpoint_steps=1)
    with pytest.raises(training.Diverged, match=r"gradient at step 2"):
        molae.finetune(artifact("qwen3_moe", "layer"), settings, tmp_path / "out", callbacks=[Breaks()])
    kept = training.last_checkpoint(tmp_path / "out.finetune" / training.STAGE)
    assert kept is not None
    assert kept.name == "checkpoint-1"


def test_a_full_disk_costs_no_more_than_the_steps_since_the_last_checkpoint(
    artifact: Artifacts, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, settings = artifact("qwen3_moe", "layer"), asked(text, latent="all", checkpoint_steps=1, epochs=1)
    save = training.save_file

    def full(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        save(dict(tensors), path)
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(CheckpointError, match=r"Disk full.*goes on from step 1"):
        molae.finetune(before, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(training, "save_file", save)
    report = molae.finetune(before, settings, tmp_path / "out")
    assert report.finetuned[-1]["steps"] == 3


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"latent": ["cores"]}, RecipeError, ["'cores'", "'core'"]),
        ({"adapters": 2, "adapter_targets": ["q_prj"]}, RecipeError, ["'q_prj'", "'q_proj'"]),
        ({"latent": ["down_proj_"]}, RecipeError, ["dense experts are gone", "core.down_proj"]),
        ({"latent": ["core.down_proj"], "adapters": 2}, RecipeError, ["both train", "core.gate_up_proj"]),
        ({"router": True, "trainer": {"gradient_acumulation_steps": 2}}, RecipeError, ["`gradient_accumulation_steps`"]),
        ({"router": True, "trainer": {"learning_rate": 2}}, RecipeError, ["`finetune.learning_rate`"]),
        ({"router": True, "sequence_length": 100_000}, DataError, ["less than one window"]),
        ({"router": True, "chat": True}, DataError, ["no conversations"]),
        ({"router": True, "original": "/nowhere/at-all"}, MolaeError, ["`finetune.original`"]),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    changes: dict[str, Any], error: type[MolaeError], words: list[str], artifact: Artifacts, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        molae.finetune(artifact("qwen3_moe", "layer"), asked(text, **changes), tmp_path / "out")
    assert [word for word in words if word not in str(caught.value)] == []
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_trains_nothing_and_empty_text_are_refused(artifact: Artifacts, tmp_path: Path, text: Path) -> None:
    with pytest.raises(RecipeError, match="nothing that is to be trained"):
        molae.Recipe.load(asked(text))
    with pytest.raises(RecipeError, match="nothing to minimise"):
        molae.Recipe.load(asked(text, router=True, kl_weight=0.0))
    with pytest.raises(RecipeError, match="no section `finetune`"):
        molae.finetune(artifact("qwen3_moe", "layer"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        molae.finetune(artifact("qwen3_moe", "layer"), asked(tmp_path / "empty.txt", router=True), tmp_path / "out")


def test_a_teacher_of_another_vocabulary_is_refused(
    artifact: Artifacts, own_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    other = own_checkpoint("mixtral")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = "a", "e"
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    edit_json(other / "tokenizer.json", model={**tokenizer["model"], "vocab": vocabulary})
    with pytest.raises(DataError, match="different tokens"):
        molae.finetune(artifact("qwen3_moe", "layer"), asked(text, router=True, original=str(other)), tmp_path / "out")
