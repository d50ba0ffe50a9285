"""vLLM's offline engine on a folder, and what it answers."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

# vLLM's own rotary kernel for CPUs takes queries that are cut out of wider ones, as DeepSeek's are, for whole ones.
NATIVE = {"custom_ops": ["-rotary_embedding"]}
DEFAULTS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "compilation_config": NATIVE}


@contextmanager
def engine(folder: Path, *, own_process: bool = False, **options: Any) -> Iterator[LLM]:
    """An engine in this process or in one of its own, of which nothing is left afterwards."""
    llm = None
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(own_process)))
            llm = LLM(model=str(folder), **(DEFAULTS | options))
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def expected(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what transformers continues them with."""
    content = json.loads((folder / "expected.json").read_text())
    return content["prompts"], content["answers"]


def answers(llm: LLM, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Greedy continuations of all prompts at once."""
    settings = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_same_tokens(folder: Path, **options: Any) -> None:
    """Serves the artifact of a folder and compares."""
    prompts, want = expected(folder)
    with engine(folder / "artifact", **options) as llm:
        assert answers(llm, prompts, len(want[0])) == want
