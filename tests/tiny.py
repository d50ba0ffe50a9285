"""Tiny random models of the supported families, and the folders they are saved in: shared by all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss")
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY = 32, 24, 8, 2, 264

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}
_DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": INTERMEDIATE,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INTERMEDIATE, "tie_word_embeddings": True},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": 16,
        "intermediate_size": 40,
    },
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": INTERMEDIATE, "sliding_window": None},
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": INTERMEDIATE},
    # First layer dense, group-limited routing with a correction bias, multi-head latent attention.
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK | {"topk_method": "group_limited_greedy"},
    # Transposed, biased, interleaved, clamped low enough to matter; sliding and full attention layers.
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "intermediate_size": INTERMEDIATE,
        "sliding_window": 4,
        "swiglu_limit": 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def sizes(family: str) -> dict[str, Any]:
    """Values of the configuration of a tiny model of the family."""
    return _COMMON | _FAMILY[family]


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """An eval CausalLM of the family whose experts and routers matter: random, reproducible, under 200 kB.

    `changes` are values of its configuration that differ from those all tests share.
    """
    config = AutoConfig.for_model(family, **(_COMMON | _FAMILY[family] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            _fill_(name, parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(buffer, std=0.1)
        for parameter in model.parameters():  # not the rotary tables, which stay fp32 in a loaded model too
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end-of-text and a padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


def save_checkpoint(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, shards: bool = False, **changes: Any
) -> Path:
    """Writes a complete model folder in hub format (experts one by one, where the family does so); returns it."""
    tiny_model(family, dtype, **changes).save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_ids(batch: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    """[batch, length] token ids."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def _fill_(name: str, parameter: torch.nn.Parameter) -> None:
    with torch.no_grad():
        if "norm" in name:
            parameter.normal_(1.0, 0.1)
        elif parameter.dim() == 1 or name.endswith("_bias"):
            parameter.normal_(0.0, 0.3)
        elif "embed" in name:
            parameter.normal_(0.0, 0.5)
        else:
            is_stack = parameter.dim() == 3
            fan_in = (INTERMEDIATE if "down" in name else HIDDEN) if is_stack else parameter.shape[1]
            parameter.normal_(0.0, fan_in**-0.5)
