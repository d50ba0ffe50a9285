"""The `genai_config.json` of an exported model: what onnxruntime-genai has to know about it."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from molae_compress.export.graph import CacheShape

KIND = "decoder"  # any model that takes ids, mask and cache


def genai_config(
    model: PreTrainedModel, settings: GenerationConfig, shape: CacheShape, file_name: str, library: str | None
) -> dict[str, Any]:
    """Its content.

    Args:
        model: the model, for its sizes.
        settings: for generation.
        shape: of the cache.
        file_name: of the graph, inside the folder.
        library: file name of the operator library inside the folder, if one is needed.
    """
    config = model.config.get_text_config()
    end = _first(settings.eos_token_id, config.eos_token_id, [])
    pad = _first(settings.pad_token_id, config.pad_token_id, 0)
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library is not None:
        options["custom_ops_library"] = library
    context = int(config.max_position_embeddings)
    return {
        "model": {
            "type": KIND,
            "bos_token_id": _first(settings.bos_token_id, config.bos_token_id, 0),
            "eos_token_id": end,
            "pad_token_id": pad,
            "vocab_size": config.vocab_size,
            "context_length": context,
            "decoder": {
                "session_options": options,
                "filename": file_name,
                "head_size": shape.key_width,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(settings.do_sample),
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,  # the graph concatenates
            "repetition_penalty": settings.repetition_penalty or 1.0,
            "temperature": settings.temperature or 1.0,
            "top_k": settings.top_k or 50,
            "top_p": settings.top_p or 1.0,
        },
    }


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
