"""Which programs run a compressed model: by its architecture, and by the form of its experts."""

from __future__ import annotations

from collections.abc import Iterable

from molae_compress.ranks import ENGINE_STEP
from molae_compress.tensors import AnyShape, LatentShape

# Architectures that the tests run in an engine. Others may run as well; each engine refuses what it cannot.
IN_VLLM = ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
IN_ONNX = ("deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def engines(model_type: str, shapes: Iterable[AnyShape]) -> dict[str, str]:
    """Each engine, and how it runs the experts.

    Args:
        model_type: architecture, as transformers calls it.
        shapes: of all compressed modules.
    """
    shapes = list(shapes)
    layer_form = all(isinstance(shape, LatentShape) and shape.form == "layer" for shape in shapes)
    vllm = "a chain of grouped products"
    if layer_form:
        vllm = "its own fused experts, at the width of the rank"
        if any(isinstance(shape, LatentShape) and shape.rank_in % ENGINE_STEP for shape in shapes):
            vllm += f"; ranks are no multiples of {ENGINE_STEP}, so it pads them with zeros"
    onnx = "`--experts molae`, `ort-moe` or `standard`" if layer_form else "`--experts molae` or `standard`"
    return {
        "transformers": "after `import molae_compress`, or by `molae-compress serve`",
        "vLLM": vllm + _unless(model_type in IN_VLLM),
        "ONNX Runtime": onnx + _unless(model_type in IN_ONNX),
        "any other": "as dense experts again, after `molae-compress expand`",
    }


def _unless(tested: bool) -> str:
    return "" if tested else "; not tested for this architecture"
