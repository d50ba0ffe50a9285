"""Every Mixture-of-Experts class of transformers: found, compressed, saved, loaded and expanded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from molae_compress import compress_, expand, expand_, run, verify
from molae_compress.adapters import find_experts, layers_with_experts
from molae_compress.calibration.replay import of_window, packed, unpacked
from molae_compress.calibration.text import token_windows
from molae_compress.calibration.walk import LayerArguments, model_inputs, set_submodule
from molae_compress.checkpoint import Checkpoint
from molae_compress.errors import ModelError, MolaeError
from molae_compress.layouts import FLAGS
from molae_compress.modeling import LatentExperts
from molae_compress.modeling.quantizer import MolaeConfig
from molae_compress.serving.stored import find_tensors
from molae_compress.source import LiveSource, load_tokenizer
from molae_compress.stream import forwarded
from tests.zoo import MODELS, NO_BASIS, NO_LAYER_FORM, TEXT_MODEL_OF, VOCABULARY, zoo_config, zoo_logits, zoo_model

transformers_logging.disable_progress_bar()

UNDECORATED = {
    "DbrxExperts",
    "JetMoeMoE",
    "Llama4TextExperts",
    "LongcatFlashExperts",
    "NllbMoeExperts",
    "Step3p7Experts",
    "SwitchTransformersExperts",
}
# Whose layers tell each other more than hidden states, lie in two stacks, or have experts that see no text.
ODD = (
    "DeepseekV4ForCausalLM",
    "DiffusionGemmaForBlockDiffusion",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "Glm5NextForConditionalGeneration",
    "GlmMoeDsaForCausalLM",
    "HYV4ForCausalLM",
    "Llama4ForCausalLM",
    "NllbMoeForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration",
    "ZayaForCausalLM",
)
# Tokens beyond an expert's capacity, and those of experts that are identities, have no expert.
SOME_WITHOUT_EXPERT = ("LongcatFlashForCausalLM", "SwitchTransformersForConditionalGeneration")
CALIBRATION = {"samples": 6, "sequence_length": 16, "batch_size": 2}
FULL = {"molae": 1, "budget": {"rank": "full"}}
HALF = {"molae": 1, "budget": {"rank": 8}, "basis": {"experts_per_input_group": 2}}


@pytest.fixture(params=[name for name in MODELS if name not in NO_BASIS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def routed_experts(model: nn.Module) -> set[str]:
    """Paths of the routed experts, by what their classes are and not by how they look."""
    return {
        path
        for path, module in model.named_modules()
        if type(module).__name__ in UNDECORATED or all(flag in vars(module) for flag in FLAGS)
    }


def latent_experts(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, LatentExperts)}


def assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    assert off <= tolerance, f"differs by {off:.1e} of the largest value"


def next_token_perplexity(model: PreTrainedModel, ids_NL: Tensor) -> float:
    """Of all tokens but the first, none of which the model is shown before: a decoder of its own starts with padding."""
    more = {}
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = torch.cat([torch.zeros_like(ids_NL[:, :1]), ids_NL[:, :-1]], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids_NL, use_cache=False, **more).logits
    logits = logits[:, 1:] if more else logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_NL[:, 1:].flatten()).exp())


@torch.no_grad()
def err_h_by_hooks(
    dense: PreTrainedModel, compressed: PreTrainedModel, ids_BL: Tensor, *, sequential: bool = False
) -> dict[str, float]:
    """err_h on the last window of a batch, of the whole dense model with one module after the other replaced.

    If `sequential`, those that come before stay replaced.
    """
    layers, found = layers_with_experts(dense, [spec.name for spec in find_experts(dense)]), {}
    for spec in find_experts(dense):
        after: list[Tensor] = []
        handle = dense.get_submodule(layers.paths[layers.of(spec.name)]).register_forward_hook(
            lambda _, __, out, after=after: after.append(out[0] if isinstance(out, (tuple, list)) else out)
        )
        original = dense.get_submodule(spec.name)
        dense(**model_inputs(dense, ids_BL))
        set_submodule(dense, spec.name, compressed.get_submodule(spec.name))
        dense(**model_inputs(dense, ids_BL))
        if not sequential:
            set_submodule(dense, spec.name, original)
        handle.remove()
        if after:
            exact, other = (hidden.double().reshape(ids_BL.numel(), -1)[-ids_BL.shape[1] :] for hidden in after)
            found[spec.name] = float(((other - exact).square().sum(1) / exact.square().sum(1)).mean())
    return found


def load(folder: Path, model_class: Any) -> Any:
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_exactly_the_routed_experts_are_found(name: str) -> None:
    model = zoo_model(name)
    specs = find_experts(model)
    assert {spec.name for spec in specs} == routed_experts(model)
    assert len(specs) == len({spec.name for spec in specs}) > 0
    with torch.device("meta"):
        assert find_experts(type(model)(model.config)) == specs


@pytest.mark.parametrize("profile", ["quality", "serving"])
def test_full_rank_changes_nothing(name: str, profile: str) -> None:
    model = zoo_model(name)
    expected = zoo_logits(model)
    recipe = {**FULL, "basis": {"profile": profile}}
    if profile == "serving" and name in NO_LAYER_FORM:
        with pytest.raises(MolaeError, match=NO_LAYER_FORM[name]):
            compress_(model, recipe)
        assert routed_experts(model)
        return
    paths = routed_experts(model)
    compress_(model, recipe)
    assert latent_experts(model) == paths
    assert_same(zoo_logits(model), expected, 1e-4)
    for module in model.modules():
        if isinstance(module, LatentExperts) and "config" in module.__dict__:
            module.__dict__["config"]._experts_implementation = "molae"
    assert_same(zoo_logits(model), expected, 1e-4)


def test_compressed_it_is_saved_loaded_and_expanded(name: str, tmp_path: Path) -> None:
    model = zoo_model(name)
    dense, paths = zoo_logits(model), routed_experts(model)
    compress_(model, HALF)
    expected = zoo_logits(model)
    assert not torch.equal(expected, dense)
    model.save_pretrained(tmp_path / "latent")
    loaded = load(tmp_path / "latent", type(model))
    assert latent_experts(loaded) == paths
    assert_same(zoo_logits(loaded), expected, 1e-6)
    expand_(loaded)
    assert routed_experts(loaded) == paths
    loaded.save_pretrained(tmp_path / "dense")
    plain = load(tmp_path / "dense", type(model))
    assert not hasattr(plain.config, "quantization_config")
    assert_same(zoo_logits(plain), expected, 1e-4)


def test_streamed_from_disk_it_is_the_same(name: str, tmp_path: Path) -> None:
    model = zoo_model(name)
    model.save_pretrained(tmp_path / "dense")
    recipe = {**HALF, "model": str(tmp_path / "dense")}
    run(recipe, tmp_path / "latent", device="cpu")
    compress_(model, HALF)
    loaded = load(tmp_path / "latent", type(model))
    expected = zoo_logits(model)
    assert_same(zoo_logits(loaded), expected, 1e-5)
    expand(tmp_path / "latent", tmp_path / "expanded")
    assert_same(zoo_logits(load(tmp_path / "expanded", type(model))), expected, 1e-4)
    # However it came about, files name tensors alike, config.json names the modules of the class, and engines find both.
    model.save_pretrained(tmp_path / "from memory")
    loaded.save_pretrained(tmp_path / "again")
    checkpoints = {place: Checkpoint.open(tmp_path / place) for place in ("latent", "from memory", "again")}
    specs = {spec.name: spec for spec in find_experts(zoo_model(name))}
    for place, stored in checkpoints.items():
        assert stored.entries.keys() == checkpoints["latent"].entries.keys(), place
        config = json.loads((tmp_path / place / "config.json").read_text())
        shapes = MolaeConfig(**config["quantization_config"]).shapes()
        assert shapes.keys() == specs.keys(), place
        keys = [find_tensors(stored, path, specs[path], shape) for path, shape in shapes.items()]
        assert len({key for found in keys for key in found.values()}) == sum(map(len, keys))


def test_layer_by_layer_it_computes_the_same(name: str) -> None:
    source = LiveSource.of(zoo_model(name))
    ids_NL = torch.randint(5, VOCABULARY - 5, (3, 13), generator=torch.Generator().manual_seed(1))
    batches = ids_NL.split(2)
    arguments = LayerArguments(source.model, source.layers.paths, source.device)
    with torch.no_grad():
        out = source.model(**model_inputs(source.model, ids_NL))
        carried = forwarded(source, arguments, batches, lambda _: None)
        carried = [unpacked(*packed(passed)) for passed in carried]
        found = [arguments.logits(*batch) for batch in zip(batches, carried, strict=True)]
        alone = arguments.logits(ids_NL[1:2], of_window(carried[0], 1, 2))
    expected = out.logits if "logits" in out else out[0]
    assert_same(torch.cat(found), expected, 1e-5)
    assert_same(alone, expected[1:2], 1e-5)


def test_calibrated_every_module_sees_every_token(name: str) -> None:
    # tied experts are counted once
    for budget in ({"rank": 4}, {"keep": 0.3 if "Diffusion" in name else 0.6}) if name in ODD else ({"rank": 8},):
        model = zoo_model(name)
        specs = find_experts(model)
        ids_NL = torch.randint(5, VOCABULARY - 5, (6, 16), generator=torch.Generator().manual_seed(1))
        report = compress_(model, {"molae": 1, "budget": budget, "calibration": CALIBRATION}, data=ids_NL)
        assert zoo_logits(model).isfinite().all()
        expected = err_h_by_hooks(zoo_model(name), model, ids_NL[-2:])
        unseen = [layer.name for layer in report.layers if not any(layer.tokens_per_expert)]
        assert unseen == [spec.name for spec in specs if "vision_moe" in spec.name]
        said = [warning for warning in report.warnings if "fitted without data" in warning]
        assert len(said) == len(unseen)
        assert all(f"such as '{path}'" in warning for path, warning in zip(unseen, said, strict=True))
        for spec, layer in zip(specs, report.layers, strict=True):
            if spec.name in unseen:
                assert layer.err_h is None
                continue
            assert layer.err_h == pytest.approx(expected[spec.name], rel=0.01)
            assert layer.relative_error is not None
            assert 0 < layer.relative_error < 100
            tokens = sum(layer.tokens_per_expert)
            if name in SOME_WITHOUT_EXPERT:
                assert ids_NL.numel() * spec.top_k / 2 < tokens < ids_NL.numel() * spec.top_k
            else:
                assert tokens == ids_NL.numel() * spec.top_k
            assert layer.tokens_measured == ids_NL.shape[1]


@pytest.mark.parametrize("sequential", [False, True], ids=["dense past", "sequential"])
@pytest.mark.parametrize("name", ODD)
def test_streamed_and_calibrated_it_is_the_same(name: str, sequential: bool, tmp_path: Path) -> None:
    model, folder = zoo_model(name), tmp_path / "dense"
    model.save_pretrained(folder)
    tokens = Tokenizer(WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w3"))
    tokens.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="w3", eos_token="w2").save_pretrained(folder)
    text = " ".join(f"w{5 + token * token * 7 % (VOCABULARY - 10)}" for token in range(150))
    (tmp_path / "text.txt").write_text(text)
    data = {"data": str(tmp_path / "text.txt")}
    recipe = {**HALF, "calibration": {**CALIBRATION, **data}, "refit": {"sequential": sequential}}
    evaluate = {**data, "samples": 3, "sequence_length": 16, "batch_size": 3}  # some experts' capacity depends on the batch
    is_evaluated = name != "DiffusionGemmaForBlockDiffusion"  # which predicts no next token
    streamed = {**recipe, "model": str(folder), **({"evaluate": evaluate} if is_evaluated else {})}
    if sequential:  # cut off in the middle first

        def cut(stage: str, done: int, _: int) -> None:
            if (stage, done) == ("solve", 1):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(streamed, tmp_path / "latent", device="cpu", max_memory=0, progress=cut)
    report = run(streamed, tmp_path / "latent", device="cpu", max_memory=0)
    tokenizer = load_tokenizer(folder)
    if is_evaluated:
        assert report.evaluation is not None
        assert 0 < report.evaluation["kl"] < 2
        windows = token_windows([[text]], tokenizer, samples=3, sequence_length=16, seed=None)
        perplexity = next_token_perplexity(model, windows)
        assert report.evaluation["original_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    dense = zoo_model(name)
    in_memory = compress_(model, recipe, data=[text], tokenizer=tokenizer)
    windows = token_windows([[text]], tokenizer, samples=6, sequence_length=16, seed=in_memory.recipe["calibration"]["seed"])
    expected = err_h_by_hooks(dense, model, windows[-2:], sequential=sequential)
    for one, other in zip(report.layers, in_memory.layers, strict=True):
        assert one.err_h == (other.err_h and pytest.approx(other.err_h, rel=1e-3))
        assert one.err_h == (other.err_h and pytest.approx(expected[one.name], rel=0.01))
    assert_same(zoo_logits(load(tmp_path / "latent", type(model))), zoo_logits(model), 1e-5)
    assert verify(tmp_path / "latent").passed


def test_the_text_model_of_a_composite_loads_alone(tmp_path: Path) -> None:
    model = zoo_model("Qwen3_5MoeForConditionalGeneration")
    compress_(model, HALF)
    model.save_pretrained(tmp_path)
    text = load(tmp_path, AutoModelForCausalLM)
    assert type(text).__name__ == "Qwen3_5MoeForCausalLM"
    assert_same(zoo_logits(text), zoo_logits(model), 1e-5)


@pytest.mark.parametrize("name", NO_BASIS)
def test_what_cannot_be_compressed_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ModelError, match=NO_BASIS[name]):
        find_experts(zoo_model(name))


def generating_classes() -> dict[str, type[PreTrainedModel]]:
    """Classes of the auto mappings of models that generate text, whose files speak of experts."""
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    names = {
        name for mapping in mappings for names in mapping.values() for name in ([names] if isinstance(names, str) else names)
    }
    classes = {name: getattr(transformers, name) for name in sorted(names)}
    return {name: found for name, found in classes.items() if "experts" in _source_of(found).lower()}


def _source_of(model_class: type[PreTrainedModel]) -> str:
    """Text of the files that a class and the text model inside it come from."""
    configs = [model_class.config_class, *(model_class.config_class.sub_configs or {}).values()]
    files = {Path(str(sys.modules[model_class.__module__].__file__))}
    for config in configs:
        folder = Path(str(sys.modules[config.__module__].__file__)).parent
        files |= set(folder.glob("modeling_*.py"))
    return "".join(file.read_text(encoding="utf-8") for file in files if "auto" not in file.parts[-2])


def test_every_class_of_transformers_with_experts_is_in_the_zoo() -> None:
    known = set(MODELS) | set(TEXT_MODEL_OF)
    unknown = []
    for name, model_class in generating_classes().items():
        if name in known:
            continue
        with torch.device("meta"):
            model = model_class(zoo_config(model_class))
        if routed_experts(model):
            unknown.append(name)
        else:
            with pytest.raises(ModelError, match="No routed experts"):
                find_experts(model)
    assert not unknown, (
        f"transformers {transformers.__version__} has classes with experts that tests/zoo.py lacks: {unknown}"
    )
