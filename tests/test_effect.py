"""What a change of one module does to the residual stream: gains, errors of outputs, and what is left of one window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molae_compress as molae
from molae_compress import Recipe, compress_
from molae_compress.adapters import find_experts
from molae_compress.compress import OBSERVE, Run, Turn
from molae_compress.source import LiveSource
from tests.conftest import CheckpointMaker
from tests.runs import recipe_for
from tests.test_one_by_one import one_by_one
from tests.tiny import tiny_ids, tiny_model
from tests.zoo import zoo_model

CALIBRATION = {"samples": 4, "sequence_length": 64, "batch_size": 2}


def gains(model: PreTrainedModel, **calibration: Any) -> list[float]:
    """Of all experts modules in their order."""
    recipe = Recipe.load({"molae": 1, "budget": {"keep": 0.5}, "calibration": CALIBRATION | calibration})
    found: list[float] = []

    def visit(turn: Turn) -> None:
        assert turn.effect is not None
        found.append(turn.effect.gain())

    Run(recipe, LiveSource.of(model), tiny_ids(4, 64, seed=2) % 96).each_layer(OBSERVE, set(), visit)
    return found


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_where_a_layer_adds_up_its_experts_the_gain_is_one(family: str) -> None:
    assert gains(tiny_model(family)) == pytest.approx([1.0] * 2, abs=0.06)
    assert gains(tiny_model(family, dtype=torch.bfloat16)) == pytest.approx([1.0] * 2, abs=0.08)


def test_where_experts_read_inputs_of_their_own_the_gain_is_one() -> None:
    assert gains(zoo_model("Llama4ForCausalLM")) == pytest.approx([1.0] * 2, abs=0.08)


def test_a_factor_behind_the_experts_counts_squared() -> None:
    model = tiny_model("qwen3_moe")
    model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: out * 0.1)
    first, second = gains(model)
    assert (first, second * 100) == pytest.approx((1.0, 1.0), abs=0.06)


def test_of_experts_called_one_by_one_too() -> None:
    model = one_by_one()
    model.model.layers[1].register_forward_hook(lambda _, args, out: args[0] + 3.0 * (out - args[0]))
    first, second = gains(model)
    assert (first, second / 9) == pytest.approx((1.0, 1.0), abs=0.06)


def test_a_norm_that_widens_is_seen() -> None:
    model = zoo_model("Gemma4ForCausalLM")
    dense = gains(model)
    for layer in model.model.layers:
        for name in ("post_feedforward_layernorm_2", "post_feedforward_layernorm"):
            layer.get_submodule(name).weight.mul_(0.25)
    assert all(after < 0.5 * before for before, after in zip(dense, gains(model), strict=True))


@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_that_does_not_use_its_experts_gets_no_rank(number: int) -> None:
    model = tiny_model("qwen3_moe")
    model.model.layers[number].mlp.register_forward_hook(lambda _, __, out: out * 0.0)
    recipe = {"molae": 1, "budget": {"keep": 0.5, "banks": 1}, "calibration": CALIBRATION}
    report = compress_(model, recipe, data=tiny_ids(4, 64))
    kept, idle = report.layers[1 - number].shape, report.layers[number].shape
    assert kept is not None
    assert idle is not None
    assert kept["rank_in"] > idle["rank_in"]
    assert report.layers[number].err_h == 0
    assert report.layers[number].relative_error is not None
    assert report.layers[number].relative_error > 0


@pytest.mark.parametrize("name", ["MuseSparkForConditionalGeneration", "GptOssForCausalLM"])
def test_relative_error_is_that_of_the_modules_output(name: str) -> None:
    model, dense = zoo_model(name), zoo_model(name)
    ids_NL = tiny_ids(4, 16) % 96
    recipe = {"molae": 1, "budget": {"rank": 8}, "calibration": {**CALIBRATION, "sequence_length": 16}}
    report = compress_(model, recipe, data=ids_NL)
    for spec, layer in zip(find_experts(dense), report.layers, strict=True):
        outputs: list[Tensor] = []
        latent = model.get_submodule(spec.name)
        handle = dense.get_submodule(spec.name).register_forward_hook(
            lambda _, args, kwargs, out, latent=latent, outputs=outputs: outputs.extend((out, latent(*args, **kwargs))),
            with_kwargs=True,
        )
        with torch.no_grad():
            dense(input_ids=ids_NL[-1:])
        handle.remove()
        exact, found = outputs
        assert layer.relative_error == pytest.approx(float((found - exact).square().sum() / exact.square().sum()), rel=1e-3)


def test_nothing_is_measured_on_the_only_window() -> None:
    model = tiny_model("qwen3_moe")
    recipe = {"molae": 1, "budget": {"keep": 0.5}, "calibration": {**CALIBRATION, "samples": 1}}
    report = compress_(model, recipe, data=tiny_ids(1, 64))
    assert report.err_h is None
    for layer in report.layers:
        assert layer.err_h is layer.relative_error is None
        assert layer.tokens_measured == 0
        assert sum(layer.tokens_per_expert) == 2 * 64
    (said,) = [warning for warning in report.warnings if "err_h" in warning]
    assert "one calibration window" in said
    assert "calibration.samples" in said


@pytest.mark.parametrize("max_memory", [None, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize("sequential", ["false", "true"])
def test_cut_off_it_ends_with_the_same_figures(
    checkpoint: CheckpointMaker, tmp_path: Path, sequential: str, max_memory: int | None
) -> None:
    recipe = recipe_for(checkpoint("deepseek_v3"), f"refit.sequential={sequential}")
    calm = molae.run(recipe, tmp_path / "calm", max_memory=max_memory)
    for moment in (("observe", 1), ("solve", 0), ("solve", 1)):

        def cut(stage: str, done: int, _: int, moment: tuple[str, int] = moment) -> None:
            if (stage, done) == moment:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            molae.run(recipe, tmp_path / "cut", max_memory=max_memory, progress=cut)
    resumed = molae.run(recipe, tmp_path / "cut", max_memory=max_memory)
    found, expected = ([replace(layer, seconds=0.0) for layer in report.layers] for report in (resumed, calm))
    assert found == expected
    assert all(layer.err_h for layer in calm.layers)


def test_the_measurement_repeats_and_leaves_the_layer_as_it_is() -> None:
    model = tiny_model("qwen3_moe")
    modules = dict(model.named_modules())
    assert gains(model) == gains(model)
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
