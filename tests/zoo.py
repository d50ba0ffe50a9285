"""A tiny random model of every Mixture-of-Experts class of transformers that generates text, built from data.

Sizes are set by field name wherever a configuration, or one nested in it, has the field; what a class needs besides is in
`_ODD`. Composite models are built whole where their other towers have such fields too, else the text model alone.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 32, 16, 4, 2, 96

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "mm_hidden_size", "out_hidden_size"), HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "projection_dim", "output_dim", "projector_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size", "ffn_dim", "d_ff"), 2 * INTERMEDIATE),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dense_intermediate_size"), 2 * INTERMEDIATE),
    **dict.fromkeys(("prefix_dense_intermediate_size", "projector_input_dim", "projector_output_dim"), HIDDEN),
    **dict.fromkeys(("moe_intermediate_size", "moe_ffn_hidden_size", "expert_ffn_hidden_size"), INTERMEDIATE),
    **dict.fromkeys(("expert_intermediate_size", "expert_ffn_size", "share_expert_dim"), INTERMEDIATE),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), INTERMEDIATE),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_intermediate_size"), INTERMEDIATE),
    "moe_hidden_size": 24,
    "moe_latent_size": 24,
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1),
    **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "kv_channels", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k"), TOP_K),
    **dict.fromkeys(("moe_topk", "moe_k", "top_k"), TOP_K),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    "moe_layer_start_index": 1,
    "zero_expert_num": 2,
    "expert_capacity": 8,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "n_positions"), 64),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "chunk_size", "mamba_chunk_size", "router_hidden_size"), 8),
    "mamba_dt_rank": 4,
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "mamba_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), 1),
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "blank_token_id": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    **dict.fromkeys(("swa_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("position_embedding_size", "output_channels", "projection_hidden_size"), HIDDEN),
    "projector_hidden_size": HIDDEN,
    "image_size": 28,
    "patch_size": 14,
}

_MLA = {"num_key_value_heads": 4}
_FULL, _LINEAR = "full_attention", "linear_attention"
_SWA = {
    **_MLA,
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 8),
    "swa_qk_nope_head_dim": 4,
    "swa_v_head_dim": 8,
}


def _rope(*section: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}}


_QWEN4 = {
    "layer_types": [_LINEAR, _FULL],
    **dict.fromkeys(("indexer_n_heads", "indexer_compress_ratio"), 2),
    "indexer_kv_heads": 1,
    **dict.fromkeys(("indexer_head_dim", "indexer_budget", "hc_lowrank", "ple_embed_dim"), 8),
    "ngram_vocab_size_base": 100,
    "split_ngram_parts": 1,
    "heads_per_ngram": 2,
}
_SAM = {"sam_config": {"downsample_channels": [HIDDEN, HIDDEN], "mlp_dim": HIDDEN}}
# What fields of the usual sizes do not make, by model type. A dictionary goes to a nested configuration.
_ODD: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "mistral4"), _MLA
    ),
    "longcat_flash": {**_MLA, "head_dim": 4},
    "bailing_hybrid": {**_MLA, "layer_types": [_LINEAR, _FULL]},
    "granitemoehybrid": {"layer_types": [_LINEAR, _FULL], "mamba_expand": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**_MLA, "layer_types": [_LINEAR, _FULL], "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", _FULL]},
    "doge": {"is_moe": True, "num_experts": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": INTERMEDIATE,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    "gemma4": {"text_config": {"enable_moe_block": True}},
    "gemma4_text": {"enable_moe_block": True},
    "zaya": {"num_experts_per_tok": 1},
    "inkling_text": {"n_shared_experts": 2},
    "inkling_mm_model": {"text_config": {"n_shared_experts": 2}, "vision_config": {"n_layers": 6, "patch_size": 4}},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "dots3_note_text": _SWA,
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "flint": {"mlp_only_layers": []},
    **{name: {"layer_types": [_LINEAR, _FULL]} for name in ("qwen3_5_moe_text", "qwen3_next")},
    "qwen3_5_moe": {"text_config": {"layer_types": [_LINEAR, _FULL]}},
    "inkling2": {"vision_config": {"text_hidden_size": HIDDEN}},
    "muse_spark": {"audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8] * 4, "depths": [1] * 4}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [INTERMEDIATE, INTERMEDIATE], **_rope(1, 1, 2)}},
    "glm4v_moe": {"text_config": _rope(1, 1, 0, partial_rotary_factor=0.5)},
    "glm5_next": {
        "text_config": {
            **_MLA,
            "mlp_layer_types": ["dense", "sparse"],
            "index_kpool": 2,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "head_dim": 0,
            "qk_rope_head_dim": 0,
        }
    },
    "kimi_k25": {"text_config": _MLA},
    "mistral_large4": {"text_config": {**_MLA, "qk_rope_head_dim": 8, "head_dim": 8}},
    "step3p7": {"text_config": {"sliding_window": 8, "mlp_layer_types": ["dense", "sparse"]}},
    "unlimited_ocr": {"vision_config": _SAM},
    "deepseek_ocr2": {"vision_config": _SAM, "text_config": {**_MLA, "mlp_layer_types": ["dense", "sparse"]}},
}


def tiny_config(config_class: type[PretrainedConfig], odd: dict[str, Any]) -> PretrainedConfig:
    """A configuration of the class with every size it knows set small, nested ones included."""
    known = set(getattr(config_class, "__dataclass_fields__", ())) | set(inspect.signature(config_class.__init__).parameters)
    fields = {name: size for name, size in _SIZES.items() if name in known}
    for name, nested in config_class.sub_configs.items():
        kind = type(getattr(config_class(), name)) if nested is AutoConfig else nested
        if issubclass(kind, PretrainedConfig):
            fields[name] = tiny_config(kind, odd.get(name, {}))
    return config_class(**{**fields, **{name: value for name, value in odd.items() if name not in config_class.sub_configs}})


# Every class that generates text and holds routed experts; where a composite has no tiny form, the class of its text model.
MODELS = (
    "AXK1ForCausalLM",
    "AXK2ForCausalLM",
    "AfmoeForCausalLM",
    "AriaForConditionalGeneration",
    "AriaTextForCausalLM",
    "BailingHybridForCausalLM",
    "BeamForCausalLM",
    "Cohere2MoeForCausalLM",
    "DbrxForCausalLM",
    "DeepseekOcr2ForConditionalGeneration",
    "DeepseekV2ForCausalLM",
    "DeepseekV32ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM",
    "DiffusionGemmaForBlockDiffusion",
    "DogeForCausalLM",
    "Dots1ForCausalLM",
    "Dots3NoteForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration",
    "ExaoneMoeForCausalLM",
    "FlexOlmoForCausalLM",
    "FlintForCausalLM",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "Glm4vMoeForConditionalGeneration",
    "Glm5NextForConditionalGeneration",
    "GlmMoeDsaForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "GraniteMoeSharedForCausalLM",
    "HYV3ForCausalLM",
    "HYV4ForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "Inkling2ForCausalLM",
    "Inkling2ForConditionalGeneration",
    "InklingForCausalLM",
    "InklingForConditionalGeneration",
    "JambaForCausalLM",
    "JetMoeForCausalLM",
    "KimiLinearForCausalLM",
    "Kimi_K25ForConditionalGeneration",
    "Kolibri1ForCausalLM",
    "LagunaForCausalLM",
    "Lfm2MoeForCausalLM",
    "Llama4ForCausalLM",
    "Llama4ForConditionalGeneration",
    "LongcatFlashForCausalLM",
    "MellumForCausalLM",
    "MiMoV2FlashForCausalLM",
    "MiniMaxForCausalLM",
    "MiniMaxM2ForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration",
    "MiniMaxM3VLForCausalLM",
    "Mistral4ForCausalLM",
    "MistralLarge4ForConditionalGeneration",
    "MixtralForCausalLM",
    "MuseSparkForConditionalGeneration",
    "NemotronHForCausalLM",
    "NemotronH_Omni_Reasoning_V3",
    "NllbMoeForConditionalGeneration",
    "OlmoeForCausalLM",
    "OpenAIPrivacyFilterForTokenClassification",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3OmniMoeThinkerTextModel",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "Qwen4ExpForCausalLM",
    "Qwen4ExpForConditionalGeneration",
    "SolarOpenForCausalLM",
    "Step3p7ForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration",
    "UnlimitedOcrForConditionalGeneration",
    "ZayaForCausalLM",
)
TEXT_MODEL_OF = {
    "Dots3NoteForConditionalGeneration": "Dots3NoteForCausalLM",
    "Nemotron3_5TranscribeForConditionalGeneration": "NemotronHForCausalLM",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerTextModel",
    "Qwen3OmniMoeThinkerForConditionalGeneration": "Qwen3OmniMoeThinkerTextModel",
}
# What cannot be done, with the words of the refusal that says so.
NO_BASIS = {"DogeForCausalLM": "one row and one column each"}
NO_LAYER_FORM = {
    "MuseSparkForConditionalGeneration": "normalises the output of each expert",
    "InklingForConditionalGeneration": "would not load",
}


def zoo_config(model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """A small configuration for the class."""
    config = tiny_config(model_class.config_class, _ODD.get(model_class.config_class.model_type, {}))
    config.architectures = [model_class.__name__]
    return config


@cache
def _model(name: str) -> PreTrainedModel:
    model_class = getattr(transformers, name)
    config = zoo_config(model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for key, parameter in model.named_parameters():
            _fill_(key, parameter)
    return model.eval().requires_grad_(False)


def zoo_model(name: str) -> PreTrainedModel:
    """An evaluation-mode model of the class, the same every time, in which experts and routers matter."""
    return copy.deepcopy(_model(name))


def zoo_logits(model: PreTrainedModel) -> Tensor:
    """What the model makes of a few fixed tokens: logits, or hidden states of a class without a head."""
    ids_BL = torch.randint(5, VOCABULARY - 5, (2, 9), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids_BL[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some classes draw what they start from
        out = model(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), use_cache=False, **more)
    return out.logits if "logits" in out else out[0]


def _fill_(name: str, parameter: nn.Parameter) -> None:
    if "norm" in name:
        nn.init.normal_(parameter, 1.0, 0.1)
    elif parameter.dim() < 2:
        nn.init.normal_(parameter, 0.0, 0.1)
    else:
        nn.init.normal_(parameter, 0.0, HIDDEN**-0.5)
