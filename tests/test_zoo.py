"""Every Mixture-of-Experts class of transformers: found, compressed, saved, loaded and expanded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from molae_compress import compress_, expand, expand_, run
from molae_compress.adapters import find_experts
from molae_compress.errors import ModelError, MolaeError
from molae_compress.layouts import FLAGS
from molae_compress.modeling import LatentExperts
from tests.zoo import MODELS, TEXT_MODEL_OF, zoo_config, zoo_logits, zoo_model

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
FULL = {"molae": 1, "budget": {"rank": "full"}}
HALF = {"molae": 1, "budget": {"rank": 8}}
# What cannot be done, with the words of the refusal that says so.
NO_BASIS = {"DogeForCausalLM": "one row and one column each"}
NO_LAYER_FORM = {
    "MuseSparkForConditionalGeneration": "normalises the output of each expert",
    "InklingForConditionalGeneration": "would not load",
}


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
