"""What knows a model's class: which of its modules are routed experts, and in which stack of layers they lie."""

from molae_compress.adapters.detect import decoder_layers, find_experts

__all__ = ["decoder_layers", "find_experts"]
