"""`inspect` explains: which rule found each experts module, why every other part is left alone, how weights are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from molae_compress.cli import main
from molae_compress.cli.tables import show_inspection
from molae_compress.inspection import ELSEWHERE, IN_BLOCK, IN_LAYERS, SHARED, FoundExperts, inspect
from molae_compress.layouts.fused import Decorated, WholeBlock
from molae_compress.layouts.lists import ExpertList
from tests.conftest import CheckpointMaker
from tests.runs import tensors_in
from tests.test_quantized_source import Quantized, save_fp8, save_mxfp4
from tests.zoo import zoo_model

# Some parts of odd models, and why they are left alone.
REASONS = {
    "Qwen2MoeForCausalLM": {
        "model.layers.*.mlp.gate": IN_BLOCK,
        "model.layers.*.mlp.shared_expert": SHARED,
        "model.layers.*.mlp.shared_expert_gate": SHARED,
        "model.layers.*.self_attn": IN_LAYERS,
        "model.embed_tokens": ELSEWHERE,
        "lm_head": ELSEWHERE,
    },
    # Two sets of experts, each with its router, and shared experts beside both; the first layer is dense.
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "model.language_model.layers.*": IN_LAYERS,
        "model.language_model.layers.*.mlp.vision_moe.gate": IN_BLOCK,
        "model.language_model.layers.*.mlp.shared_experts": SHARED,
        "model.vision_tower": ELSEWHERE,
    },
    # Router and experts are one module.
    "JetMoeForCausalLM": {"model.layers.*.mlp.router": IN_BLOCK, "model.layers.*.self_attention": IN_LAYERS},
    # Lists of layers inside the layers; the embedding is named `shared`.
    "SwitchTransformersForConditionalGeneration": {
        "encoder.block.*.layer.*.mlp.router": IN_BLOCK,
        "decoder.block.*.layer.*": IN_LAYERS,
        "shared": ELSEWHERE,
    },
    # No block: experts and router hang in the decoder layer itself.
    "Gemma4ForCausalLM": {"model.layers.*.router": IN_LAYERS, "model.layers.*.mlp": IN_LAYERS, "model.norm": ELSEWHERE},
}


@pytest.mark.parametrize("name", REASONS)
def test_every_part_is_left_alone_for_where_it_lies(name: str, tmp_path: Path) -> None:
    zoo_model(name).save_pretrained(tmp_path)
    found = inspect(str(tmp_path))
    reasons = {part.name: part.reason for part in found.left_alone}
    assert len(reasons) == len(found.left_alone)
    assert reasons.items() >= REASONS[name].items()
    assert {part["reason"] for part in found.to_dict()["left_alone"]} == set(reasons.values())


def test_the_rule_is_told_for_each_module(checkpoint: CheckpointMaker, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(str(checkpoint("olmoe")))
    assert [experts.rule for experts in found.experts] == [Decorated.rule] * 2
    show_inspection(found)
    assert f"\nfound by: {Decorated.rule}\n" in capsys.readouterr().out

    first, second = found.experts
    named = replace(second.spec, name="model.layers.1.moe_experts")
    found = replace(found, experts=(first, FoundExperts(named, "ModuleList", ExpertList.rule)))
    assert found.rule == f"{Decorated.rule}; {ExpertList.rule}"
    assert [experts["rule"] for experts in found.to_dict()["experts"]] == [Decorated.rule, ExpertList.rule]
    show_inspection(found)
    table = capsys.readouterr().out
    assert f"\nmodel.layers.*.mlp.experts found by: {Decorated.rule}\n" in table
    assert f"\nmodel.layers.*.moe_experts found by: {ExpertList.rule}\n" in table
    assert WholeBlock.rule not in table


# Tied experts; weights of experts that compute nothing.
@pytest.mark.parametrize("name", ["DiffusionGemmaForBlockDiffusion", "LongcatFlashForCausalLM"])
def test_every_number_of_the_checkpoint_is_counted_once(name: str, tmp_path: Path) -> None:
    zoo_model(name).save_pretrained(tmp_path)
    found = inspect(str(tmp_path))
    assert found.parameters == sum(tensor.numel() for tensor in tensors_in(tmp_path).values())
    assert found.parameters == found.expert_parameters + sum(part.parameters for part in found.left_alone)


@pytest.mark.parametrize("save", [save_fp8, save_mxfp4])
def test_quantised_weights_are_told_of(tmp_path: Path, save: Callable[[Path], Quantized]) -> None:
    made = save(tmp_path)
    found = json.loads(CliRunner().invoke(main, ["inspect", str(made.folder), "--json"]).stdout)
    stored = load_file(made.folder / "model.safetensors")
    assert found["quantization"] == {"save_fp8": "fp8", "save_mxfp4": "mxfp4"}[save.__name__]
    assert found["stored_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert found["bytes"] == sum(tensor.nbytes for tensor in made.plain.values())
    table = CliRunner().invoke(main, ["inspect", str(made.folder)]).stdout
    assert f"quantised with the method {found['quantization']} " in table
    assert "dequantised to bfloat16 when it is read" in table


def test_plain_weights_are_not_called_quantised(checkpoint: CheckpointMaker) -> None:
    found = inspect(str(checkpoint("mixtral")))
    assert found.quantization is None
    assert found.stored_bytes == found.bytes
    assert "quantised" not in CliRunner().invoke(main, ["inspect", found.model]).stdout
