"""What knows a model's class: which of its modules are routed experts, and in which stack of layers they lie."""

from molae_compress.adapters.detect import Layers, find_experts, layers_with_experts, unproven_experts

__all__ = ["Layers", "find_experts", "layers_with_experts", "unproven_experts"]
