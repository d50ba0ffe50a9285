"""What vLLM answers with artifacts is what transformers answers, in every family, form and way of splitting."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.engine import assert_same_tokens, engine, expected
from tests.serving.made import FAMILIES, FORMS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(made: Path, family: str, form: str) -> None:
    assert_same_tokens(made / f"{family}-{form}")


@pytest.mark.parametrize("form", FORMS)
def test_the_example_model(made: Path, form: str) -> None:
    assert_same_tokens(made / f"pocket-{form}", max_model_len=256)


def test_a_dense_layer_one_with_banks_and_one_in_layer_form(made: Path) -> None:
    assert_same_tokens(made / "mixed")


def test_compiled(made: Path) -> None:
    assert_same_tokens(made / "mixed", enforce_eager=False)


@pytest.mark.parametrize("name", ["mixed", "gpt_oss-default", "gpt_oss-layer", "deepseek_v3-default"])
def test_tensor_parallel(made: Path, name: str) -> None:
    assert_same_tokens(made / name, own_process=True, tensor_parallel_size=2)


@pytest.mark.parametrize("name", ["mixed", "qwen3_moe-layer", "gpt_oss-default", "gpt_oss-layer"])
def test_expert_parallel(made: Path, name: str) -> None:
    assert_same_tokens(made / name, own_process=True, tensor_parallel_size=2, enable_expert_parallel=True)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(made: Path, form: str) -> None:
    """Not the same tokens, but the same probabilities up to rounding."""
    from vllm import SamplingParams

    prompts, want = expected(made / f"pocket-{form}")
    whole = [{"prompt_token_ids": [*prompt, *answer]} for prompt, answer in zip(prompts, want, strict=True)]
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = {}
    for dtype in ("float32", "bfloat16"):
        with engine(made / f"pocket-{form}/artifact", dtype=dtype, max_model_len=256) as llm:
            outputs = llm.generate(whole, settings, use_tqdm=False)
        found[dtype] = [
            next(iter(place.values())).logprob for output in outputs for place in output.prompt_logprobs if place is not None
        ]
    assert len(found["float32"]) == sum(len(text["prompt_token_ids"]) - 1 for text in whole)
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=0.3)
    assert found["bfloat16"] != found["float32"]
