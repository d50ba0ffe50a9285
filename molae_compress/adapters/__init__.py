"""What knows a model's class: which modules are routed experts, and their dense weights in canonical orientation."""

from molae_compress.adapters.detect import (
    decoder_layers,
    dense_experts,
    expert_parameter_names,
    find_experts,
    store_dense_,
)

__all__ = ["decoder_layers", "dense_experts", "expert_parameter_names", "find_experts", "store_dense_"]
